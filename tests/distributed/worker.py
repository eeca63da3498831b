"""Trains the cases it is given, one after another in the same group of processes: `worker.py ENGINE FOLDER CASES`."""

import json
import os
import sys
from pathlib import Path


if os.environ.get("GFLOWTRL_FSDP_ON_CPU"):
    import tests.distributed.fsdp_on_cpu  # noqa: F401

from accelerate import PartialState

from .cases import load, train
from .launch import ENGINES, PROCESSES


if __name__ == "__main__":
    engine, folder, cases = sys.argv[1], Path(sys.argv[2]), load(sys.argv[3])
    for case in cases:
        record = train(case, folder / str(case), PROCESSES, **{"use_cpu": False, **ENGINES[engine][1]})
        (folder / f"{case}-{PartialState().process_index}.json").write_text(json.dumps(record))
    PartialState().destroy_process_group()
