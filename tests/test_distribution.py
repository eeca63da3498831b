"""The distributions: a complete source archive, and a wheel that works without the source tree."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from email import message_from_bytes
from pathlib import Path

import pytest
import yaml

import gflowtrl
from gflowtrl.configuration import known_files, recipe_folder


ROOT = Path(__file__).parents[1]
FOLDERS = ("gflowtrl", "recipes", "tests", "docs", "examples", "benchmarks", "tools")
FILES = (
    "CITATION.cff",
    "LICENSE",
    "README.md",
    "CHANGELOG.md",
    "CONTRIBUTING.md",
    "Makefile",
    "MANIFEST.in",
    "setup.cfg",
    "pyproject.toml",
)
NAME = f"gflowtrl-{gflowtrl.__version__}"

if not (ROOT / "MANIFEST.in").is_file():
    pytest.skip("there is no source tree to build from", allow_module_level=True)


def build(kind: str, tree: Path, folder: Path) -> Path:
    """Build the "sdist" or "wheel" of a source tree with the installed setuptools, as pip and build do."""
    folder.mkdir()
    code = f"from setuptools import build_meta; build_meta.build_{kind}({str(folder)!r})"
    built = subprocess.run([sys.executable, "-c", code], cwd=tree, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr[-3000:]
    (file,) = folder.iterdir()
    return file


@pytest.fixture(scope="module")
def tree(tmp_path_factory) -> Path:
    """A copy of the source tree without caches and build outputs."""
    copy = tmp_path_factory.mktemp("tree")
    for folder in FOLDERS:
        shutil.copytree(
            ROOT / folder, copy / folder, ignore=shutil.ignore_patterns("__pycache__", "*.py[cod]", ".*", "_build")
        )
    for file in FILES:
        shutil.copy(ROOT / file, copy)
    return copy


@pytest.fixture(scope="module")
def archive(tree, tmp_path_factory) -> Path:
    """The source archive, unpacked."""
    folder = tmp_path_factory.mktemp("sdist")
    with tarfile.open(build("sdist", tree, folder / "dist")) as packed:
        packed.extractall(folder, filter="data")
    return folder / NAME


@pytest.fixture(scope="module")
def wheel(archive, tmp_path_factory) -> Path:
    """The wheel that pip builds from the source archive."""
    return build("wheel", archive, tmp_path_factory.mktemp("wheel") / "dist")


def where(folder: Path) -> dict[str, str]:
    """An environment in which `folder` comes before everything that is installed."""
    return os.environ | {"PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1"}


def contents(wheel: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(wheel) as packed:
        return {name: packed.read(name) for name in packed.namelist()}


def test_the_source_archive_holds_the_whole_tree(tree, archive):
    ours = {path.relative_to(tree) for path in tree.rglob("*") if path.is_file()}
    ours = {path for path in ours if "egg-info" not in path.parts[0]}  # setuptools has written it into the tree
    assert len(ours) > 300
    missing = sorted(map(str, ours - {path.relative_to(archive) for path in archive.rglob("*")}))
    assert not missing, f"MANIFEST.in leaves out {missing[:5]}"


def test_the_source_archive_makes_the_same_wheel_as_the_tree(tree, wheel, tmp_path):
    assert contents(build("wheel", tree, tmp_path / "dist")) == contents(wheel)


def recipe_folder_of(package: Path) -> Path:
    """The result of `recipe_folder` in another copy of the package."""
    file = package / "configuration.py"
    spec = importlib.util.spec_from_file_location("configuration_elsewhere", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.recipe_folder()


def test_recipes_are_found_in_the_source_tree_and_in_an_unpacked_wheel(wheel, tmp_path):
    with zipfile.ZipFile(wheel) as packed:
        packed.extractall(tmp_path)
    folder = recipe_folder_of(tmp_path / "gflowtrl")
    assert folder == tmp_path / "gflowtrl" / "recipes" and recipe_folder().resolve() == ROOT / "recipes"
    for inner in ("", "accelerate_configs"):
        names = {path.stem for path in (ROOT / "recipes" / inner).glob("*.yaml")}
        assert names >= {"quickstart"} if not inner else names >= {"single", "multi_cpu", "zero3", "fsdp2"}
        assert names == known_files(folder / inner).keys() == known_files(recipe_folder() / inner).keys()


def test_a_checkout_without_symbolic_links_has_its_recipes(tree, tmp_path):
    copy = shutil.copytree(tree / "gflowtrl", tmp_path / "gflowtrl", ignore=shutil.ignore_patterns("recipes"))
    (copy / "recipes").write_text("../recipes")  # what git makes of a link there
    assert recipe_folder_of(copy) == tmp_path / "recipes"


def test_the_version_and_its_date_are_the_same_in_all_files():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    latest = re.search(r"^## (\S+) \((\S+)\)$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert (citation["version"], str(citation["date-released"])) == latest.groups()
    assert citation["version"] == gflowtrl.__version__


def test_the_wheel_holds_the_package_its_license_and_its_recipes(wheel):
    packed = contents(wheel)
    modules = {str(path.relative_to(ROOT)) for path in (ROOT / "gflowtrl").rglob("*.py")}
    recipes = {str(path.relative_to(ROOT)) for path in (ROOT / "recipes").rglob("*.yaml")}
    about = f"{NAME}.dist-info"
    modules |= {"gflowtrl/py.typed", "gflowtrl/trainer/model_card.jinja"}
    expected = modules | {f"gflowtrl/{recipe}" for recipe in recipes} | {f"{about}/licenses/LICENSE"}
    assert {name for name in packed if not name.startswith(about) or name.endswith("LICENSE")} == expected
    metadata = message_from_bytes(packed[f"{about}/METADATA"])
    assert metadata["Version"] == gflowtrl.__version__
    assert metadata["License"] == "Apache-2.0"
    assert metadata.get_payload().startswith("# gflowtrl")  # the page of the package index


@pytest.mark.slow
def test_the_wheel_works_without_the_source_tree(wheel, tmp_path):
    target, elsewhere = tmp_path / "installed", tmp_path / "elsewhere"
    elsewhere.mkdir()
    install = ["install", "--quiet", "--no-deps", "--no-index", "--target", target, wheel]
    subprocess.run([sys.executable, "-m", "pip", *install], check=True)

    def run(*command: str | Path) -> str:
        ran = subprocess.run(command, cwd=elsewhere, env=where(target), capture_output=True, text=True, timeout=300)
        assert ran.returncode == 0, ran.stderr[-3000:]
        return ran.stdout

    used = run(sys.executable, "-c", "import gflowtrl; print(gflowtrl.__file__)")
    assert Path(used.strip()).is_relative_to(target)
    assert run(target / "bin" / "gflowtrl", "--version").strip() == gflowtrl.__version__
    usage = run(target / "bin" / "gflowtrl", "--help")
    assert usage.startswith("usage: gflowtrl") and usage == run(sys.executable, "-m", "gflowtrl", "--help")
    few = {
        "output_dir": "out", "teacher.epochs": 1, "data.shop.n_users": 200, "sft.max_steps": 2,
        "control.max_steps": 2, "gflownet.max_steps": 2, "evaluation.num_beams": 20,
    }  # fmt: skip
    options = [word for name, value in few.items() for word in (f"--{name}", str(value))]
    run(target / "bin" / "gflowtrl", "train", "--config", "quickstart", "--accelerate_config", "single", *options)
    assert {"sft", "gflownet"} <= json.loads((elsewhere / "out" / "results.json").read_text())["methods"].keys()
    (model,) = elsewhere.glob("out/gflownet*/model")
    (elsewhere / "histories.jsonl").write_text('{"history": [1, 2, 3]}\n')
    answer = json.loads(run(target / "bin" / "gflowtrl", "recommend", "--model", model, "--input", "histories.jsonl"))
    assert answer["history"] == [1, 2, 3] and len(answer["recommendations"]) == 10
