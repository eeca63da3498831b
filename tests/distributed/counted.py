"""What the processes of a launcher know of each other, printed by each: of training arguments as they come, under
`use_cpu`, and under a backend that accelerate does not take for several CPUs."""

import os
import tempfile

from accelerate import Accelerator

from gflowtrl import GFlowNetConfig


if __name__ == "__main__":
    for options in ({}, {"ddp_backend": "gloo"}, {"use_cpu": True}):
        try:
            args = GFlowNetConfig(tempfile.gettempdir(), **options)
            found = f"{args.world_size} {Accelerator().distributed_type}"
        except ValueError as error:
            found = str(error)
        os.write(1, f"{sorted(options)}: {found}\n".encode())  # one write, so that lines stay whole
