"""Preparation of raw dumps in every format, compared with an implementation by dictionaries and loops."""

import gzip
import json
import os
import tempfile
from datetime import UTC, datetime
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gflowtrl.data import RAW_FORMATS, Columns, InteractionData, prepare, read_folder, write_folder
from tests.data.raw_files import (
    CATEGORIES,
    LOG,
    TITLES,
    WRITERS,
    Row,
    csv,
    prepared,
    s3rec,
    write,
    write_json_lines,
    write_lines,
)


def test_every_format_is_tested():
    assert {format for format, _ in WRITERS.values()} == set(RAW_FORMATS)


@pytest.mark.parametrize("packed", [False, True], ids=["plain", "gz"])
@pytest.mark.parametrize("case", WRITERS)
def test_all_formats_give_the_same_data(tmp_path, case, packed):
    format, writer = WRITERS[case]
    interactions, items = writer(tmp_path, packed)
    out = tmp_path / "out"
    data, report = prepare(format, interactions, items, out, k_core=2, duplicates="last")

    sequences, repeated = prepared(LOG, k=2, duplicates="last")
    assert sequences == {7: [30, 10, 20], 11: [20, 30, 10]}
    assert dict(zip(data.users, data.sequences, strict=True)) == sequences and data.users == sorted(sequences)
    assert data.items == [10, 20, 30] and report.duplicates == repeated == 2
    if case == "s3rec":
        words = {10: ["attribute_3", "attribute_17"], 20: ["attribute_17"]}
        assert data.item_features == {item: {"attributes": attributes} for item, attributes in words.items()}
        assert report.items_without_metadata == 0 and report.items_without_title == 3
    else:
        assert report.items_without_metadata == report.items_without_title == 0
        assert {item: row["title"] for item, row in data.item_features.items()} == {i: TITLES[i] for i in data.items}
        expected = {item: ", ".join(CATEGORIES[item]) for item in data.items if CATEGORIES[item]}
        assert {i: row["categories"] for i, row in data.item_features.items() if "categories" in row} == expected
    assert read_folder(out) == data
    steps = json.loads((out / "preparation.json").read_text())["steps"]
    assert [step["interactions"] for step in steps] == [9, 7, 6] and steps[-1]["users"] == 2
    assert "2-core" in report.summary()


rows = st.builds(Row, st.integers(0, 5), st.integers(0, 5), st.integers(0, 6), st.integers(1, 5))


@settings(max_examples=150, deadline=None)
@given(
    st.lists(rows, min_size=1, max_size=60),
    st.sampled_from([None, 1, 2, 3]),
    st.sampled_from([None, 3]),
    st.sampled_from(["first", "last", "keep"]),
)
def test_prepare_equals_loops(log, k, min_rating, duplicates):
    expected, repeated = prepared(log, k, min_rating, duplicates)
    with tempfile.TemporaryDirectory() as folder:
        lines = [f"{row.user},{row.item},{row.time},{row.rating}" for row in log]
        path = write_lines(Path(folder) / "log.csv", ["user_id,item_id,timestamp,rating", *lines])
        options = {"k_core": k, "min_rating": min_rating, "duplicates": duplicates}
        if not expected:
            with pytest.raises(ValueError, match="no user or item is left|no interaction with a rating"):
                prepare("csv", path, **options)
            return
        data, report = prepare("csv", path, **options)
    assert dict(zip(data.users, data.sequences, strict=True)) == expected and data.users == sorted(expected)
    assert data.items == sorted({item for items in expected.values() for item in items})
    assert report.duplicates == repeated
    assert report.below_min_rating == (sum(row.rating < 3 for row in log) if min_rating else 0)


