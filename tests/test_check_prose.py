"""The script that checks the English: what it must find, and what it must leave alone."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest


SCRIPT = Path(__file__).parents[1] / "tools" / "check_prose.py"

_spec = importlib.util.spec_from_file_location("check_prose", SCRIPT)
check_prose = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(check_prose)


def remedies(source: str, suffix: str = ".md") -> list[str]:
    return [text.split(" -> ")[1] for _, text in check_prose.findings(source, suffix)]


@pytest.mark.parametrize(
    "sentence, remedy",
    [
        ("It takes 4 tokens an id.", "per"),
        ("16 trajectories a prompt are drawn.", "per"),
        ("12 seconds an epoch", "per"),
        ("A string is no list.", "is not a"),
        ("Titles that are no\n  text are refused.", "is not a"),
        ("None, or -1 where there is none", "say what does not exist"),
        ("The figures stand in benchmarks/results.", "is"),
        ("A key that stands twice is refused.", "occurs, is"),
        ("SFT is trained beside the balance loss.", "next to, together with"),
        ("What comes behind the prompt is cut.", "after"),
        ("Losses of one's own are registered.", "your own, custom"),
        ("The trainer is told the step.", "gets, receives"),
        ("Give another port, 8001, say.", "for example"),
        ("The whole Catalogue is written.", "catalog"),
        ("It normalises colours.", "-ize"),
        ("It normalises colours.", "-or"),
        ("The licence is known.", "US spelling"),
    ],
)
def test_the_private_dialect_is_found(sentence, remedy):
    assert remedy in remedies(sentence)
    assert remedy in remedies(f'"""{sentence}"""\n', ".py")
    assert remedy in remedies("".join(f"# {line}\n" for line in sentence.splitlines()), ".yaml")


@pytest.mark.parametrize(
    "sentence",
    [
        "It takes 4 tokens per id, and a token has an id.",
        "It is no longer trained, and is no more than a copy.",
        "There is no field 'x'. Did you mean 'y'?",
        "The value is None.",
        "The server runs behind a reverse proxy or behind another proxy.",
        "It stands for an item and leaves room for others.",
        "The programmer's analyses name colors, and otherwise promise to exercise the catalog.",
        "`catalogue` and ``lies beside`` are code, and so is [a link](docs/catalogue.md).",
    ],
)
def test_plain_english_is_left_alone(sentence):
    assert remedies(sentence) == [] == remedies(f'"""{sentence}"""\n', ".py")


def test_code_is_not_prose():
    python = 'catalogue = beside(behind)  # a catalog\nassert catalogue == "a catalog", f"{catalogue}"\n'
    expected = ["catalog"] if sys.version_info < (3, 12) else []  # before 3.12 an f-string is one token
    assert remedies(python, ".py") == expected
    assert remedies("```python\ncatalogue.lies(beside)  # a catalog\n```\nA catalog.\n") == []
    assert remedies("catalogue: beside  # a catalog\n", ".yaml") == []


def test_comments_inside_code_are_prose():
    markdown = "Text.\n\n```bash\ngflowtrl train  # beside the demo\n```\n\n`x` is beside `y`.\n"
    assert [line for line, _ in check_prose.findings(markdown, ".md")] == [4, 7]
    assert sorted(remedies("model: x  # lies beside it\n", ".yaml")) == ["is", "next to, together with"]


def test_phrases_go_on_in_the_next_line_comment_and_string():
    assert check_prose.findings("x = 1  # one\n# this is no\n# item\n", ".py") == [(2, "is no item -> is not a")]
    assert check_prose.findings('x = (\n    "it is "\n    "no item"\n)\n', ".py") == [(2, "is no item -> is not a")]
    assert remedies('x = ("it is", 3, "no item")\n', ".py") == []
    assert remedies("What this is\n\nNo items\n") == []


def test_lines_of_markdown_are_measured_outside_tables_and_code():
    long = "word " * 24 + "w" * 2
    assert check_prose.findings(f"{long[:120]}\n{long}\n", ".md") == [(2, "122 characters -> at most 120")]
    assert remedies(f"| {long} |\n```\n{long}\n```\n") == []
    assert remedies(f"# {long}\n", ".py") == []


def test_the_readme_is_a_first_page():
    assert check_prose.readme_findings("word " * 900 + "\n" * 120 + "") == []
    assert check_prose.readme_findings("word " * 901) == [(0, "901 words -> at most 900")]
    assert check_prose.readme_findings("word\n" * 121) == [(121, "121 lines -> at most 120")]
    assert check_prose.readme_findings("```\n" + "code " * 950 + "\n```\n") == []


def test_the_command_names_file_and_line(tmp_path):
    (tmp_path / "page.md").write_text("A catalog.\n\nThe catalogue.\n")
    (tmp_path / "_build").mkdir()
    (tmp_path / "_build" / "made.md").write_text("The catalogue.\n")
    ran = subprocess.run([sys.executable, SCRIPT, tmp_path], capture_output=True, text=True)
    assert ran.returncode == 1
    assert ran.stdout.splitlines() == [f"{tmp_path / 'page.md'}:3: catalogue -> catalog"]
    (tmp_path / "page.md").write_text("A catalog.\n")
    assert subprocess.run([sys.executable, SCRIPT, tmp_path / "page.md"]).returncode == 0
    for other in ("missing", "setup.cfg"):  # a mistyped name must not pass as clean
        (tmp_path / "setup.cfg").touch()
        assert subprocess.run([sys.executable, SCRIPT, tmp_path / other], capture_output=True).returncode == 2
