"""A page to try a recommender in the browser. It needs the extra `demo`; docs/demo.md describes the page.

Public names are imported on first use, so this package can be imported without Gradio.
"""

from gflowtrl.lazy import import_name


_HOMES = {"create_page": "page", "run_demo": "page", "write_space": "space"}

__all__ = list(_HOMES)


def __getattr__(name: str) -> object:
    try:
        return import_name(__name__, _HOMES, name)
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "gradio":
            raise
        raise ImportError("The demo needs gradio. Run: pip install gflowtrl[demo]") from error