def test_custom_columns(tmp_path):
    log = write_lines(tmp_path / "log.tsv", ["who\twhat\twhen", "a\tx\t2014-03-02", "a\ty\t2014-03-01T23:59:00+00:00"])
    items = write_json_lines(tmp_path / "items.jsonl", [{"what": "x", "price": "$1,200.50", "tags": ["a", "b"]}])
    columns = Columns("who", "what", "when")
    data, _ = prepare("csv", log, columns=columns, k_core=None)
    assert (data.users, data.sequences, data.name) == (["a"], [["y", "x"]], "log")
    data, _ = prepare("csv", log, columns=Columns("who", "what", time=None), k_core=None)
    assert data.sequences == [["x", "y"]]

    log = write_json_lines(tmp_path / "log.jsonl", [{"who": "a", "what": "x"}, {"who": "a", "what": 5}])
    data, report = prepare("jsonl", log, items, columns=Columns("who", "what", time=None), k_core=None)
    assert data.sequences == [["x", "5"]] and data.item_features == {"x": {"price": 1200.5, "tags": ["a", "b"]}}
    assert (report.items_without_metadata, report.items_without_title) == (1, 2)


def test_ids_are_whole_numbers_only_if_all_are(tmp_path):
    path = write_lines(tmp_path / "log.csv", ["user_id,item_id", "1,0007", "2,7"])
    data, _ = prepare("csv", path, columns=Columns(time=None), k_core=None)
    assert (data.users, data.items) == ([1, 2], ["0007", "7"])


def test_malformed_lines_are_counted_and_reported(tmp_path):
    good = ["a,x,1,5"] * 500
    bad = ["a,x,1", ",x,1,5", "a,x,noon,5", "a,x,nan,5", "\ufffd,x,1,5"]
    path = write_lines(tmp_path / "log.csv", ["user_id,item_id,timestamp,rating", *good, *bad, "b,x,1,good", ""])
    data, report = prepare("csv", path, k_core=None, max_malformed=0.05)
    assert data.users == ["a", "b"] and (report.lines, report.malformed) == (508, 5)
    assert report.malformed_lines[0] == "line 502: 3 fields for 4 named columns"
    assert "neither text nor" in report.malformed_lines[1] and "noon" in report.malformed_lines[2]
    assert "line 506" in report.malformed_lines[4] and "not text" in report.malformed_lines[4]
    _, report = prepare("csv", path, k_core=None, min_rating=2, max_malformed=0.05)
    assert report.malformed == 6  # with min_rating, an invalid rating counts too
    with pytest.raises(ValueError, match=r"log\.csv: 5 of 508 lines \(1\.0%\) .*max_malformed.*line 502.*Repair"):
        prepare("csv", path, k_core=None, max_malformed=0.005)


def test_malformed_metadata_is_counted(tmp_path):
    log = write_lines(tmp_path / "log.csv", ["user_id,parent_asin,rating,timestamp", "a,B1,5,1", "a,B2,5,2"])
    good = {"parent_asin": "B1", "title": " A &amp;quot;lamp&amp;quot; ", "store": "Lux", "price": "from 9.99", "x": 1}
    lines = [json.dumps(good), json.dumps(good | {"title": "again"}), "{", "[1]", '{"title": "no item"}']
    meta = write_lines(tmp_path / "meta.jsonl", lines)
    with pytest.raises(
        ValueError, match=r"meta\.jsonl: 3 of 5 lines .*line 3: invalid JSON.*'parent_asin' is missing"
    ):
        prepare("amazon-2023", log, meta, k_core=None)
    data, report = prepare("amazon-2023", log, meta, k_core=None, max_malformed=1)
    assert data.item_features == {"B1": {"title": 'A "lamp"', "brand": "Lux", "price": 9.99}}
    assert (report.item_lines, report.malformed_items, report.repeated_items) == (5, 3, 1)
    assert (report.items_without_metadata, report.items_without_title) == (1, 1)


def test_a_literal_is_never_executed(tmp_path):
    log = write_json_lines(tmp_path / "r.json", [{"reviewerID": "a", "asin": "B", "unixReviewTime": 1}])
    meta = write(tmp_path / "m.json", "{'asin': 'B'}\n{'asin': __import__('os').getcwd()}\n{'asin': 'B'\n")
    _, report = prepare("amazon-2014", log, meta, k_core=None, max_malformed=1)
    assert report.malformed_items == 2


