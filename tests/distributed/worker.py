"""Train and resume cases one after another in one process group: `worker.py ENGINE FOLDER TRAINED RESUMED`."""

import json
import os
import sys
from pathlib import Path


if os.environ.get("GFLOWTRL_FSDP_ON_CPU"):
    import tests.distributed.fsdp_on_cpu  # noqa: F401

from accelerate import PartialState

from .cases import load, resume, train
from .launch import ENGINES, PROCESSES


if __name__ == "__main__":
    engine, folder = sys.argv[1], Path(sys.argv[2])
    for what, do, cases in (("train", train, load(sys.argv[3])), ("resume", resume, load(sys.argv[4]))):
        for case in cases:
            output = folder / f"{what}-{case}"
            record = do(case, output, PROCESSES, **{"use_cpu": False, **ENGINES[engine][1]})
            Path(f"{output}-{PartialState().process_index}.json").write_text(json.dumps(record))
    # A thread of gloo that still holds tensors of the last gather would abort the interpreter at exit.
    PartialState().wait_for_everyone()
    PartialState().destroy_process_group()
