"""A page to try a recommender in the browser. It needs the extra `demo`; docs/demo.md describes the page.

Public names are imported on first use, so this package can be imported without Gradio.
"""

from importlib import import_module


_HOMES = {"create_page": "page", "run_demo": "page", "write_space": "space"}

__all__ = list(_HOMES)


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; it has {', '.join(_HOMES)}.")
    try:
        return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "gradio":
            raise
        raise ImportError("The demo needs gradio. Run: pip install gflowtrl[demo]") from error
