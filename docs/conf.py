"""Sphinx's configuration of the site: `make docs` builds it into docs/_build, with warnings as errors.

The source is the whole repository and not docs/ alone, so that README, CONTRIBUTING and benchmarks/README.md are
pages where they stand, and links between files mean the same here and on a Git host. Nothing is fetched meanwhile.
"""

from __future__ import annotations

import inspect
import re
from importlib import import_module
from pkgutil import iter_modules

from sphinx.application import Sphinx
from sphinx.util import logging

import gflowtrl


logger = logging.getLogger(__name__)

project = "gflowtrl"
author = "the authors of gflowtrl"
project_copyright = "the authors of gflowtrl, Apache-2.0"
release = version = gflowtrl.__version__

extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
root_doc = "docs/index"
include_patterns = ["*.md", "docs/*.md", "docs/reference/*.md", "docs/notebooks/*.ipynb", "benchmarks/*.md"]
exclude_patterns = [".*", "build", "dist", "outputs", "gflowtrl", "tests", "docs/_build"]
nitpicky = False

# Markdown as GitHub reads it: links to headings of other pages, tables, local files as downloads.
myst_heading_anchors = 3
myst_links_external_new_tab = False

# The notebooks are kept without outputs and run here; a cell that fails fails the build.
nb_execution_mode = "force"
nb_execution_timeout = 600  # a cell, on a busy machine
nb_execution_in_temp = True
nb_execution_raise_on_error = True
nb_merge_streams = True
nb_output_stderr = "remove"  # progress bars

html_theme = "furo"
html_title = f"gflowtrl {release}"
templates_path = ["_templates"]
# Furo's own sidebar, and the versions below the name (tools/keep_docs.py).
html_sidebars = {
    "**": [
        "sidebar/brand.html",
        "versions.html",
        "sidebar/search.html",
        "sidebar/scroll-start.html",
        "sidebar/navigation.html",
        "sidebar/scroll-end.html",
    ]
}
html_extra_path = ["site"]  # index.html, which leads to docs/index.html
html_copy_source = False
html_show_sourcelink = False

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
python_use_unqualified_type_names = True
python_maximum_signature_line_length = 100
napoleon_numpy_docstring = False
napoleon_use_rtype = False
napoleon_use_ivar = True
default_role = "literal"  # docstrings are plain text with `code` in single backticks

GROUP = re.compile(r"^( *)> (Parameters that .*)$")
FENCE = re.compile(r"^( *)```(\w*)$")
LINK = re.compile(r"\[(`[\w.]+`)\]")
CODE = re.compile(r"(`[^`]*`)")
NOTE = re.compile(r"^ *> ?")
GROUPS = sorted(
    {
        match[2]
        for name in ("GFlowNetConfig", "APAOConfig")
        for match in map(GROUP.match, inspect.getdoc(getattr(gflowtrl, name)).splitlines())
        if match
    }
)
napoleon_custom_sections = [("Parameters", "params_style"), *((group, "params_style") for group in GROUPS)]


def plain_to_rst(app: Sphinx, what: str, name: str, obj: object, options: object, lines: list[str]) -> None:
    """Rewrite what docstrings have of Markdown, before napoleon reads their sections.

    Code fences become literal blocks, and a configuration's groups of parameters (`> Parameters that control ...`,
    as TRL writes them) sections of their own.
    """
    fence: str | None = None
    found: list[str] = []
    for line in lines:
        mark, group = FENCE.match(line), GROUP.match(line)
        if mark:
            fence = mark[1] if fence is None else None
            found += ["", f"{mark[1]}.. code-block:: {mark[2] or 'text'}", ""] if fence is not None else [""]
        elif fence is not None:
            found.append("    " + line if line.strip() else line)
        elif group:
            found += ["", f"{group[2]}:"]
        elif NOTE.match(line):
            found.append(NOTE.sub("", line))
        else:
            found.append(outside_code(line))
    lines[:] = found


def outside_code(line: str) -> str:
    """`|x|` is an absolute value here, not what RST takes it for; [`X`], TRL's way to link, is plain X."""
    line = LINK.sub(r"\1", line)
    return "".join(part if part.startswith("`") else part.replace("|", r"\|") for part in CODE.split(line))


def short_signature(app: Sphinx, what: str, name: str, obj: object, options: object, signature: str, returns: str):
    """The configurations have every field of TrainingArguments: a hundred of them are not a signature to read."""
    if what == "class" and name.endswith("Config") and len(signature or "") > 2000:
        return "(output_dir, **fields)", returns
    return None


def public_names() -> dict[str, list[str]]:
    """Public names by package: `gflowtrl` and every package in it that says what is public."""
    packages = ["gflowtrl", *(f"gflowtrl.{module.name}" for module in iter_modules(gflowtrl.__path__))]
    return {name: list(import_module(name).__all__) for name in packages if hasattr(import_module(name), "__all__")}


def check_reference(app: Sphinx, env: object) -> None:
    """Warn of public names that the reference lacks; a warning fails the build."""
    described = set(env.get_domain("py").objects)
    for package, names in public_names().items():
        for name in names:
            home = gflowtrl._HOMES.get(name) if package == "gflowtrl" else None
            if not {f"{package}.{name}", f"{package}.{home}.{name}"} & described:
                logger.warning("%s.%s is public, but the reference does not describe it.", package, name)


def setup(app: Sphinx) -> None:
    app.connect("autodoc-process-docstring", plain_to_rst, priority=400)
    app.connect("autodoc-process-signature", short_signature)
    app.connect("env-check-consistency", check_reference)
