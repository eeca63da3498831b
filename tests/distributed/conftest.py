"""Fixtures of all tests in this folder."""

import os

import pytest


@pytest.fixture(scope="session", autouse=True)
def extensions_folder(tmp_path_factory: pytest.TempPathFactory):
    """Compile DeepSpeed's extension in a folder of this test run.

    DeepSpeed compiles it at its first start. A process that is killed during the compilation leaves a lock in the
    machine's cache, and torch waits for this lock forever. These tests kill processes. All workers of pytest-xdist
    share the folder: the first one compiles, and the others wait for it.
    """
    folder = tmp_path_factory.getbasetemp()
    folder = folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TORCH_EXTENSIONS_DIR", str(folder / "torch_extensions"))
        yield
