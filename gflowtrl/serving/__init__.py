"""An HTTP server for a recommender. It needs the extra `serve`; docs/serving.md describes requests and answers.

Public names are imported on first use, so this package can be imported without FastAPI.
"""

from gflowtrl.lazy import import_name


_HOMES = {"Limits": "limits", "create_app": "app", "serve": "server"}
_EXTRA = {"fastapi", "prometheus_client", "pydantic", "starlette", "uvicorn"}  # libraries of the extra

__all__ = list(_HOMES)


def __getattr__(name: str) -> object:
    try:
        return import_name(__name__, _HOMES, name)
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in _EXTRA:
            raise
        raise ImportError(f"Serving needs {error.name}. Run: pip install gflowtrl[serve]") from error
