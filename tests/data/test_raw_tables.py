"""Tables without a header, several files, encodings, and files that are not text."""

import bz2
import gzip
import json
import zipfile

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gflowtrl.data import Columns, prepare, read_folder
from gflowtrl.data.formats import tables
from gflowtrl.data.formats.registry import find_files
from tests.data.raw_files import (
    CATEGORIES,
    LOG,
    TITLES,
    WRITERS,
    Row,
    csv,
    movielens_100k,
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


# ------------------------------------------------------------------------------ encodings and files that are not text
def test_another_encoding_is_counted_and_can_be_given(tmp_path):
    log, items = csv(tmp_path, packed=False)
    items.write_bytes(items.read_text(encoding="utf-8").encode("cp1252"))
    data, report = prepare("csv", log, items, k_core=2)
    assert report.unreadable_items == 1 and "1 items with unreadable text" in report.summary()
    data, report = prepare("csv", log, items, k_core=2, encoding="cp1252")
    assert data.item_features[20]["title"] == TITLES[20] and report.unreadable_items == 0


def test_utf16_is_refused_unless_given(tmp_path):
    log = write_lines(tmp_path / "log.csv", ["Kunde;Größe;timestamp", "a;x;1", "a;y;2"], encoding="utf-16")
    columns = Columns("Kunde", "Größe")
    with pytest.raises(ValueError, match=r"log\.csv is not UTF-8\. .*--encoding"):
        prepare("csv", log, columns=columns, k_core=None)
    assert prepare("csv", log, columns=columns, k_core=None, encoding="utf-16")[0].sequences == [["x", "y"]]
    log.write_text(log.read_text(encoding="utf-16"), encoding="utf-8-sig")
    assert prepare("csv", log, columns=columns, k_core=None)[0].sequences == [["x", "y"]]


def test_movielens_100k_is_read_as_latin_1(tmp_path):
    log, items = movielens_100k(tmp_path, packed=False)
    assert "É".encode("latin-1") in items.read_bytes()
    data, report = prepare("movielens", log, items, k_core=2)
    assert data.item_features[20] == {"title": "Émile", "categories": "Drama"} and report.unreadable_items == 0


@pytest.mark.parametrize("packed", [False, True], ids=["plain", "gz"])
@pytest.mark.parametrize("encoding", ["utf-8", "latin-1"])
@pytest.mark.parametrize("case", ["movielens dat", "movielens 100k"])
def test_the_encoding_of_movielens_is_detected(tmp_path, case, encoding, packed):
    format, writer = WRITERS[case]
    log, items = writer(tmp_path, packed=False)
    write(items, "\n" * (1 << 16) + items.read_text(encoding="latin-1"), encoding, packed)  # far after the head
    data, report = prepare(format, log, items, k_core=2)
    assert data.item_features[20]["title"] == TITLES[20] == "Émile" and report.unreadable_items == 0


@pytest.mark.parametrize("encoding", [None, "utf-8", "UTF8", "utf-8-sig"])
def test_a_byte_order_mark_is_not_part_of_the_first_column(tmp_path, encoding):
    log = write_lines(tmp_path / "log.csv", ["user_id,item_id,timestamp", "a,x,1"], encoding="utf-8-sig")
    assert prepare("csv", log, k_core=None, encoding=encoding)[0].users == ["a"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (bz2.compress(b"user_id"), r"is an archive or .*Unpack it, or compress it with gzip\."),
        (gzip.compress(b"PAR1...", mtime=0), "is a parquet file. Read it with format parquet"),
        (b"user_id,item_id,timestamp\ra,x,1\ra,y,2\r", "lines that end in CR alone.*LF"),
        (b"\0\0\0\1" * 9, "is not UTF-8"),
        (b"\n  \n\t\n", "raw contains no data"),
        (b"user_id,item_id,timestamp\n\n   \n", "raw contains no data"),
        (b"\x01\x02,\x03\n", r"header lacks user_id.*it has \?\?, \?"),  # no control characters on a terminal
        (b"user_id,item_id,timestamp\na," + b"b" * 9000 + b"\n", r"2 fields for 3"),
    ],
)
def test_files_that_are_not_text_are_refused(tmp_path, content, message):
    (tmp_path / "raw").write_bytes(content)
    with pytest.raises(ValueError, match=message) as error:
        prepare("csv", tmp_path / "raw", k_core=None)
    assert len(str(error.value)) < 1000 and str(error.value).isprintable()


