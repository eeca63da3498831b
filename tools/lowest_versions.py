"""Print the lower bounds of setup.cfg as pip constraints. `make test-lowest` installs exactly these versions.

    python tools/lowest_versions.py > constraints.txt

It needs only the standard library, because it runs before anything is installed.
"""

from __future__ import annotations

import configparser
import re
import sys
from pathlib import Path


# Packages whose lower bound is not tested -> the lowest tested version. torch's bound follows from the features that
# the code uses (setup.cfg), but CPU builds of old releases are not available everywhere.
TESTED_ABOVE = {"torch": "2.13"}
SETUP = Path(__file__).parents[1] / "setup.cfg"
# A name, optional extras, a lower bound and optional further version specifiers.
REQUIREMENT = re.compile(r"^(?P<name>[A-Za-z0-9._-]+)(\[[^]]*\])?>=(?P<version>[0-9][^,; ]*)(,[^; ]+)?$")


def lowest_versions(setup: Path = SETUP) -> dict[str, str]:
    """Return the lower bound of every package that `setup.cfg` requires, including extras: name -> version.

    Packages in `TESTED_ABOVE` have the version given there.

    Raises:
        ValueError: a requirement has no lower bound, or a package has two different ones.
    """
    config = configparser.ConfigParser()
    config.read_string(setup.read_text(encoding="utf-8"))
    package, extras = config["metadata"]["name"], config["options.extras_require"]
    lowest: dict[str, str] = {}
    for line in "\n".join([config["options"]["install_requires"], *extras.values()]).split("\n"):
        if not line or line.startswith(f"{package}["):  # an extra that includes other extras
            continue
        match = REQUIREMENT.match(line)
        if match is None:
            raise ValueError(f"{setup.name} requires {line!r} without a lower bound; write it as name>=version.")
        name, version = match["name"], match["version"]
        if lowest.setdefault(name, version) != version:
            raise ValueError(f"{setup.name} has two lower bounds for {name}, {lowest[name]} and {version}; keep one.")
    return lowest | {name: version for name, version in TESTED_ABOVE.items() if name in lowest}


if __name__ == "__main__":
    sys.stdout.writelines(f"{name}=={version}\n" for name, version in lowest_versions().items())
