"""Prints the lower bounds of setup.cfg as pip constraints: `make test-lowest` installs exactly these versions.

    python tools/lowest_versions.py > constraints.txt

Only the standard library is used, so that it runs before anything is installed.
"""

from __future__ import annotations

import configparser
import re
import sys
from pathlib import Path


# Packages whose lower bound is not tested, with the oldest version that is: torch's is what the code uses (setup.cfg),
# and a CPU build of every release is not at hand everywhere.
TESTED_ABOVE = {"torch": "2.13"}
SETUP = Path(__file__).parents[1] / "setup.cfg"
# A name, extras or none, and version specifiers, of which the first is the lower bound.
REQUIREMENT = re.compile(r"^(?P<name>[A-Za-z0-9._-]+)(\[[^]]*\])?>=(?P<version>[0-9][^,; ]*)(,[^; ]+)?$")


def lowest_versions(setup: Path = SETUP) -> dict[str, str]:
    """The lower bound of every package that `setup.cfg` asks for, those of the extras included: name -> version.

    Packages in `TESTED_ABOVE` get the version that stands there.

    Raises:
        ValueError: a requirement has no lower bound, or two of one package differ.
    """
    config = configparser.ConfigParser()
    config.read_string(setup.read_text(encoding="utf-8"))
    package, extras = config["metadata"]["name"], config["options.extras_require"]
    lowest: dict[str, str] = {}
    for line in "\n".join([config["options"]["install_requires"], *extras.values()]).split("\n"):
        if not line or line.startswith(f"{package}["):  # an extra that takes in other extras
            continue
        found = REQUIREMENT.match(line)
        if found is None:
            raise ValueError(f"{setup.name} asks for {line!r} without a lower bound; write it as name>=version.")
        name, version = found["name"], found["version"]
        if lowest.setdefault(name, version) != version:
            raise ValueError(f"{setup.name} has two lower bounds for {name}, {lowest[name]} and {version}; keep one.")
    return lowest | {name: version for name, version in TESTED_ABOVE.items() if name in lowest}


if __name__ == "__main__":
    sys.stdout.writelines(f"{name}=={version}\n" for name, version in lowest_versions().items())
