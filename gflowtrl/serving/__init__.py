"""A recommender behind HTTP. Needs the extra `serve`; docs/serving.md describes requests and answers.

Names are imported on first use, so that this package can be imported where FastAPI is not installed.
"""

from importlib import import_module


_HOMES = {"Limits": "limits", "create_app": "app", "main": "command", "serve": "command"}
_EXTRA = {"fastapi", "pydantic", "starlette", "uvicorn"}  # what the extra brings

__all__ = list(_HOMES)


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; it has {', '.join(_HOMES)}.")
    return getattr(load(name), name)


def load(name: str) -> object:
    """The module that holds a public name.

    Raises:
        ImportError: FastAPI or uvicorn is not installed; the message says what to install.
    """
    try:
        return import_module(f"{__name__}.{_HOMES[name]}")
    except ModuleNotFoundError as error:
        raise missing_extra(error) from error


def missing_extra(error: ModuleNotFoundError) -> ImportError:
    """The error that says what to install, where `error` is about a library of the extra; else `error` itself."""
    if (error.name or "").partition(".")[0] not in _EXTRA:
        return error
    return ImportError(f"Serving needs {error.name}, which is not installed. Run: pip install gflowtrl[serve]")
