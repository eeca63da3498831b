"""README and docs: links are valid, code compiles, imports existing names and runs, and commands have their options.

`make docs` builds the site with warnings as errors and runs the notebook. These tests need no build.
"""

from __future__ import annotations

import ast
import importlib
import importlib.util
import json
import math
import re
import shlex
import sys
from pathlib import Path
from pkgutil import iter_modules
from types import ModuleType

import pytest

import gflowtrl
from gflowtrl import rewards
from gflowtrl.cli import COMMANDS, main
from gflowtrl.losses import LOSSES, registry
from gflowtrl.samplers import SAMPLERS
from tests.processes import run_python


ROOT = Path(__file__).parents[1]
PAGES = sorted(page for where in (".", "docs", "docs/reference", "benchmarks") for page in ROOT.glob(f"{where}/*.md"))
PACKAGES = [f"gflowtrl.{module.name}" for module in iter_modules(gflowtrl.__path__) if module.ispkg]
PUBLIC = [name for name in PACKAGES if hasattr(importlib.import_module(name), "__all__")]
BLOCK = re.compile(r"^ *```(\w+)\n(.*?)^ *```", re.DOTALL | re.MULTILINE)
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
FILE = re.compile(r"(?<![\w/.-])(?:recipes|examples|benchmarks|tests|docs)/[\w./-]+\.(?:py|yaml|md|json)")

pytestmark = pytest.mark.skipif(not PAGES, reason="README.md does not exist: an installed copy is tested")


def blocks(language: str) -> list:
    pairs = [(page, text) for page in PAGES for kind, text in BLOCK.findall(page.read_text()) if kind == language]
    return [pytest.param(text, id=f"{page.name}-{number}") for number, (page, text) in enumerate(pairs)]