def test_a_zip_file_is_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "ml.zip", "w") as archive:
        archive.writestr("ratings.csv", "userId,movieId,rating,timestamp\n")
    with pytest.raises(ValueError, match=r"ml\.zip is an archive"):
        prepare("movielens", tmp_path / "ml.zip")


def test_lines_of_spaces_are_blank(tmp_path):
    log = write(tmp_path / "log.txt", "1 2 3\n   \n2 3 2\n")
    data, report = prepare("s3rec", log, k_core=None)
    assert data.sequences == [[2, 3], [3, 2]] and report.malformed == 0


def unchecked_text(*values: bytes) -> pa.Array:
    """Text that Arrow takes as it is."""
    return pa.Array.from_buffers(pa.string(), len(values), pa.array(values, pa.binary()).buffers())


BAD = unchecked_text(b"a", b"a", b"\xff", b"b")


@pytest.mark.parametrize("format", ["table", "parquet"])
@pytest.mark.parametrize(
    ("column", "values"),
    [
        ("user_id", BAD),
        ("item_id", pa.DictionaryArray.from_arrays(pa.array([0, 0, 2, 3], pa.int32()), BAD)),
        ("title", BAD),
        ("tags", pa.ListArray.from_arrays(pa.array([0, 1, 1, 3, 4], pa.int32()), BAD)),
    ],
    ids=["text", "dictionary", "features", "lists"],
)
def test_text_that_is_not_utf8_is_named(tmp_path, monkeypatch, format, column, values):
    """Neither Arrow nor Parquet checks it. It was reported as lack of memory. Rows are read in blocks."""
    monkeypatch.setattr(tables, "_BLOCK_ROWS", 2)
    monkeypatch.setattr(tables, "_BATCH_ROWS", 2)
    log = {"user_id": ["u", "u", "v", "v"], "item_id": ["a", "b", "a", "b"], "timestamp": [1, 2, 3, 4]}
    items = {"item_id": ["a", "c", "d", "b"]}
    (log if column in log else items)[column] = values
    given = [pa.table(log), pa.table(items)]
    name = "table of log" if column in log else "table of items"
    if format == "parquet":
        name = str(tmp_path / ("0" if column in log else "1"))
        for number, table in enumerate(given):
            pq.write_table(table, tmp_path / str(number))
        given = [tmp_path / "0", tmp_path / "1"]
    with pytest.raises(ValueError) as error:
        prepare(format, *given, k_core=None)
    assert str(error.value) == f"{name}, row 3: the column {column!r} has text that is not UTF-8. Write it as UTF-8."


def test_a_folder_with_text_that_is_not_utf8_is_refused(tmp_path):
    pq.write_table(pa.table({"user": BAD, "items": [["a"]] * 4}), tmp_path / "sequences.parquet")
    with pytest.raises(ValueError, match=r"sequences\.parquet, row 3: the column 'user' has text that is not UTF-8"):
        read_folder(tmp_path)


