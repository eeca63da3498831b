"""Copy built documentation to a folder for its version, next to those of other versions. For `make docs-release`.

python tools/keep_docs.py docs/_build/html SITE VERSION

SITE has a folder per version, `versions.json` (newest first) for the menu in the sidebar of all versions, and an
`index.html` that redirects to the newest version.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

from packaging.version import InvalidVersion, Version


def kept_versions(site: Path) -> list[str]:
    """Return the names of the versions in a site, newest first. Other folders are ignored."""
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
