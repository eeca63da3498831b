"""Encodings of files, and files that are not text."""

import bz2
import gzip
import zipfile

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from gflowtrl.data import Columns, prepare, read_folder
from gflowtrl.data.formats import tables
from tests.data.raw_files import (
    TITLES,
    WRITERS,
    csv,
    movielens_100k,
    write,
    write_lines,
)


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
