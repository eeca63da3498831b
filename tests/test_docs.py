"""README and docs: links lead somewhere, code compiles and imports what is there, commands have their options."""

from __future__ import annotations

import ast
import importlib
import re
import shlex
from pathlib import Path

import pytest

from gflowtrl.cli import COMMANDS, main


ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("benchmarks/*.md")])
BLOCK = re.compile(r"^ *```(\w+)\n(.*?)^ *```", re.DOTALL | re.MULTILINE)
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
FILE = re.compile(r"(?<![\w/.-])(?:recipes|examples|benchmarks|tests|docs)/[\w./-]+\.(?:py|yaml|md|json)")

pytestmark = pytest.mark.skipif(not PAGES, reason="README.md is not beside the package: an installed copy is tested")


def blocks(language: str) -> list:
    found = [(page, text) for page in PAGES for kind, text in BLOCK.findall(page.read_text()) if kind == language]
    return [pytest.param(text, id=f"{page.name}-{number}") for number, (page, text) in enumerate(found)]


def anchors(page: Path) -> set[str]:
    """What a heading is called in a link, as GitHub makes it."""
    headings = re.findall(r"^#+ (.*)$", BLOCK.sub("", page.read_text()), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_and_files_are_there(page):
    text = page.read_text()
    for target in LINK.findall(BLOCK.sub("", text)):
        if target.startswith("http"):
            continue
        path, _, anchor = target.partition("#")
        file = page if not path else (page.parent / path).resolve()
        assert file.exists(), f"{page.name} links to {target}"
        if anchor:
            assert anchor in anchors(file), f"{page.name} links to {target}; {file.name} has {sorted(anchors(file))}"
    for name in FILE.findall(text):
        known = (ROOT / name).exists() or (page.parent / name).exists()
        assert known or name.startswith("docs/") and not (ROOT / "docs").exists(), f"{page.name} speaks of {name}"


@pytest.mark.parametrize("code", blocks("python"))
def test_python_compiles_and_imports_what_is_there(code):
    tree = ast.parse(code)
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module.split(".")[0] in ("gflowtrl", "trl", "transformers"):
            module = importlib.import_module(node.module)
            for alias in node.names:
                assert hasattr(module, alias.name), f"{node.module} has no {alias.name}"


def commands() -> list:
    found = []
    for page in PAGES:
        for kind, text in BLOCK.findall(page.read_text()):
            if kind not in ("bash", "sh"):
                continue
            for line in text.replace("\\\n", " ").splitlines():
                for part in line.split("#")[0].split("|"):
                    words = shlex.split(part, comments=True) if "gflowtrl" in part else []
                    if "gflowtrl" in words and words.index("gflowtrl") + 1 < len(words):
                        rest = words[words.index("gflowtrl") + 1 :]
                        if rest[0] in COMMANDS or words[0] == "gflowtrl":
                            found.append(pytest.param(rest, id=f"{page.name}-{' '.join(rest)[:60]}"))
    return found


@pytest.mark.parametrize("words", commands())
def test_commands_have_the_options_that_are_shown(words, capsys):
    assert words[0] in COMMANDS, words
    try:
        main([words[0], "--help"])
    except SystemExit as stop:
        assert stop.code == 0
    known = set(re.findall(r"(?<![\w-])--?[a-z][\w.]*", capsys.readouterr().out)) | {"--help"}
    for word in words[1:]:
        option = word.partition("=")[0]
        if not re.fullmatch(r"--?[a-z][\w.]*", option):
            continue
        section = option.split(".")[0]
        ours = option in known or section in known and "." in option
        if not ours and words[0] in ("train", "sft", "teacher"):  # an option without a section is the GFlowNet's
            from gflowtrl import GFlowNetConfig

            ours = option[2:] in GFlowNetConfig.__dataclass_fields__
        assert ours, f"gflowtrl {words[0]} has no {option}"


@pytest.mark.parametrize(
    "room",
    ["catalog", "data", "losses", "metrics", "pipeline", "policy", "rewards", "samplers", "semantic_ids", "teachers",
     "trainer"],
)  # fmt: skip
def test_every_public_name_is_documented(room):
    module = importlib.import_module(f"gflowtrl.{room}")
    for name in module.__all__:
        value = getattr(module, name)
        if callable(value):
            assert value.__doc__, f"gflowtrl.{room}.{name} has no docstring"