def anchors(page: Path) -> set[str]:
    """Return the anchors of the headings by GitHub's rule."""
    headings = re.findall(r"^#+ (.*)$", BLOCK.sub("", page.read_text()), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_and_files_exist(page):
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
        assert known or name.startswith("docs/") and not (ROOT / "docs").exists(), f"{page.name} mentions {name}"


@pytest.mark.parametrize("code", blocks("python"))
def test_python_compiles_and_imports_existing_names(code):
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
        exists = option in known or section in known and "." in option
        if not exists and words[0] in ("train", "sft", "teacher"):  # an option without a section is the GFlowNet's
            from gflowtrl import GFlowNetConfig

            exists = option[2:] in GFlowNetConfig.__dataclass_fields__
        assert exists, f"gflowtrl {words[0]} has no {option}"


@pytest.mark.parametrize("package", PUBLIC)
def test_every_public_name_is_documented_and_in_the_reference(package):
    """`automodule` documents the classes and functions of `__all__`; other values must be named on the page."""
    if package == "gflowtrl.demo":
        pytest.importorskip("gradio", reason="the demo needs the extra `demo`")
    module, page = importlib.import_module(package), ROOT / "docs" / "reference" / f"{package.split('.')[1]}.md"
    text = page.read_text()
    whole = f".. automodule:: {package}\n   :members:\n   :imported-members:\n" in text
    for name in module.__all__:
        value = getattr(module, name)
        described = isinstance(value, type) or hasattr(value, "__code__")
        if described:
            assert value.__doc__, f"{package}.{name} has no docstring"
        named = re.search(rf"^\.\. \S+:: ({re.escape(package)}\.)?{name}$", text, re.MULTILINE)
        assert named or whole and described, f"{page.name} does not describe {package}.{name}"
    assert f"\n{page.stem}\n" in (page.parent / "index.md").read_text(), f"the reference's index lacks {page.stem}"


def test_the_reference_lists_the_names_of_gflowtrl():
    text = (ROOT / "docs" / "reference" / "index.md").read_text()
    for name in gflowtrl.__all__:
        assert f"gflowtrl.{gflowtrl._HOMES.get(name)}.{name}`" in text or f".. py:data:: {name}\n" in text, name


def test_choosing_has_every_loss_reward_and_sampler():
    text = (ROOT / "docs" / "choosing.md").read_text()
    tables = dict(re.findall(r"^## (\w+)\n(.*?)(?=^## |\Z)", text, re.MULTILINE | re.DOTALL))
    classes = {name: value for name in rewards.__all__ if isinstance(value := getattr(rewards, name), type)}
    built_in = [name for name, value in classes.items() if issubclass(value, rewards.Reward) and name != "Reward"]
    for heading, names in {"Losses": LOSSES, "Rewards": built_in, "Samplers": SAMPLERS}.items():
        first = " ".join(row.split("|")[1] for row in tables[heading].splitlines() if row.startswith("|"))
        assert set(re.findall(r"`(\w+)`", first)) - {"loss_type"} == set(names), heading


def load_script(name: str, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """Import a script of docs/ as a module."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "docs" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, name, module)  # dataclasses look up their module here
    monkeypatch.setattr(registry, "LOSSES", dict(registry.LOSSES))  # the audit's tables register one
    spec.loader.exec_module(module)
    return module


def test_tables_of_results_agree_with_the_records(monkeypatch):
    script = load_script("make_results", monkeypatch)
    pages = {page: page.read_text() for page in script.PAGES}
    used = [name for text in pages.values() for _, name, _ in script.MARKED.findall(text)]
    assert sorted(used) == sorted(script.TABLES)
    for page, text in pages.items():
        assert script.filled(text) == text, f"{page.name}: run python docs/make_results.py"


def test_tables_of_results_are_updated(monkeypatch, tmp_path):
    script = load_script("make_results", monkeypatch)
    page = tmp_path / "page.md"
    monkeypatch.setattr(script, "PAGES", [page])
    monkeypatch.setattr(sys, "argv", ["make_results.py"])
    page.write_text("before\n<!-- results:shop -->\n<!-- /results -->\nafter\n")
    script.main()
    text = page.read_text()
    assert re.search(r"\| GFlowNet, exact flows .*\| +\.337 ± \.011 ", text)
    assert text.startswith("before\n") and text.endswith("\nafter\n")
    monkeypatch.setattr(sys, "argv", ["make_results.py", "--check"])
    script.main()
    page.write_text(text.replace(".337", ".338"))
    with pytest.raises(SystemExit, match="page.md does not agree"):
        script.main()
    assert ".338" in page.read_text()  # --check writes nothing


def test_pictures_come_from_the_script_are_used_and_small(monkeypatch):
    pictures = load_script("pictures", monkeypatch)
    files = sorted((ROOT / "docs" / "images").iterdir())
    # The last three are made by benchmarks/quality/seconds.py and exposed.py, and in a browser (docs/demo.md).
    names = [*pictures.PICTURES, "seconds", "truth", "demo"]
    assert [file.name for file in files] == sorted(f"{name}.png" for name in names)
    used = set(re.findall(r"!\[[^\]]+\]\(images/([\w.]+)\)", "".join(page.read_text() for page in PAGES)))
    for file in files:
        assert file.name in used and file.stat().st_size < 100_000, file.name


def test_notebooks_are_stored_without_outputs():
    notebooks = sorted((ROOT / "docs" / "notebooks").glob("*.ipynb"))
    assert notebooks
    for notebook in notebooks:
        for cell in json.loads(notebook.read_text())["cells"]:
            assert not cell.get("outputs") and cell.get("execution_count") is None, notebook.name


def run_page(name: str, folder: Path) -> str:
    """Run all Python code of a page in a new process and return what it prints."""
    page = (ROOT / name).read_text()
    script = folder / "page.py"
    script.write_text("\n".join(code for kind, code in BLOCK.findall(page) if kind == "python"))
    ran = run_python([script], folder, timeout=600)
    assert ran.returncode == 0, ran.stderr[-3000:]
    return ran.stdout


def test_the_extensions_of_the_page_run_and_work(tmp_path):
    printed = run_page("docs/extending.md", tmp_path)
    plain, cheap = map(float, re.search(r"mean price (\S+), with the reward (\S+)", printed).groups())
    exact = float(re.search(r"mean price with exact flows (\S+)", printed)[1])
    assert cheap < plain / 2 and exact < plain / 2
    assert "'sampler/shelf/share': 0.375" in printed
    first, last = map(float, re.search(r"residual (\S+) -> (\S+) nats", printed).groups())
    assert last < 0.7 * first


def test_the_code_of_the_readme_runs_and_recommends(tmp_path):
    code = [text for kind, text in BLOCK.findall((ROOT / "README.md").read_text()) if kind == "python"]
    assert len(code) == 1
    found = re.findall(
        r"^(\w+ / \w+ no\. \d+) +(\d+\.\d\d) (-\d+\.\d\d)$", run_page("README.md", tmp_path), re.MULTILINE
    )
    assert len({title for title, _, _ in found}) == 5
    log_probs = [float(log_prob) for _, _, log_prob in found]
    assert log_probs == sorted(log_probs, reverse=True)
    assert log_probs[0] > math.log(2 / 120)  # more than twice the uniform probability of 120 items


def test_quickstart_runs_and_recommends(tmp_path):
    printed = run_page("docs/quickstart.md", tmp_path)
    lines = re.findall(r"^(\w+ / \w+ no\. \d+) +(-\d+\.\d+)$", printed, re.MULTILINE)
    assert len({title for title, _ in lines}) == 5
    assert [float(value) for _, value in lines] == sorted((float(value) for _, value in lines), reverse=True)


def test_the_code_of_the_trl_page_runs(tmp_path):
    printed = run_page("docs/trl.md", tmp_path)
    assert printed.count("train_runtime") == 2  # GRPO's and ours
