"""Export a recommender to other engines: flat arrays of its catalog, ONNX Runtime, vLLM. Page: docs/export.md.

Public names are imported on first use, so that the command can show its help without torch.
"""

from gflowtrl.lazy import import_name


_HOMES = {"TARGETS": "targets", "Target": "targets", "export": "targets"}

__all__ = list(_HOMES)


def __getattr__(name: str) -> object:
    return import_name(__name__, _HOMES, name)
