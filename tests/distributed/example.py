"""Run examples/gflowgr_amazon.py unchanged on CPU processes, sharded by accelerate if the engine does that."""

import os
import runpy

from .launch import ROOT


if os.environ.get("GFLOWTRL_FSDP_ON_CPU"):
    import tests.distributed.fsdp_on_cpu  # noqa: F401

if __name__ == "__main__":
    runpy.run_path(str(ROOT / "examples" / "gflowgr_amazon.py"), run_name="__main__")