def test_a_damaged_parquet_file_is_refused(tmp_path):
    format, writer = WRITERS["parquet"]
    log, _ = writer(tmp_path, packed=False)
    content = log.read_bytes()
    log.write_bytes(content[:4] + b"\0" * 60 + content[64:])
    with pytest.raises(ValueError, match=r"log\.parquet is not a readable parquet file") as error:
        prepare(format, log, k_core=None)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("format", "options", "message"),
    [
        ("csv", {"encoding": "klingon"}, "There is no text encoding 'klingon'"),
        ("csv", {"encoding": "base64"}, "encoding 'base64'"),
        ("parquet", {"encoding": "cp1252"}, "text of format 'parquet' is UTF-8"),
        ("folder", {"encoding": "cp1252"}, "text of format 'folder' is UTF-8"),
        ("csv", {"max_description_characters": 0}, "at least 1 or None"),
    ],
)
def test_errors_name_bad_text_options(tmp_path, format, options, message):
    with pytest.raises(ValueError, match=message):
        prepare(format, tmp_path / "x", **options)


# ------------------------------------------------------------------------------------------------------- features
def test_attributes_of_s3rec(tmp_path):
    log = write(tmp_path / "Toy.txt.gz", "1 5 6 7\n2 7 5 6\n")
    attributes = {"5": [3, "Lamp"], "6": [], "7": [12], "9": [3]}
    write(tmp_path / "Toy_item2attributes.json", json.dumps(attributes), encoding="utf-8-sig", packed=True)
    data, report = prepare("s3rec", log, k_core=None)
    assert data.item_features == {5: {"attributes": ["attribute_3", "Lamp"]}, 7: {"attributes": ["attribute_12"]}}
    assert (report.item_lines, report.items_without_metadata, len(report.files)) == (4, 0, 2)
    assert find_files("s3rec", write(tmp_path / "Toy.txt.zst", ""), None)[1] == [tmp_path / "Toy_item2attributes.json"]
    other = write(tmp_path / "other.json", json.dumps({"5": [1]}))
    data, _ = prepare("s3rec", log, other, k_core=None)  # a given file takes precedence over a found one
    assert data.item_features == {5: {"attributes": ["attribute_1"]}}
    for content, message in (
        ("[1]", "expected a JSON object, not list"),
        ('{"5": 3, "6": [1]}', r"line 1 .*expected a list of attributes, not 3"),
        ("", r"other\.json contains no data"),
        ("{", r"other\.json, line 1 .*invalid JSON"),
    ):
        with pytest.raises(ValueError, match=message):
            prepare("s3rec", log, write(other, content), k_core=None)


def test_other_names_of_recbole(tmp_path):
    log = write_lines(tmp_path / "s.inter", ["user_id:token\tproduct_id:token\ttimestamp:float", "a\t1\t5", "a\t2\t4"])
    head = "id:token\tapp_name:token\tgenres:token_seq\ttitle:token"
    items = write_lines(tmp_path / "s.item", [head, "1\tapp\tAction Indie\tGame"])
    data, _ = prepare("recbole", log, items, k_core=None)
    assert data.sequences == [[2, 1]]
    assert data.item_features == {1: {"app_name": "app", "categories": "Action Indie", "title": "Game"}}
    items = write_lines(tmp_path / "s.item", ["item_id:token\tname:token_seq", "1\tGame"])
    assert prepare("recbole", log, items, k_core=None)[0].item_features == {1: {"title": "Game"}}
    write_lines(log, ["user_id:token\tthing:token", "a\t1"])
    with pytest.raises(ValueError, match="header lacks item_id; it has user_id, thing"):
        prepare("recbole", log, k_core=None)


def test_features_of_complete_formats_are_cleaned(tmp_path):
    write(tmp_path / "Toy.inter.json", json.dumps({"0": [1, 2]}))
    item = {"title": "Salt &amp; Pepper", "description": "one two three", "price": "$5"}
    write(tmp_path / "Toy.item.json", json.dumps({"1": item}))
    data, _ = prepare("letter", tmp_path, out=tmp_path / "out", k_core=None, max_description_characters=8)
    assert data.item_features == {1: {"title": "Salt & Pepper", "description": "one two", "price": 5.0}}
    assert read_folder(tmp_path / "out") == data
