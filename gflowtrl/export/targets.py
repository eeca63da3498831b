"""The targets of `gflowtrl export`, and the export itself: a folder that is written completely or not at all."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from gflowtrl.files import check_new_folder, new_folder
from gflowtrl.hub import local_copy


if TYPE_CHECKING:
    from gflowtrl.recommender import Recommender


@dataclass(frozen=True)
class Target:
    """What a recommender can be exported to.

    Attributes:
        description: what the folder is for, for the help of the command.
        module: the module of `gflowtrl.export` whose `write(recommender, folder)` fills an empty folder. It raises
            ValueError for a recommender that the target does not support.
        packages: packages that it imports and gflowtrl does not require.
        extra: the extra of gflowtrl that installs them.
    """

    description: str
    module: str
    packages: tuple[str, ...] = ()
    extra: str = ""

    def writer(self) -> Callable[[Recommender, Path], None]:
        """Return the function that writes the files.

        Raises:
            ImportError: a package is not installed.
        """
        for package in self.packages:
            if find_spec(package) is None:
                raise ImportError(f"This export needs {package}. Run: pip install gflowtrl[{self.extra}]")
        return import_module(f".{self.module}", __package__).write


#: Name -> target of `export`.
TARGETS = {
    "csr": Target("the prefix tree and the items as flat arrays (CSR), for any engine", "arrays"),
    "onnx": Target(
        "an ONNX graph, and a beam search that needs numpy and onnxruntime",
        "onnx_files",
        ("onnx", "onnxruntime", "onnxscript"),
        "onnx",
    ),
    "vllm": Target("a model folder for vLLM, and a logits processor that follows the prefix tree", "vllm_files"),
}


def export(model: str | os.PathLike, target: str, output: str | os.PathLike) -> Path:
    """Write a saved recommender in the format of another engine.

    Args:
        model: the folder of the recommender, or its name on the Hub.
        target: a name of `TARGETS`.
        output: the new folder. It appears only when it is complete.

    Returns:
        The new folder.

    Raises:
        ValueError: the target is unknown, or does not support the recommender.
        FileExistsError: `output` exists and is not an empty folder.
        ImportError: a package of the target is not installed.
        FileNotFoundError: the recommender does not exist.
    """
    output = Path(output)
    if target not in TARGETS:
        raise ValueError(f"There is no export to {target!r}; choose {', '.join(TARGETS)}.")
    check_new_folder(output)
    write = TARGETS[target].writer()
    model = local_copy(model)
    from gflowtrl.recommender import Recommender  # imports torch

    recommender = Recommender.from_pretrained(model)
    with new_folder(output) as folder:
        write(recommender, folder)
    return output
