"""Checks of a recipe's names and files before torch is imported, so that a typing mistake is answered at once."""

from __future__ import annotations

import ast
from collections.abc import Sequence
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from gflowtrl.configuration import check_names, read_recipe
from gflowtrl.files import check_data_path


_TRAINING = "transformers:training_args.py:TrainingArguments"
_STOPPING = "gflowtrl:pipeline/sections.py:StoppingSection"
#: Sections of a recipe and the classes whose fields they may hold, bases included, as package:file:class.
CLASSES = {
    "": ("gflowtrl:pipeline/recipe.py:Recipe",),
    "data": ("gflowtrl:pipeline/sections.py:DataSection",),
    "data.semantic_ids": ("gflowtrl:semantic_ids/making.py:SemanticIdOptions",),
    "evaluation": ("gflowtrl:pipeline/sections.py:EvaluationSection",),
    "prompt": ("gflowtrl:data/prompts.py:PromptFormat",),
    "sft": (
        *("trl:trainer/sft_config.py:SFTConfig", "trl:trainer/base_config.py:_BaseConfig", _TRAINING),
        "transformers:training_args_seq2seq.py:Seq2SeqTrainingArguments",
        _STOPPING,
    ),
    "gflownet": (
        "gflowtrl:trainer/gflownet_config.py:GFlowNetConfig",
        "gflowtrl:trainer/tree_policy_config.py:TreePolicyConfig",
        "trl:trainer/base_config.py:_BaseConfig",
        _TRAINING,
        _STOPPING,
    ),
}
CLASSES["control"] = CLASSES["gflownet"]


def check_early(path: str | Path, arguments: Sequence[str]) -> None:
    """Check the names of fields and the data folder of a recipe in a fraction of a second.

    What only the classes themselves know (types, values, combinations) is checked when the recipe is made.

    Args:
        path: the recipe file.
        arguments: options of the command line.

    Raises:
        ValueError: an unknown field; the message offers the closest known one.
        FileNotFoundError: no recipe, base or data folder.
    """
    fields = {section: declared_fields(classes) for section, classes in CLASSES.items()}
    if not all(fields.values()):  # another version keeps its classes elsewhere: the recipe itself finds mistakes
        return
    content = read_recipe(path, arguments, fields[""] - {"folder"}, fields["gflownet"])
    for section, known in fields.items():
        values: Any = content
        for name in section.split(".") if section else ():
            values = values.get(name) if isinstance(values, dict) else None
        if section and isinstance(values, dict):
            check_names(values, known, section)
    if isinstance(folder := content.get("data_dir"), str):
        check_data_path(Path(folder))


def declared_fields(classes: Sequence[str]) -> set[str]:
    """Names of the fields of dataclasses, read from their source code without importing it.

    Args:
        classes: `package:file:class`, all bases of a class listed too.

    Returns:
        The names; none at all where a file or a class is not there.
    """
    found = [_fields_of(entry) for entry in classes]
    return set().union(*found) if all(found) else set()


@cache
def _fields_of(entry: str) -> frozenset[str]:
    package, file, name = entry.split(":")
    spec = find_spec(package)
    path = Path(spec.origin or "").parent / file if spec else Path(file)
    body = ast.parse(path.read_text(encoding="utf-8")).body if path.is_file() else []
    kind = next((node for node in body if getattr(node, "name", None) == name), None)
    return frozenset(node.target.id for node in kind.body if _is_field(node)) if kind else frozenset()


def _is_field(node: ast.stmt) -> bool:
    """Whether a statement of a class declares a field that its constructor takes."""
    if not isinstance(node, ast.AnnAssign) or "ClassVar" in ast.unparse(node.annotation):
        return False
    keywords = node.value.keywords if isinstance(node.value, ast.Call) else []
    return "init=False" not in map(ast.unparse, keywords)
