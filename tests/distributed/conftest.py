"""What all launches of this folder share."""

import os

import pytest


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
