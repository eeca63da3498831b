"""The documentation of releases: a folder per version, a list for the menu, a first page that leads to the newest."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path


ROOT = Path(__file__).parents[1]


def keep(html: Path, site: Path, version: str, text: str) -> None:
    (html / "docs").mkdir(parents=True, exist_ok=True)
    (html / "index.html").write_text((ROOT / "docs" / "site" / "index.html").read_text())
    (html / "docs" / "index.html").write_text(text)
    command = [sys.executable, ROOT / "tools" / "keep_docs.py", html, site, version]
    subprocess.run(command, check=True)


def test_each_version_keeps_its_pages_and_the_first_page_leads_to_the_newest(tmp_path):
    html, site = tmp_path / "html", tmp_path / "site"
    (site / "images").mkdir(parents=True)  # not a version
    for version, text in (("0.10.0", "ten"), ("0.9.0", "nine"), ("0.10.0", "ten again"), ("0.10.1.dev0", "next")):
        keep(html, site, version, text)
    assert json.loads((site / "versions.json").read_text()) == ["0.10.1.dev0", "0.10.0", "0.9.0"]
    assert (site / "0.10.0" / "docs" / "index.html").read_text() == "ten again"
    assert (site / "0.9.0" / "docs" / "index.html").read_text() == "nine"
    first = (site / "index.html").read_text()
    assert first.count("0.10.1.dev0/docs/index.html") == 2  # the redirect, and a link for browsers without it
    assert (site / "0.10.1.dev0" / "docs" / "index.html").is_file()


def test_a_version_must_be_one(tmp_path):
    command = [sys.executable, ROOT / "tools" / "keep_docs.py", tmp_path, tmp_path / "site", "../elsewhere"]
    assert subprocess.run(command, capture_output=True).returncode == 2
    assert not (tmp_path / "site").exists()