@pytest.mark.parametrize(
    ("format", "text", "message"),
    [
        ("amazon-2014", "a,b,c\n", r"raw, line 1 is not .* 'amazon-2014': invalid JSON.* reviewerID.*another format"),
        ("amazon-2018", '{"user_id": 1}\n', "line 1 .*'unixReviewTime' is missing"),
        ("amazon-2023", "A1,B1,5.0,1\n", "line 1 .*header lacks user_id, parent_asin, timestamp, rating; it has A1"),
        ("movielens", "1::2::3\n", "line 1 .*3 fields instead of user, movie, rating and time"),
        ("movielens", "user,movie\n1,2\n", "header lacks userId"),
        ("recbole", "user_id:token\tb:token\n", "header lacks item_id"),
        ("csv", "user_id,item_id\n", "header lacks timestamp.*Columns"),
        ("csv", "user_id,item_id,timestamp\nu,i\n", "line 2 .*2 fields for 3 named columns"),
        ("csv", "user_id,user_id,item_id,timestamp\n", "has a column name twice"),
        ("csv", "", "raw contains no data"),
        ("csv", "user_id,item_id,timestamp\n", "raw contains no data"),
        ("jsonl", '\n["user_id"]\n', "1 of 2 lines .*expected a JSON object"),
        ("s3rec", "lonely\n", "line 1 .*user 'lonely' has no items"),
        ("parquet", "PAR", "raw is not a readable parquet file"),
    ],
)
def test_a_file_in_another_format_is_refused(tmp_path, format, text, message):
    with pytest.raises(ValueError, match=message):
        prepare(format, write(tmp_path / "raw", text), k_core=None)


def test_broken_files(tmp_path):
    path = csv(tmp_path, packed=True)[0]
    path.write_bytes(gzip.compress(b"user_id,item_id,timestamp\n" + b"a,b,1\n" * 9)[:-9])
    with pytest.raises(ValueError, match=r"log\.csv: the gzip data is broken after line .*Download"):
        prepare("csv", path, k_core=None)
    with pytest.raises(FileNotFoundError, match=r"nowhere\.csv is not a file\. Format 'csv' reads a header"):
        prepare("csv", tmp_path / "nowhere.csv")
    with pytest.raises(FileNotFoundError, match=r"is a folder, and 'movielens' needs one of ratings\.csv"):
        prepare("movielens", tmp_path)


def test_a_field_too_long_is_one_malformed_row(tmp_path):
    lines = ["user_id,item_id,timestamp", "a,x,1", f"a,{'y' * 200_000},2", "a,z,3"]
    data, report = prepare("csv", write_lines(tmp_path / "log.csv", lines), k_core=None, max_malformed=0.5)
    assert data.sequences == [["x", "z"]] and report.malformed_lines == [
        "line 3: field larger than field limit (131072)"
    ]


@pytest.mark.parametrize(
    ("end", "last_lost", "malformed"),
    [('"6 inch', 902, 801), ('6"', 902, 801), ("ok", 2001, 1900)],
    ids=["another unbalanced quote", "a quote that ends the field", "no other quote"],
)
def test_lines_that_an_unbalanced_quote_swallows_are_malformed(tmp_path, end, last_lost, malformed):
    notes = {100: '"6 inch', 900: end}
    lines = [f"u{n // 10},i{n % 10},{n},{notes.get(n, 'ok')}" for n in range(2000)]
    path = write_lines(tmp_path / "log.csv", ["user_id,item_id,timestamp,note", *lines])
    with pytest.raises(ValueError, match=f"{malformed:,} of 2,001 lines .*line 102: a quote opens .* to {last_lost} "):
        prepare("csv", path, k_core=None)
    data, report = prepare("csv", path, k_core=None, max_malformed=0.95)
    assert data.num_interactions == 2000 - malformed and (report.lines, report.malformed) == (2001, malformed)
    assert len(report.malformed_lines) == 1


