"""An HTTP server for a recommender. It needs the extra `serve`; docs/serving.md describes requests and answers.

Public names are imported on first use, so this package can be imported without FastAPI.
"""

from importlib import import_module


_HOMES = {"Limits": "limits", "create_app": "app", "serve": "server"}
_EXTRA = {"fastapi", "prometheus_client", "pydantic", "starlette", "uvicorn"}  # libraries of the extra

__all__ = list(_HOMES)


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; it has {', '.join(_HOMES)}.")
    try:
        return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in _EXTRA:
            raise
        raise ImportError(f"Serving needs {error.name}. Run: pip install gflowtrl[serve]") from error
