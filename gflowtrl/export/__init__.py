"""Export a recommender to other engines: flat arrays of its catalog, ONNX Runtime, vLLM. Page: docs/export.md.

Public names are imported on first use, so that the command can show its help without torch.
"""

from importlib import import_module


_HOMES = {"TARGETS": "targets", "Target": "targets", "export": "targets"}

__all__ = list(_HOMES)


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; it has {', '.join(_HOMES)}.")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