def test_a_quoted_text_of_many_lines_is_valid(tmp_path):
    text = "\n".join(["Salt, pepper, oil", *(f"Step {n}, stir, wait" for n in range(40)), "Serve."])
    rows = ["user_id,item_id,timestamp,note", f'a,x,1,"{text}"', f'a,,2,"{text}"', 'a,y,3,"said ""yes"""']
    data, report = prepare("csv", write_lines(tmp_path / "log.csv", rows), k_core=None, max_malformed=0.6)
    assert data.sequences == [["x", "y"]]
    assert (report.lines, report.malformed) == (86, 42)  # all lines of a malformed row count


def test_parquet_times_of_different_units_form_one_log(tmp_path):
    instants = [datetime(2024, month, 1, 12, tzinfo=UTC) for month in (3, 1, 6, 2, 5, 4)]
    types = [pa.timestamp("ns"), pa.timestamp("us"), pa.timestamp("ms", "Europe/Berlin"), pa.timestamp("s")]
    files = []
    for item, (instant, type) in enumerate(zip(instants, [*types, pa.date32(), pa.date64()], strict=True)):
        times = pa.array([instant.date() if pa.types.is_date(type) else instant, None], type)
        files.append(tmp_path / f"{item}.parquet")
        pq.write_table(pa.table({"user_id": ["u", "u"], "item_id": [item, 9], "timestamp": times}), files[-1])
    table = {"user_id": ["u"], "item_id": [6], "timestamp": ["2024-03-15"]}
    pq.write_table(pa.table(table), tmp_path / "text.parquet")
    data, report = prepare("parquet", [*files, tmp_path / "text.parquet"], k_core=None, max_malformed=0.5)
    assert data.sequences == [[1, 3, 0, 6, 5, 4, 2]] and report.malformed == 6  # the missing times


def test_parquet_dates_and_missing_values(tmp_path):
    table = {"user_id": ["a", None, "a"], "item_id": [1, 2, 3], "timestamp": pa.array([2, 1, 1], pa.date32())}
    pq.write_table(pa.table(table), tmp_path / "log.parquet")
    data, report = prepare("parquet", tmp_path / "log.parquet", k_core=None, max_malformed=0.5)
    assert data.sequences == [[3, 1]] and report.malformed_lines[0].startswith("line 2: the id None is neither text")
    with pytest.raises(ValueError, match="lacks the columns buyer; it has user_id, item_id, timestamp"):
        prepare("parquet", tmp_path / "log.parquet", columns=Columns(user="buyer"))


def test_folders_of_movielens_and_recbole_contain_both_files(tmp_path):
    for case in ("movielens dat", "recbole"):
        format, writer = WRITERS[case]
        writer(tmp_path, packed=False)
        data, report = prepare(format, tmp_path, k_core=2)
        assert data.item_features[30]["title"] == TITLES[30] and len(report.files) == 2
    write(tmp_path / "other.inter", "")
    with pytest.raises(ValueError, match=r"several files \*\.inter \(other\.inter, toy\.inter\)"):
        prepare("recbole", tmp_path)


def test_license_and_source_are_written_to_the_folder(tmp_path):
    path, out = csv(tmp_path, packed=False)[0], tmp_path / "out"
    prepare("csv", path, out=out, k_core=None, license="CC0", source="a toy")
    data, _ = prepare("folder", out, out=tmp_path / "dense", k_core=2, source="a dense toy")
    assert (data.license, data.source) == ("CC0", "a dense toy") and read_folder(tmp_path / "dense") == data


def test_complete_formats_keep_their_semantic_ids(tmp_path):
    format, writer = WRITERS["letter"]
    data, _ = prepare(format, writer(tmp_path, packed=False)[0], k_core=2)
    assert data.semantic_ids == {item: (f"<a_{item}>",) for item in (10, 20, 30)}


