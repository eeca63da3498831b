"""`gflowtrl catalog`: items are added to a saved recommender and retired from it, in a new folder."""

import json
import re
import shutil
from pathlib import Path

import pytest

from gflowtrl import Recommender
from gflowtrl.cli import main
from tests.test_catalog_change import (
    FEATURES,
    assert_equal_probabilities,
    make_item_tokenizer,
    make_recommender,
    probabilities,
)


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    make_recommender().save_pretrained(folder)
    (folder / "README.md").write_text("The card.\n")
    (folder / "optimizer.pt").write_text("of the training")
    return folder


def lines(file: Path, rows: list[dict]) -> str:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(file)


def content(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


NEW = [{"item": 100, "title": "red ink", "price": 3}, {"item": 101, "title": "green lamp", "categories": [["x"]]}]


def test_added_items_are_those_of_python_in_a_new_folder(model, tmp_path, capsys):
    before, file, out = content(model), lines(tmp_path / "new.jsonl", NEW), tmp_path / "larger"
    words = ["catalog", "add", "--model", str(model), "--items", file, "--output", str(out), "--json"]
    assert main(words) == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["added"], report["items"], report["version"], report["new_tokens"]) == (2, 42, 2, 0)
    changed = Recommender.from_pretrained(out)
    features = {row["item"]: row for row in NEW}
    expected = Recommender.from_pretrained(model).add_items(features)
    assert changed.catalog.semantic_ids == expected.catalog.semantic_ids and changed.titles[100] == "red ink"
    assert_equal_probabilities(probabilities(changed), probabilities(expected))
    assert content(model) == before
    written = content(out)
    assert written["model.safetensors"] == before["model.safetensors"] and written["README.md"] == b"The card.\n"
    assert written.keys() == before.keys() - {"optimizer.pt"}
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


@pytest.mark.parametrize("given", ["words", "list", "lines"])
def test_items_are_retired(model, tmp_path, capsys, given):
    if given == "list":
        (tmp_path / "gone.json").write_text("[3, 39]")
        items = [str(tmp_path / "gone.json")]
    else:
        items = ["3", "39"] if given == "words" else [lines(tmp_path / "x.jsonl", [{"item": 3}, {"item": 39}])]
    out = tmp_path / "smaller"
    assert main(["catalog", "retire", "--model", str(model), "--items", *items, "--output", str(out)]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("0 items added, 0 restored, 2 retired: 38 items can be recommended (version 2")
    changed = Recommender.from_pretrained(out)
    assert changed.catalog.items == [item for item in FEATURES if item not in (3, 39)]
    assert_equal_probabilities(
        probabilities(changed), probabilities(Recommender.from_pretrained(model).retire_items([3, 39]))
    )


def test_new_tokens_and_the_item_tokenizer_are_saved(tmp_path, capsys):
    recommender, out = make_recommender(make_item_tokenizer("level")), tmp_path / "out"
    item_tokenizer, recommender._item_tokenizer = recommender.item_tokenizer, None
    recommender.save_pretrained(tmp_path / "in")
    item_tokenizer.save_pretrained(tmp_path / "ids")
    new = {100 + n: {"title": "red ink"} for n in range(20)}  # more with one id than before
    file = lines(tmp_path / "new.jsonl", [{"item": item, **row} for item, row in new.items()])
    words = ["catalog", "add", "--model", str(tmp_path / "in"), "--items", file, "--output", str(out)]
    assert main(words) == 2 and "has no semantic_id" in capsys.readouterr().err and not out.exists()
    assert main([*words, "--semantic_ids", str(tmp_path / "ids"), "--json"]) == 0
    new_tokens = json.loads(capsys.readouterr().out)["new_tokens"]
    assert new_tokens > 0
    changed = Recommender.from_pretrained(out)
    assert len(changed.tokenizer) == len(recommender.tokenizer) + new_tokens
    assert changed.model.get_input_embeddings().num_embeddings == len(changed.tokenizer)
    assert len(changed.item_tokenizer.items) == 60
    recommender.set_item_tokenizer(item_tokenizer)
    expected = recommender.add_items(new)
    assert_equal_probabilities(probabilities(changed), probabilities(expected))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["add", "--items", "none.jsonl"], "There is no file none.jsonl"),
        (["add", "--items", "a.jsonl", "b.jsonl"], "--items has several files"),
        (["add", "--items", "known.jsonl"], "Item 3 is in the catalog already"),
        (["add", "--items", "broken.jsonl"], "broken.jsonl, line 2: invalid JSON"),
        (["add", "--items", "twice.jsonl"], "twice.jsonl, line 2: item 100 is on an earlier line already"),
        (["add", "--items", "empty.jsonl"], "empty.jsonl has no items"),
        (["add", "--items", "known.jsonl", "--semantic_ids", "none"], "There is no folder none"),
        (["retire", "--items", "none.json"], "There is no file none.json"),
        (["retire", "--items", "bad.json"], "bad.json must hold a JSON list of items"),
        (["retire", "--items", "3", "lamp"], "--items is 3 lamp, but the items of .* are whole numbers, such as 0"),
        (["retire", "--items", "99"], "Item 99 cannot be retired, because it is not in the catalog"),
        (["retire", "--items", "3", "--output", "full"], "full exists and is not an empty folder"),
        (["sell", "--items", "3"], "invalid choice: 'sell'"),
    ],
)
def test_mistakes_are_one_line_and_nothing_is_written(words, message, model, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    lines(Path("known.jsonl"), [{"item": 3, "title": "x"}])
    lines(Path("twice.jsonl"), [NEW[0], NEW[0]])
    Path("broken.jsonl").write_text('{"item": 100, "title": "x"}\n{"item"\n')
    Path("empty.jsonl").write_text("")
    Path("bad.json").write_text('{"items": [3]}')
    Path("full").mkdir()
    Path("full", "file").write_text("x")
    before = sorted(path.name for path in tmp_path.iterdir())
    output = [] if "--output" in words else ["--output", "out"]
    assert main(["catalog", *words, "--model", str(model), *output]) == 2
    *others, error = capsys.readouterr().err.split("error: ")
    assert not [line for part in others for line in part.splitlines() if line and "Loading weights" not in line]
    assert error.count("\n") == 1
    assert re.search(message, error), error
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_the_new_folder_is_not_inside_the_old_one(model, tmp_path, capsys, monkeypatch):
    before = sorted(model.rglob("*"))
    (tmp_path / "link").symlink_to(model)
    monkeypatch.chdir(model)
    for place, out in ((model, "new/one"), (".", "one"), (tmp_path / "link", model / "one")):
        assert main(["catalog", "retire", "--model", str(place), "--items", "3", "--output", str(out)]) == 2
        assert "one is in the folder of the model, which is copied" in capsys.readouterr().err
    assert sorted(model.rglob("*")) == before


def test_a_failed_write_leaves_no_folder(model, tmp_path, capsys, monkeypatch):
    def fail(*_, **__):
        raise OSError(28, "No space left on device", str(tmp_path))

    monkeypatch.setattr(shutil, "copytree", fail)
    words = ["catalog", "retire", "--model", str(model), "--items", "3", "--output", str(tmp_path / "out")]
    assert main(words) == 2 and "No space left" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
