"""What all launches of this folder share."""

import os
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest

from .cases import RESUMED, Case, chosen, dump
from .launch import ENGINES, launch


@pytest.fixture(scope="session", autouse=True)
def own_extensions(tmp_path_factory: pytest.TempPathFactory):
    """DeepSpeed compiles an extension at its first start. A process killed meanwhile leaves a lock in the machine's
    cache that torch waits for without end, so these tests, which kill processes, compile into a folder of this run
    (one for all of pytest-xdist's workers: the first start compiles, another one waits for it)."""
    folder = tmp_path_factory.getbasetemp()
    folder = folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TORCH_EXTENSIONS_DIR", str(folder / "torch_extensions"))
        yield


@pytest.fixture(scope="session")
def ran(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, list[Case]]]:
    """Engine to folder and cases: `chosen` trained, `RESUMED` resumed, all in one group of two processes, once."""

    @cache
    def run(engine: str) -> tuple[Path, list[Case]]:
        folder, cases = tmp_path_factory.mktemp(engine), chosen(list(ENGINES).index(engine))
        if engine == "ddp":
            # Its weights adapt to the prompts of the whole step, each micro-batch of each process included.
            cases.append(Case("sft,prefix_pairwise", accumulation=2))
        launch(engine, folder, ["-m", "tests.distributed.worker", engine, str(folder), dump(cases), dump(RESUMED)])
        return folder, cases

    return run