def test_items_without_interactions_are_kept_without_a_filter(tmp_path):
    ids = {item: (f"<a_{item}>",) for item in (1, 2, 3, 4)}
    data = InteractionData("toy", [0, 1], [[1, 2], [3, 1]], [1, 2, 3, 4], {4: {"title": "Lamp"}}, ids)
    write_folder(data, tmp_path / "toy")
    again, _ = prepare("folder", tmp_path / "toy", k_core=None)
    assert again == data
    assert prepare("folder", tmp_path / "toy", k_core=1)[0].items == [1, 2, 3]


def test_the_folder_is_written_completely_or_not_at_all(tmp_path, monkeypatch):
    path, out = csv(tmp_path, packed=False)[0], tmp_path / "new" / "out"
    prepare("csv", path, out=out, k_core=None)
    before = sorted(file.name for file in out.iterdir())
    with pytest.raises(FileExistsError, match=r"out is not empty.*overwrite=True \(--overwrite\)"):
        prepare("csv", path, out=out)
    prepare("csv", path, out=out, k_core=2, overwrite=True)
    assert len(read_folder(out).users) == 2

    def broken(data, folder, parquet):
        (folder / "half").touch()
        raise OSError("disk full")

    monkeypatch.setattr("gflowtrl.data.formats.preparation.write_folder", broken)
    with pytest.raises(OSError, match="disk full"):
        prepare("csv", path, out=out, k_core=None, overwrite=True)
    assert sorted(file.name for file in out.iterdir()) == before and len(read_folder(out).users) == 2
    assert [file.name for file in out.parent.iterdir()] == ["out"]
    with pytest.raises(FileExistsError, match="not a data folder, so it is not replaced"):
        prepare("csv", path, out=tmp_path, overwrite=True)
    with pytest.raises(FileExistsError, match=r"log\.csv is a file"):
        prepare("csv", path, out=path, overwrite=True)


def test_a_killed_run_leaves_nothing_in_the_way(tmp_path):
    """Its process may have had the same number, as the first one of a container has."""
    path, out = csv(tmp_path, packed=False)[0], tmp_path / "out"
    first = prepare("csv", path, out=out, k_core=None)[0]
    (out / "item_tokenizer.json").write_text("{}")
    left = tmp_path / f".out.partial-{os.getpid()}"
    left.mkdir()
    (left / "sequences.jsonl").write_text("half")
    out.rename(tmp_path / f".out.old-{os.getpid()}")  # killed between its two renames
    with pytest.raises(FileExistsError, match="out is not empty"):
        prepare("csv", path, out=out, k_core=None)
    assert read_folder(out) == first
    prepare("csv", path, out=out, k_core=None, overwrite=True)
    assert (out / "item_tokenizer.json").read_text() == "{}"
    assert not list(tmp_path.glob(".out*"))


@pytest.mark.parametrize(
    ("format", "options", "message"),
    [
        ("excel", {}, "no format 'excel'. Choose one of amazon-2014"),
        ("letter", {"items": "x"}, "has no items file"),
        ("s3rec", {"min_rating": 3}, "has no ratings"),
        ("letter", {"min_rating": 3}, "has no ratings"),
        ("recbole", {"columns": Columns()}, "columns of format 'recbole' are fixed"),
        ("s3rec", {"k_core": 0}, "k_core is 0; it must be a whole number of at least 1 or None"),
        ("s3rec", {"duplicates": "none"}, "duplicates is 'none'; choose 'first' or 'last' or 'keep'"),
        ("s3rec", {"max_malformed": 5}, "max_malformed is 5; it must be a number in"),
        ("s3rec", {"k_core": 9}, "has no 9-core"),
    ],
)
def test_errors_name_bad_arguments(tmp_path, format, options, message):
    with pytest.raises(ValueError, match=message):
        prepare(format, s3rec(tmp_path, packed=False)[0], **options)
