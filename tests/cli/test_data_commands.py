"""`gflowtrl prepare` and `gflowtrl tokenize`: from a raw dump to data that a recipe can train on."""

import gzip
import json
from pathlib import Path

import pytest

from gflowtrl.catalog import ItemCatalog
from gflowtrl.cli import main
from gflowtrl.data import SyntheticShop, build_tokenizer, read_interactions
from gflowtrl.semantic_ids import ItemTokenizer


@pytest.fixture(scope="module")
def dump(tmp_path_factory) -> Path:
    """Reviews and metadata as Amazon's of 2014 are, of a synthetic shop, with a malformed line each."""
    root = tmp_path_factory.mktemp("dump")
    data = SyntheticShop(
        n_users=150, n_items=60, departments=3, shelves=4, interests=3, min_users_shown=40
    ).generate()[0]
    reviews, time = ["{broken"], 1_400_000_000
    for user, sequence in zip(data.users, data.sequences, strict=True):
        for item in sequence:
            time += 86_400
            row = {"reviewerID": f"U{user}", "asin": f"B{item:03}", "unixReviewTime": time, "overall": 4.0}
            reviews.append(json.dumps(row))
    reviews[0], reviews[1] = reviews[1], reviews[0]  # a broken first line would mean another format
    metas = [repr({"asin": f"B{i:03}", **data.item_features[i], "brand": "x &amp; y"}) for i in data.items]
    for name, lines in (("reviews", reviews), ("meta", metas)):
        with gzip.open(root / f"{name}.json.gz", "wt") as file:
            file.write("\n".join(lines) + "\n")
    (root / "count").write_text(str(len(reviews) - 1))
    return root


@pytest.fixture(scope="module")
def prepared(dump) -> Path:
    files = ["--reviews", str(dump / "reviews.json.gz"), "--meta", str(dump / "meta.json.gz")]
    assert main(["prepare", "--format", "amazon-2014", *files, "--out", str(dump / "data"), "--k_core", "3"]) == 0
    words = ["--data_dir", str(dump / "data"), "--levels", "2", "--codes", "16"]
    assert main(["tokenize", *words]) == 0
    return dump / "data"


def test_a_dump_becomes_data_with_ids(prepared, dump):
    data = read_interactions(prepared)
    report = json.loads((prepared / "preparation.json").read_text())
    assert report["malformed"] == 1 and report["lines"] == int((dump / "count").read_text()) + 1
    assert all(
        data.item_features[item]["brand"] == "x & y" and data.item_features[item]["title"] for item in data.items
    )
    assert len(set(data.semantic_ids.values())) == len(data.items)  # no two share one
    assert all(len(ids) == 2 for ids in data.semantic_ids.values())
    catalog = ItemCatalog.from_semantic_ids(data.semantic_ids, build_tokenizer(data.semantic_ids))
    assert catalog.tree.num_leaves == len(data.items)


def test_new_items_get_ids_and_old_ones_keep_theirs(prepared, capsys):
    before = read_interactions(prepared).semantic_ids
    twin = read_interactions(prepared).item_features["B001"]
    with (prepared / "items.jsonl").open("a") as file:
        file.write(json.dumps({"item": "C001", **twin}) + "\n")
    with (prepared / "sequences.jsonl").open("a") as file:
        file.write(json.dumps({"user": "newcomer", "items": ["C001", "B001", "C001"]}) + "\n")
    assert main(["tokenize", "--data_dir", str(prepared), "--add", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"new_items": 1}
    after = read_interactions(prepared).semantic_ids
    assert {item: ids for item, ids in after.items() if item != "C001"} == before
    assert after["C001"] not in before.values() and after["C001"][0] == before["B001"][0]  # the same text, so near it
    assert ItemTokenizer.from_pretrained(prepared / "item_tokenizer").semantic_ids == after


@pytest.mark.parametrize(
    "options", [["--collaborative", "1"], ["--collaborative", "0.5"], ["--quantizer", "balanced"]]
)
def test_other_ways_to_ids(prepared, options, capsys):
    words = ["tokenize", "--data_dir", str(prepared), "--levels", "2", "--codes", "16", "--overwrite", "--json"]
    assert main([*words, *options]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["colliding_items"] == 0 and report["items"] == len(read_interactions(prepared).items)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["prepare"], "--out is missing"),
        (["prepare", "--out", "x"], "--format is missing. Formats are amazon-2014"),
        (["prepare", "--out", "x", "--format", "amazon", "--reviews", "r"], "There is no format 'amazon'"),
        (["prepare", "--out", "x", "--format", "csv", "--reviews", "nowhere.csv"], "nowhere.csv is no file"),
        (["prepare", "--out", "x", "--download", "ml-1m", "--format", "csv"], "leave --format and the files out"),
        (["tokenize"], "--data_dir is missing"),
        (["tokenize", "--data_dir", "DATA"], "semantic_ids.json is there. Use --add"),
        (["tokenize", "--data_dir", "DATA", "--overwrite", "--collaborative", "2"], "a share from 0 to 1"),
        (["tokenize", "--data_dir", "DATA", "--overwrite", "--codes", "500"], "500"),
        (["tokenize", "--data_dir", "DATA", "--overwrite", "--features", "colour"], "colour; known are"),
    ],
)
def test_mistakes_are_one_line(prepared, words, message, capsys):
    before = (prepared / "semantic_ids.json").read_text()
    assert main([str(prepared) if word == "DATA" else word for word in words]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and message in error, error
    assert (prepared / "semantic_ids.json").read_text() == before
