"""Trains or resumes cases, one after another in one group of processes: `worker.py WHAT ENGINE FOLDER CASES`."""

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
    what, engine, folder, cases = sys.argv[1], sys.argv[2], Path(sys.argv[3]), load(sys.argv[4])
    for case in cases:
        record = {"train": train, "resume": resume}[what](
            case, folder / str(case), PROCESSES, **{"use_cpu": False, **ENGINES[engine][1]}
        )
        (folder / f"{what}-{case}-{PartialState().process_index}.json").write_text(json.dumps(record))
    # A thread of gloo that still holds the tensors of the last gathering would abort the interpreter's exit.
    PartialState().wait_for_everyone()
    PartialState().destroy_process_group()
