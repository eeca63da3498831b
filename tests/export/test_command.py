"""`gflowtrl export`: whole folders or none, and mistakes in one line."""

import json
import sys

import pytest

from gflowtrl.cli import main
from gflowtrl.export import TARGETS, export, targets
from tests.export.shop import make_recommender


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("export")
    make_recommender().save_pretrained(folder)
    return folder


def run(model, target, output) -> int:
    return main(["export", "--model", str(model), "--to", target, "--output", str(output)])


def test_an_empty_folder_is_filled(model, tmp_path, capsys):
    (tmp_path / "out").mkdir()
    assert main(["export", "--model", str(model), "--to", "csr", "--output", str(tmp_path / "out"), "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["target"] == "csr" and "child_offsets.npy" in printed["files"]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == printed["files"]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_all_may_read_the_files(model, tmp_path):
    usual = tmp_path / "usual"
    usual.touch()
    files = [path for path in export(model, "vllm", tmp_path / "out").rglob("*") if path.is_file()]
    assert {path.stat().st_mode for path in files} == {usual.stat().st_mode}


def test_an_export_is_not_a_recommender(model, tmp_path, capsys):
    assert run(model, "csr", tmp_path / "csr") == 0
    assert run(tmp_path / "csr", "csr", tmp_path / "out") == 2
    assert "is of an export to another engine. Give the folder of the recommender itself." in capsys.readouterr().err


def test_a_folder_with_files_is_left_alone(model, tmp_path, capsys):
    (tmp_path / "file").write_text("x")
    for output in (tmp_path, tmp_path / "file"):
        assert run(model, "csr", output) == 2
        assert capsys.readouterr().err == f"error: {output} exists and is not an empty folder. Choose a new folder.\n"
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_nothing_is_written_if_the_export_fails(model, tmp_path, monkeypatch, capsys):
    def fail(recommender, folder):
        (folder / "half").write_text("x")
        raise ValueError("It does not fit.")

    monkeypatch.setattr("gflowtrl.export.arrays.write", fail)
    assert run(model, "csr", tmp_path / "out") == 2
    assert capsys.readouterr().err.endswith("error: It does not fit.\n") and not list(tmp_path.iterdir())


def test_mistakes_are_found_before_the_model_is_loaded(tmp_path, monkeypatch, capsys):
    assert run("nowhere", "tensorflow", tmp_path / "out") == 2
    assert "invalid choice: 'tensorflow' (choose from " in capsys.readouterr().err
    with pytest.raises(ValueError, match="There is no export to 'tensorflow'; choose csr, onnx, vllm."):
        export("nowhere", "tensorflow", tmp_path / "out")
    monkeypatch.setattr(targets, "find_spec", lambda name: None)
    assert run("nowhere", "onnx", tmp_path / "out") == 2
    assert "This export needs onnx. Run: pip install gflowtrl[onnx]" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "gflowtrl.recommender", None)
    assert run(tmp_path / "nowhere", "csr", tmp_path / "out") == 2
    assert "nowhere" in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_every_target_is_described_in_the_help(capsys):
    with pytest.raises(SystemExit):
        main(["export", "--help"])
    printed = " ".join(capsys.readouterr().out.split())
    assert all(f"{name}: {target.description}" in printed for name, target in TARGETS.items())
