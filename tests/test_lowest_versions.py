"""`make test-lowest` installs exactly the lower bounds of setup.cfg."""

from __future__ import annotations

import configparser
import subprocess
import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version


ROOT = Path(__file__).parents[1]
TOOL = ROOT / "tools" / "lowest_versions.py"


def setup_cfg(folder: Path, requirements: str, extra: str = "numpy>=2") -> list[str]:
    """Write the tool and a setup.cfg to a folder, and return the command that runs the tool."""
    (folder / "tools").mkdir()
    (folder / "tools" / TOOL.name).write_text(TOOL.read_text())
    (folder / "setup.cfg").write_text(
        f"[metadata]\nname = shop\n[options]\ninstall_requires =\n    # why\n    {requirements}\n"
        f"[options.extras_require]\nserve =\n    {extra}\ntest =\n    shop[serve]\n"
    )
    return [sys.executable, str(folder / "tools" / TOOL.name)]


def test_every_requirement_is_pinned_to_the_lowest_version_that_it_allows():
    printed = subprocess.run([sys.executable, TOOL], check=True, capture_output=True, text=True).stdout
    constraints = {pin.name: pin for pin in map(Requirement, printed.splitlines())}
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    lines = [config["options"]["install_requires"], *config["options.extras_require"].values()]
    requirements = [Requirement(line) for line in "\n".join(lines).splitlines() if line]
    requirements = [requirement for requirement in requirements if requirement.name != "gflowtrl"]
    assert constraints.keys() == {requirement.name for requirement in requirements}
    for requirement in requirements:
        (pin,) = constraints[requirement.name].specifier
        assert pin.operator == "=="
        assert pin.version in requirement.specifier
        if requirement.name == "torch":  # tested from a higher version on than setup.cfg allows
            assert Version(pin.version) == Version("2.13")
            continue
        lower = [Version(part.version) for part in requirement.specifier if part.operator == ">="]
        assert lower == [Version(pin.version)], requirement


def test_upper_bounds_and_extras(tmp_path):
    command = setup_cfg(tmp_path, "trl>=1.2,<2\n    uvicorn[standard]>=0.38")
    assert subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines() == [
        "trl==1.2", "uvicorn==0.38", "numpy==2"
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("requirement", "message"),
    [
        ("rich", "requires 'rich' without a lower bound"),
        ("rich<15", "requires 'rich<15' without a lower bound"),
        ("numpy>=2.2", "two lower bounds for numpy, 2.2 and 2"),
    ],
)
def test_invalid_requirements_are_refused(tmp_path, requirement, message):
    failed = subprocess.run(setup_cfg(tmp_path, requirement), capture_output=True, text=True)
    assert failed.returncode == 1 and message in failed.stderr
