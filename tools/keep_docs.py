"""Keeps built documentation under its version, next to that of other versions. `make docs-release` calls it.

python tools/keep_docs.py docs/_build/html SITE VERSION

SITE gets a folder per version, `versions.json` (newest first), from which the sidebar of all of them makes its menu,
and an `index.html` that leads to the newest.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

from packaging.version import InvalidVersion, Version


def kept_versions(site: Path) -> list[str]:
    """Names of the versions in a site, newest first; other folders are left out."""
    versions = []
    for folder in site.iterdir():
        try:
            versions.append((Version(folder.name), folder.name))
        except InvalidVersion:
            continue
    return [name for _, name in sorted(versions, reverse=True)]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("html", type=Path, help="folder of the built documentation")
    parser.add_argument("site", type=Path, help="folder of all versions")
    parser.add_argument("version", type=lambda text: str(Version(text)))
    options = parser.parse_args()
    target = options.site / options.version
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(options.html, target)
    versions = kept_versions(options.site)
    (options.site / "versions.json").write_text(json.dumps(versions) + "\n", encoding="utf-8")
    page = (target / "index.html").read_text(encoding="utf-8")
    index = page.replace("docs/index.html", f"{versions[0]}/docs/index.html")
    (options.site / "index.html").write_text(index, encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
