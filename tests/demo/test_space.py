"""The folder of a Space."""

import ast
import json
import re
import sys
from importlib.metadata import PackageNotFoundError

import pytest
import torch
import yaml

import gflowtrl
from gflowtrl import Recommender
from gflowtrl.cli import main
from gflowtrl.demo import space, write_space
from gflowtrl.demo.run_reward import read_run_reward
from gflowtrl.demo.space import model_name
from tests.demo.world import HISTORY, make_recommender, write_stage


@pytest.fixture(autouse=True)
def gradio_version(monkeypatch):
    monkeypatch.setattr(space, "version", lambda name: {"gradio": "6.1.2"}[name])


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """The model of a stage, with files that belong to its training."""
    folder = write_stage(tmp_path_factory.mktemp("run") / "gflownet-0123abcd")
    make_recommender().save_pretrained(folder)
    (folder / "optimizer.pt").write_bytes(b"not for others")
    (folder / "README.md").write_text("---\nlicense: apache-2.0\nlibrary_name: gflowtrl\n---\n\n# A model\n")
    return folder


def test_the_space_has_the_same_recommender_and_reward(model, tmp_path):
    folder = write_space(model, tmp_path / "new" / "space")
    assert {path.name for path in folder.iterdir()} == {
        "app.py", "requirements.txt", "README.md", "model", "inputs.json", "done.json"
    }  # fmt: skip
    assert not list(folder.rglob("*.pt")) and [path.name for path in folder.parent.iterdir()] == ["space"]
    first, second = Recommender.from_pretrained(model), Recommender.from_pretrained(folder / "model")
    assert second.recommend([HISTORY]) == first.recommend([HISTORY])
    assert second.explain(HISTORY, "twin") == first.explain(HISTORY, "twin")
    nodes = torch.arange(first.catalog.tree.num_nodes)
    targets = [read_run_reward(*pair).of(HISTORY)(nodes) for pair in ((model, first), (folder / "model", second))]
    assert torch.equal(*targets)


def test_the_readme_has_the_header_of_a_space(model, tmp_path):
    folder = write_space(model, tmp_path / "space", title="Lamps: a demo")
    _, header, text = (folder / "README.md").read_text().split("---\n", 2)
    fields = yaml.safe_load(header)
    expected = {"title": "Lamps: a demo", "sdk": "gradio", "sdk_version": "6.1.2", "app_file": "app.py"}
    assert fields.items() >= (expected | {"license": "apache-2.0"}).items()
    assert {"emoji", "colorFrom", "colorTo", "python_version"} <= fields.keys()
    assert text.startswith("\n# Lamps: a demo\n") and "24 items" in text


def test_the_app_runs_the_demo_of_the_model_next_to_it(model, tmp_path, monkeypatch):
    folder = write_space(model, tmp_path / "space")
    arguments = []
    monkeypatch.setitem(vars(gflowtrl.demo), "run_demo", lambda *given, **options: arguments.extend([*given, options]))
    code = compile(ast.parse((folder / "app.py").read_text()), "app.py", "exec")
    exec(code, {"__name__": "__main__", "__file__": str(folder / "app.py")})
    assert arguments == [folder / "model", {"title": model_name(model)}]


@pytest.mark.parametrize("requirement", [None, "gflowtrl[demo] @ git+https://example.org/gflowtrl"])
def test_the_requirement_is_this_release_or_the_given_one(model, tmp_path, requirement):
    lines = (
        (write_space(model, tmp_path / "space", requirement=requirement) / "requirements.txt").read_text().split("\n")
    )
    assert lines[-2:] == [requirement or f"gflowtrl[demo]=={gflowtrl.__version__}", ""]


def test_a_recommender_alone_has_neither_reward_nor_license(tmp_path):
    make_recommender(teacher=None).save_pretrained(tmp_path / "alone")
    folder = write_space(tmp_path / "alone", tmp_path / "space")
    assert not (folder / "inputs.json").exists() and "license" not in (folder / "README.md").read_text()


def test_the_title_does_not_tell_where_the_model_is(model, tmp_path, monkeypatch):
    whole = tmp_path / "private" / "shop"
    make_recommender().save_pretrained(whole)
    monkeypatch.chdir(whole)
    places = {model: "gflownet-0123abcd", whole: "shop", ".": "shop", "../shop": "shop"}
    for number, (place, title) in enumerate(places.items()):
        text = (write_space(place, tmp_path / f"space{number}") / "README.md").read_text()
        assert f"\n# {title}\n" in text and "private" not in text
    assert model_name("user/shop") == "user/shop"  # on the Hub


def to_space(model, out) -> int:
    return main(["export", "--to", "space", "--model", str(model), "--output", str(out)])


def test_the_command_writes_the_folder(model, tmp_path, capsys):
    assert to_space(model, tmp_path / "shop") == 0
    printed = capsys.readouterr().out
    assert "files for space written to" in printed and f"python {tmp_path / 'shop' / 'app.py'}" in printed
    names = {path.name for path in (tmp_path / "shop").iterdir()}
    assert names == {"app.py", "requirements.txt", "README.md", "model", "inputs.json", "done.json"}  # with the reward


def test_an_existing_folder_is_refused_before_the_model_is_loaded(tmp_path, capsys):
    (tmp_path / "space").mkdir()
    (tmp_path / "space" / "file").touch()
    assert to_space(tmp_path / "no model", tmp_path / "space") == 2
    assert re.fullmatch(r"error: \S+/space exists and is not an empty folder\..*\n", capsys.readouterr().err)


def test_a_damaged_model_leaves_no_folder(model, tmp_path, capsys):
    place = write_stage(tmp_path / "run")
    make_recommender().save_pretrained(place)
    (tmp_path / "run" / "done.json").write_text(json.dumps({"reward_weights": [1.0]}))
    assert to_space(place, tmp_path / "space") == 2
    error = capsys.readouterr().err.splitlines()[-1]  # after progress bars of the library
    assert error.startswith("error: ") and "done.json (it has 3 rewards and 1 reward_weights). Repair" in error
    assert not (tmp_path / "space").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--to", "csr", "--title", "A"], "error: --title and --requirement are used with --to space only."),
        (["--to", "space"], "error: /nowhere/at/all is not a folder; give the folder of a saved recommender"),
    ],
)
def test_mistakes_are_one_line(arguments, message, capsys):
    assert main(["export", "--model", "/nowhere/at/all", "--output", "x", *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith(message) and error.count("\n") == 1


@pytest.mark.parametrize("command", ["demo", "export"])
def test_without_gradio_the_remedy_is_named(model, tmp_path, monkeypatch, capsys, command):
    def missing(name):
        raise PackageNotFoundError(name)

    monkeypatch.setattr(space, "version", missing)
    monkeypatch.setitem(sys.modules, "gradio", None)
    monkeypatch.delitem(sys.modules, "gflowtrl.demo.page", raising=False)
    given = [] if command == "demo" else ["--to", "space", "--output", str(tmp_path / "space")]
    assert main([command, "--model", str(model), *given]) == 2
    assert capsys.readouterr().err == "error: The demo needs gradio. Run: pip install gflowtrl[demo]\n"
