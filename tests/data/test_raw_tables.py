"""Tables without a header, title columns, and several files."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gflowtrl.data import Columns, prepare
from tests.data.raw_files import (
    CATEGORIES,
    LOG,
    TITLES,
    WRITERS,
    Row,
    prepared,
    write,
    write_json_lines,
    write_lines,
)


NAMES = "user_id", "item_id", "rating", "timestamp"
ROWS = ["A1,B1,5.0,1370000000", "A1,B2,4.0,1370000001", "A2,B1,3.0,1370000002"]


# ------------------------------------------------------------------------------------------------- without a header
@pytest.mark.parametrize("sign", [",", "\t", ";", "|"])
@pytest.mark.parametrize("packed", [False, True], ids=["plain", "gz"])
def test_a_table_without_a_header_is_read_by_position(tmp_path, sign, packed):
    rows = [sign.join(map(str, (row.time, row.user, f"{row.rating}", row.item))) + "\r" for row in LOG]
    log = write_lines(tmp_path / "log.csv", rows, encoding="utf-8-sig", packed=packed)
    items = [sign.join((f'"{TITLES[i]}"', str(i), f'"{", ".join(CATEGORIES[i])}"')) for i in TITLES]
    items = write_lines(tmp_path / "items.csv", items)
    columns = Columns(
        "who", "what", "when", "stars", ("when", "who", "stars", "what"), ("title", "what", "categories")
    )
    data, report = prepare("csv", log, items, columns=columns, k_core=None, min_rating=3)
    sequences, repeated = prepared(LOG, min_rating=3)
    assert dict(zip(data.users, data.sequences, strict=True)) == sequences and report.duplicates == repeated
    assert report.lines == len(LOG) and report.malformed == 0  # the first line is data
    assert {i: row["title"] for i, row in data.item_features.items()} == {i: TITLES[i] for i in data.items if i != 40}


def test_a_table_without_a_header_or_time(tmp_path):
    log = write_lines(tmp_path / "log.tsv", ["u\tb", "u\ta"])
    data, _ = prepare("csv", log, columns=Columns(time=None, header=["user_id", "item_id"]), k_core=None)
    assert data.sequences == [["b", "a"]]


@pytest.mark.parametrize("header", [NAMES, ("user_id", "item_id", "stars", "timestamp")])
@pytest.mark.parametrize(
    "first", ["user_id,item_id,rating,timestamp", "USER_ID, item_id ,rating,timestamp", "u,i,r,t"]
)
def test_an_unexpected_header_is_refused(tmp_path, header, first):
    log = write_lines(tmp_path / "log.csv", [first, *ROWS])
    with pytest.raises(ValueError, match=r"log\.csv, line 1 .*looks like a header .*leave out header \(--header\)"):
        prepare("csv", log, columns=Columns(header=header), k_core=None)


def test_an_unexpected_header_of_items_is_refused(tmp_path):
    log = write_lines(tmp_path / "log.csv", ROWS)
    items = write_lines(tmp_path / "items.csv", ["item_id,title", "B1,Lamp"])
    columns = Columns(header=NAMES, items_header=("item_id", "title"))
    with pytest.raises(ValueError, match=r"items\.csv, line 1 .*looks like a header .*leave out items_header"):
        prepare("csv", log, items, columns=columns, k_core=None)


def test_a_malformed_first_line_is_not_reported_as_a_header(tmp_path):
    log = write_lines(tmp_path / "log.csv", ["A1,B1,5.0,noon", "A1,B2,4.0,evening"])
    with pytest.raises(ValueError, match="line 1 .*the time 'noon' is neither a number nor ISO 8601 text") as error:
        prepare("csv", log, columns=Columns(header=NAMES), k_core=None)
    assert "looks like" not in str(error.value)


@pytest.mark.parametrize("format", ["csv", "amazon-2023", "movielens"])
def test_the_error_names_data_instead_of_a_header(tmp_path, format):
    log = write_lines(tmp_path / "log.csv", ROWS)
    with pytest.raises(ValueError, match=r"line 1 .*looks like a line of data.*--header user_id item_id rating"):
        prepare(format, log, k_core=None)


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"header": NAMES[:3]}, "given as user_id, item_id, rating, without timestamp.*--time_column none"),
        ({"header": ("user_id", "item_id", "timestamp")}, "line 1 .*4 fields for 3 named columns"),
        ({"header": "user_id"}, "header is 'user_id'; it must be two or more different column names"),
        ({"header": ("a", "a")}, "header is .*; it must be two or more different column names"),
        ({"items_header": ("item_id",)}, "items_header is .*; it must be two or more different column names"),
    ],
)
def test_wrong_headers_are_refused(tmp_path, columns, message):
    with pytest.raises(ValueError, match=message):
        prepare("csv", write_lines(tmp_path / "log.csv", ROWS), columns=Columns(**columns), k_core=None)


@pytest.mark.parametrize("row", ["a,x,1,,", "a,x,1", "a,x,1,", "a,x,1,,note"])
def test_empty_names_at_the_end_of_a_header_are_ignored(tmp_path, row):
    log = write_lines(tmp_path / "log.csv", ["user_id,item_id,timestamp,, ", row, "a,y,0,,"])
    items = write_lines(tmp_path / "items.csv", ["item_id,title,,", "x,Lamp,,", "y,Desk"])
    data, report = prepare("csv", log, items, k_core=None)
    assert data.sequences == [["y", "x"]] and report.malformed == report.malformed_items == 0
    assert data.item_features == {"x": {"title": "Lamp"}, "y": {"title": "Desk"}}
    for bad in ("a,x,1,,,", "a,x"):
        with pytest.raises(ValueError, match=r"line 2 .*\d fields for 3 named columns"):
            prepare("csv", write_lines(log, ["user_id,item_id,timestamp,,", bad]), k_core=None)


def test_spaces_around_values_are_ignored(tmp_path):
    lines = ["user_id, item_id, timestamp", "1, 5, 2024-03-02", "1 , 6, 2024-03-01", "1,5 , 2024-03-03", " , 5, 100"]
    log = write_lines(tmp_path / "log.csv", lines)
    items = write_lines(tmp_path / "items.csv", ["item_id, title", "5, Pen", " 6, Desk"])
    data, report = prepare("csv", log, items, k_core=None, max_malformed=0.5)
    assert (data.users, data.sequences) == ([1], [[6, 5]]) and report.duplicates == 1
    assert data.item_features == {5: {"title": "Pen"}, 6: {"title": "Desk"}}
    assert report.malformed_lines == ["line 5: the id ' ' is neither text nor a whole number"]


# ------------------------------------------------------------------------------------------------- title column
@pytest.mark.parametrize("format", ["csv", "headerless", "jsonl", "parquet"])
def test_the_title_column_may_have_any_name(tmp_path, format):
    log = [{"user_id": "u", "item_id": item, "timestamp": time} for time, item in enumerate("ba")]
    items = [{"item_id": "a", "Name": "Lamp", "size": 3}, {"item_id": "b", "Name": "Desk", "size": 4}]
    columns = {"title": "Name"}
    if format == "jsonl":
        log, items = (
            write_lines(tmp_path / name, map(json.dumps, rows)) for name, rows in (("log", log), ("items", items))
        )
    elif format == "parquet":
        for name, rows in (("log", log), ("items", items)):
            pq.write_table(pa.Table.from_pylist(rows), tmp_path / name)
        log, items = tmp_path / "log", tmp_path / "items"
    else:
        tables = [
            [";".join(map(str, row)) for row in (rows[0], *(row.values() for row in rows))] for rows in (log, items)
        ]
        if format == "headerless":
            columns |= {"header": tuple(log[0]), "items_header": tuple(items[0])}
            tables = [table[1:] for table in tables]
        log, items = (write_lines(tmp_path / name, rows) for name, rows in zip(("log", "items"), tables, strict=True))
    kind = "csv" if format == "headerless" else format
    data, report = prepare(kind, log, items, columns=Columns(**columns), k_core=None)
    assert {item: row["title"] for item, row in data.item_features.items()} == {"a": "Lamp", "b": "Desk"}
    assert {str(row["size"]) for row in data.item_features.values()} == {"3", "4"}
    assert report.items_without_title == 0 and "--title_column" not in report.summary()


def test_missing_titles_are_reported(tmp_path):
    log = write_lines(tmp_path / "log.csv", ["user_id,item_id,timestamp", "u,b,1", "u,a,2"])
    items = write_lines(tmp_path / "items.csv", ["item_id,Name", "a,Lamp", "b,Desk"])
    _, report = prepare("csv", log, items, k_core=None)
    assert "no item has a title: give the title column with --title_column" in report.summary()
    assert "--title_column" not in prepare("csv", log, k_core=None)[1].summary()  # without an items file
    with pytest.raises(ValueError, match=r"items\.csv has no column 'Title' for titles; it has item_id, Name"):
        prepare("csv", log, items, columns=Columns(title="Title"), k_core=None)
    with pytest.raises(ValueError, match="title column 'Name' belongs to the items file. Give that file too"):
        prepare("csv", log, columns=Columns(title="Name"), k_core=None)


def test_a_header_is_for_csv_only(tmp_path):
    with pytest.raises(ValueError, match="header can be given for format 'csv' only, but the format is 'jsonl'"):
        prepare("jsonl", tmp_path, columns=Columns(header=NAMES))


def test_ratings_of_the_other_amazon_release_are_refused(tmp_path):
    user, item = "A3BY5KCNQZXV5U", "0594451647"
    of_2014 = write_lines(tmp_path / "2014.csv", [f"{user},{item},5.0,1390176000"])
    of_2018 = write_lines(tmp_path / "2018.csv", [f"{item},{user},5.0,1390176000"])
    for format, log, other in (("amazon-2014", of_2014, of_2018), ("amazon-2018", of_2018, of_2014)):
        data, _ = prepare(format, log, k_core=None)
        assert (data.users, data.sequences) == ([user], [[item]])
        with pytest.raises(ValueError, match="seem to be swapped.*amazon-201"):
            prepare(format, other, k_core=None)


# -------------------------------------------------------------------------------------------------- several files
FORMATS_OF_FILES = [case for case, (format, _) in WRITERS.items() if format not in ("letter", "folder", "s3rec")]


@pytest.mark.parametrize("case", FORMATS_OF_FILES)
def test_the_same_log_twice_is_all_duplicates(tmp_path, case):
    """In every format, two files with the same interactions give the data of one file; the others are duplicates."""
    format, writer = WRITERS[case]
    files = []
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        files.append(writer(tmp_path / name, packed=name == "b"))
    one, _ = prepare(format, *files[0], k_core=2)
    both, report = prepare(format, *map(list, zip(*files, strict=True)), k_core=2)
    assert (both.users, both.sequences, both.item_features) == (one.users, one.sequences, one.item_features)
    assert report.duplicates == 2 + len(LOG) and report.steps[0]["interactions"] == 2 * len(LOG)
    assert report.repeated_items == len(one.item_features) and len(report.files) == 4


rows = st.builds(Row, st.integers(0, 5), st.integers(0, 5), st.integers(0, 6), st.integers(1, 5))


@settings(max_examples=60, deadline=None)
@given(st.lists(st.lists(rows, min_size=1, max_size=20), min_size=1, max_size=4), st.sampled_from(["first", "last"]))
def test_several_files_form_one_log(tmp_path_factory, parts, duplicates):
    folder = tmp_path_factory.mktemp("parts")
    files = []
    for number, part in enumerate(parts):
        lines = [f"{row.user},{row.item},{row.time},{row.rating}" for row in part]
        files.append(write_lines(folder / f"{number}.csv", ["user_id,item_id,timestamp,rating", *lines]))
    expected, repeated = prepared([row for part in parts for row in part], duplicates=duplicates)
    data, report = prepare("csv", files, k_core=None, duplicates=duplicates)
    assert dict(zip(data.users, data.sequences, strict=True)) == expected and report.duplicates == repeated
    assert report.lines == sum(map(len, parts)) + len(parts)


def test_the_first_line_of_an_item_counts_across_files(tmp_path):
    log = write_json_lines(tmp_path / "log.jsonl", [{"user_id": 1, "item_id": i, "timestamp": 0} for i in (1, 2)])
    first = write_json_lines(tmp_path / "a.jsonl", [{"item_id": 1, "title": "one"}])
    second = write_json_lines(tmp_path / "b.jsonl", [{"item_id": 1, "title": "uno"}, {"item_id": 2, "title": "two"}])
    data, report = prepare("jsonl", log, [first, second], k_core=None)
    assert data.item_features == {1: {"title": "one"}, 2: {"title": "two"}}
    assert (report.item_lines, report.repeated_items, report.items_without_metadata) == (3, 1, 0)


def test_each_file_has_its_own_columns(tmp_path):
    first = write_lines(tmp_path / "a.csv", ["user_id,item_id,timestamp", "u,x,2"])
    second = write_lines(tmp_path / "b.csv", ["timestamp\titem_id\tuser_id\tmore", "1\ty\tu\t0"])
    assert prepare("csv", [first, second], k_core=None)[0].sequences == [["y", "x"]]


def test_messages_name_one_of_several_files(tmp_path):
    head = "user_id,item_id,timestamp"
    good = write_lines(tmp_path / "good.csv", [head, *(f"a,x,{time}" for time in range(20))])
    poor = write_lines(tmp_path / "poor.csv", [head, "a,y,1", "a,y", "a,z,noon"])
    _, report = prepare("csv", [good, poor], k_core=None, max_malformed=0.6)
    assert report.malformed == 2 and report.malformed_lines[0] == f"{poor}, line 3: 2 fields for 3 named columns"
    with pytest.raises(ValueError, match=r"poor\.csv: 2 of 4 lines .*line 3: 2 fields"):  # a share of its own lines
        prepare("csv", [good, poor], k_core=None, max_malformed=0.4)
    empty = write(tmp_path / "empty.csv", "")
    with pytest.raises(ValueError, match=r"empty\.csv contains no data"):
        prepare("csv", [good, empty], k_core=None)
    with pytest.raises(ValueError, match=r"other, line 1 is not in the format 'csv'"):
        prepare("csv", [good, write(tmp_path / "other", '{"user_id": 1}\n')], k_core=None)


def test_missing_files_are_found_before_any_file_is_read(tmp_path):
    good = write_lines(tmp_path / "good.csv", ["not a header"])
    for files, items in (([good, tmp_path / "nowhere.csv"], None), ([good], tmp_path / "nowhere.csv")):
        with pytest.raises(FileNotFoundError, match=r"nowhere\.csv is not a file"):
            prepare("csv", files, items)
    with pytest.raises(ValueError, match=r"good\.csv is given twice"):
        prepare("csv", [good, tmp_path / "." / "good.csv"])
    with pytest.raises(ValueError, match="No file of interactions was given"):
        prepare("csv", [])
    with pytest.raises(ValueError, match="'letter' is read from one path, but 2 were given"):
        prepare("letter", [tmp_path, tmp_path])


def test_items_of_several_folders_are_read(tmp_path):
    format, writer = WRITERS["movielens csv"]
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        writer(tmp_path / name, packed=False)
    data, report = prepare(format, [tmp_path / "a", tmp_path / "b"], k_core=2)
    assert len(report.files) == 4 and data.item_features[30]["title"] == TITLES[30]
