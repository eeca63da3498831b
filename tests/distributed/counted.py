"""Each process of a launcher prints its number of processes: with default training arguments, with a backend that
accelerate does not recognize as several CPU processes, and with `use_cpu`."""

import os
import tempfile

from accelerate import Accelerator

from gflowtrl import GFlowNetConfig


if __name__ == "__main__":
    for options in ({}, {"ddp_backend": "gloo"}, {"use_cpu": True}):
        try:
            args = GFlowNetConfig(tempfile.gettempdir(), **options)
            result = f"{args.world_size} {Accelerator().distributed_type}"
        except ValueError as error:
            result = str(error)
        os.write(1, f"{sorted(options)}: {result}\n".encode())  # one write, so that lines are not interleaved
