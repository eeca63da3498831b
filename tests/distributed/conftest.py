"""What all launches of this folder share."""

import pytest


@pytest.fixture(scope="session", autouse=True)
def own_extensions(tmp_path_factory):
    """DeepSpeed compiles an extension at its first start. A process killed meanwhile leaves a lock in the machine's
    cache that torch waits for without end, so these tests, which kill processes, compile into their own folder."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path_factory.mktemp("torch_extensions")))
        yield
