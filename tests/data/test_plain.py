"""Lines that SQL reads, compared with the parsers of the formats, which read the same files line by line."""

import contextlib
import gzip
import json
import random
import tempfile

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gflowtrl.data import Columns, prepare
from gflowtrl.data.formats import log, plain, source
from gflowtrl.data.formats.format import Parsed, Request
from gflowtrl.data.formats.log import read_log
from gflowtrl.data.formats.plain import UnfinishedQuoteError
from gflowtrl.data.formats.registry import STREAMED
from gflowtrl.data.formats.source import Source
from gflowtrl.data.item_filter import items_where


_NOTHING = """SELECT 0::BIGINT AS number, '' AS "user", '' AS item, '' AS "time", 0::DOUBLE AS seconds, 0::DOUBLE AS
rating WHERE false"""


def by_line(monkeypatch):
    """Let the parsers of the formats read all lines."""
    for kind in (plain.JsonLines, plain.Delimited, plain.Typed):
        monkeypatch.setattr(kind, "query", lambda self, block: _NOTHING)


def read(path, format, columns=None, min_rating=None, max_malformed=1.0):
    """Return all that is known of a file, or the message of its error."""
    kind, request = STREAMED[format], Request(columns or Columns(), min_rating is not None)
    file = Source(path, format, kind.expected, max_malformed)
    try:
        found, below = read_log([(file, kind.interactions(file, request))], min_rating)
    except ValueError as error:
        return str(error)
    rows = zip(found.users.tolist(), found.items.tolist(), found.times.tolist(), strict=True)
    shown = [(found.user_names[user], found.item_names[item], repr(time)) for user, item, time in rows]
    return shown, below, file.lines, file.malformed, file.malformed_lines


def check(path, *arguments, block_bytes=1 << 24, **options):
    """Check that SQL and the parsers read the same from a file, and return it."""
    with pytest.MonkeyPatch.context() as patch:
        by_line(patch)
        expected = read(path, *arguments, **options)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(source, "_BLOCK_BYTES", block_bytes)
        assert read(path, *arguments, **options) == expected
    return expected


IDS = ["a", "b", "7", "07", "-3", " a ", "é", "\u3000a", "a b", "\x1ca", "", " ", "\ufffd", "a\x85", "1" * 20]
TIMES = [
    "1",
    "2.5",
    "1e3",
    " 4",
    "+5",
    "+-6",
    "1_0",
    "nan",
    "inf",
    "1e400",
    "",
    "2024-03-02",
    "2024-03-02T01:00Z",
    "x",
]
VALUES = [1, -0.0, 7, 5.0, 10**18, 10**20, True, None, [], {}, *IDS, *TIMES]
BLOCKS = [32, 200, 1 << 24]
values = st.sampled_from(VALUES)
NAMES = "user_id", "item_id", "timestamp", "rating"
objects = st.fixed_dictionaries({}, optional=dict.fromkeys((*NAMES, "x"), values))
raw_lines = st.sampled_from(
    [
        '{"user_id": "a", "user_id": "b", "item_id": 1, "timestamp": 1, "rating": 4}',
        '{"user\\u005fid": "b", "user_id": "a", "item_id": 1, "timestamp": 1, "rating": 4}',
        '{"user_id": "a", "item_id": 1, "timestamp": 1, "rating": 4,}',
        ' {"user_id": "a", "item_id": 1, "timestamp": 1, "rating": 4} ',
        '{"user_id": "a\\n", "item_id": "\\ud800", "timestamp": 1, "rating": 4}',
        '{"x": {"user_id": "b"}, "user_id": "a", "item_id": "/", "timestamp": NaN, "rating": Infinity}',
        '{"x": "\\"user_id\\": 3, ", "user_id": "a", "item_id": "z", "timestamp": "7", "rating": "4"}',
        '{"user_id": -0, "item_id": 0.0, "timestamp": -1, "rating": 4}',
        '{"user_id": 01, "item_id": 1, "timestamp": 1, "rating": 4}',
        *('{"user_id": "a"', "[1]", "", "  ", "null", "{} {}"),
    ]
)
unescaped = objects.map(lambda row: json.dumps(row, ensure_ascii=False))
json_lines = st.lists(st.one_of(objects.map(json.dumps), unescaped, raw_lines))


@settings(max_examples=50, deadline=None)
@given(json_lines, st.sampled_from([None, 4]), st.sampled_from(BLOCKS), st.sampled_from(["\n", "\r\n"]))
def test_json_lines(tmp_path_factory, lines, min_rating, block_bytes, end):
    path = tmp_path_factory.mktemp("json") / "log.jsonl"
    good = json.dumps({"user_id": "u", "item_id": "i", "timestamp": 1, "rating": 5})
    path.write_bytes("".join(f"{line}{end}" for line in [good, *lines]).encode("utf-8", "surrogatepass"))
    check(path, "jsonl", block_bytes=block_bytes, min_rating=min_rating)


fields = st.one_of(st.sampled_from([*IDS, *TIMES]), st.text('",a1 \r', max_size=4))
csv_line = st.lists(fields, min_size=3, max_size=5).map(",".join)
csv_lines = st.lists(st.one_of(csv_line, st.text('",a1\r ', max_size=12)))
csv_kinds = st.sampled_from(["csv", "headerless", "quoted"])


@settings(max_examples=50, deadline=None)
@given(csv_lines, st.sampled_from([None, 4]), st.sampled_from(BLOCKS), csv_kinds)
def test_delimited_lines(tmp_path_factory, lines, min_rating, block_bytes, kind):
    path = tmp_path_factory.mktemp("csv") / "log.csv"
    if kind == "quoted":
        lines = [",".join(f'"{field}"' for field in line.replace('"', "").split(",")) for line in lines]
    head = [] if kind == "headerless" else [",".join(NAMES)]
    path.write_bytes("".join(f"{line}\n" for line in [*head, "u,i,1,5", *lines]).encode())
    check(path, "csv", Columns(header=NAMES if kind == "headerless" else None), min_rating, block_bytes=block_bytes)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.lists(fields, min_size=3, max_size=5)), st.sampled_from(["::", "\t"]), st.sampled_from(BLOCKS))
def test_lines_without_quotes(tmp_path_factory, lines, sign, block_bytes):
    path = tmp_path_factory.mktemp("dat") / "ratings.dat"
    path.write_bytes("".join(f"{sign.join(line)}\n" for line in [["1", "2", "5", "3"], *lines]).encode())
    check(path, "movielens", min_rating=3, block_bytes=block_bytes)


def test_a_quote_over_several_blocks(tmp_path):
    lines = [f"u{n},i{n},{n}," for n in range(40)]
    lines[10], lines[30] = 'u10,i10,10,"begins', 'ends, here"'
    path = tmp_path / "log.csv"
    path.write_text("\n".join(["user_id,item_id,timestamp,note", *lines]) + "\n")
    for block_bytes in (16, 100, 1 << 24):
        found, _, count, malformed, _ = check(path, "csv", block_bytes=block_bytes)
        assert (len(found), count, malformed) == (19, 41, 21)  # the quoted lines look like rows


NUMBERS = [
    pa.int8(),
    pa.uint16(),
    pa.int64(),
    pa.float16(),
    pa.float32(),
    pa.float64(),
    pa.bool_(),
    pa.decimal128(24, 2),
    pa.decimal256(40, 2),
]


@pytest.mark.parametrize("kind", [*NUMBERS, pa.string(), pa.large_string(), pa.binary()], ids=str)
@pytest.mark.parametrize("column", ["user", "item", "time", "rating"])
def test_columns_of_arrow(monkeypatch, kind, column):
    """Each type in each column: SQL takes only what the parser takes, too."""
    values = [1, 2, None, 5] if kind in NUMBERS else ["1", " x", None, "2024-03-01"]
    if kind == pa.binary():
        values = [b"1", b"x", None, b"y"]
    if kind == pa.bool_():
        values = [True, False, None, True]
    names = ["a", "b", "c", "d"]
    rows = {"user": names, "item": names, "time": [1.5, 2, 3, 4], "rating": [5, 5, 1, 5]}
    cells = pa.array(values).cast(kind) if kind in NUMBERS else pa.array(values, kind)
    table = pa.table({"number": range(1, 5), **rows, column: cells})

    def result():
        file = Source(__file__, "parquet", "rows", 1.0)
        file.first_line = 0
        try:
            found, below = read_log([(file, Parsed([table], tuple, plain.Typed(table.column_names)))], 2)
        except ValueError as error:
            return str(error)
        rows = found.users.tolist(), found.items.tolist(), found.times.tolist()
        return found.user_names, found.item_names, rows, below, file.malformed_lines

    found = result()
    by_line(monkeypatch)
    assert found == result()


def test_dictionaries_of_arrow(tmp_path):
    text = pa.array(["a", "b", "a"]).dictionary_encode()
    pq.write_table(pa.table({"user_id": text, "item_id": text, "timestamp": text}), tmp_path / "log.parquet")
    assert "line 1" in check(tmp_path / "log.parquet", "parquet")


@pytest.mark.parametrize("block_bytes", [1 << 16, 1 << 24])
@pytest.mark.parametrize("end", [b"", b"\n"])
def test_lines_have_bounds(tmp_path, monkeypatch, block_bytes, end):
    monkeypatch.setattr(source, "_BLOCK_BYTES", block_bytes)
    path = tmp_path / "log.jsonl.gz"
    path.write_bytes(gzip.compress(b"short\n" + b'{"user_id": "' + b"a" * (1 << 20) + end))
    file = Source(path, "jsonl", "lines", 1.0, max_line_bytes=1 << 18)
    with pytest.raises(ValueError, match=r"line 2 has more than 262,144 bytes.*raise max_line_bytes"):
        list(file.blocks())


@pytest.mark.parametrize(
    ("format", "first", "line"),
    [
        ("jsonl", "", '{"user_id": "a", "item_id": "b", "timestamp": 1}'),
        ("csv", "user_id,item_id,timestamp", "a,b,1"),
        ("movielens", "", "1::2::3::4"),
    ],
)
def test_unpacked_files_have_a_bound(tmp_path, format, first, line):
    path = tmp_path / "log"
    path.write_bytes(gzip.compress("\n".join([first, *[line] * (1 << 18)]).encode()))
    with pytest.raises(ValueError, match=r"has more than 1,048,576 bytes, unpacked.*raise max_unpacked_bytes"):
        prepare(format, path, k_core=None, max_unpacked_bytes=1 << 20)
    with pytest.raises(ValueError, match="max_unpacked_bytes is 0"):
        prepare(format, path, max_unpacked_bytes=0)


def test_long_lines_are_read_by_the_parser(tmp_path):
    text = "x" * (3 << 20)
    rows = [{"user_id": "u", "item_id": item, "timestamp": 1, "text": text} for item in ("a", "b")]
    path = tmp_path / "log.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert [item for _, item, _ in check(path, "jsonl")[0]] == ["a", "b"]


def test_one_wrong_quote_is_one_malformed_line(tmp_path):
    path = tmp_path / "log.csv"
    path.write_text('user_id,item_id,timestamp,note\nu,a,1,x\nu,b,2,"19" screen\nu,c,3,x\n')
    found, _, _, malformed, lines = check(path, "csv")
    assert [item for _, item, _ in found] == ["a", "c"] and malformed == 1 and "expected after" in lines[0]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plain.UnfinishedQuoteError, "__init__", None)  # the lines after it are still read many at a time
        patch.setattr(log, "chain", None)
        assert len(read(path, "csv")[0]) == 2


def test_items_of_one_line_keep_their_order(tmp_path):
    """DuckDB does not sort equal keys in a stable way, which shows in large tables."""
    random = np.random.default_rng(0)
    sequences = [random.integers(0, 2000, random.integers(50, 250)).tolist() for _ in range(3000)]
    path = tmp_path / "log.txt"
    path.write_text("".join(f"{user} {' '.join(map(str, items))}\n" for user, items in enumerate(sequences)))
    data, _ = prepare("s3rec", path, k_core=None, duplicates="keep")
    assert data.sequences == sequences and data.times is None


def test_equal_times_keep_the_order_of_lines_and_files(tmp_path):
    """Lines that SQL reads and others alternate."""
    files, expected = [], []
    for number in range(3):
        rows = [{"user_id": "u", "item_id": f"{number}-{row}", "timestamp": 5} for row in range(300)]
        expected += [row["item_id"] for row in rows]
        lines = [" " * (row % 3) + json.dumps(content) for row, content in enumerate(rows)]
        files.append(tmp_path / f"{number}.jsonl")
        files[-1].write_text("\n".join(lines))
    assert prepare("jsonl", files, k_core=None)[0].sequences == [expected]


@pytest.mark.parametrize("least", [np.float64(3), np.int64(3), 3])
def test_the_least_rating_may_be_any_number(tmp_path, least):
    path = tmp_path / "log.csv"
    path.write_text("user_id,item_id,timestamp,rating\nu,a,1,4\nu,b,2,nan\nu,c,3,2\n")
    data, report = prepare("csv", path, k_core=None, min_rating=least)
    assert data.sequences == [["a"]] and report.below_min_rating == 2
    for wrong in (float("nan"), "4", float("inf")):
        with pytest.raises(ValueError, match="min_rating"):
            prepare("csv", path, k_core=None, min_rating=wrong)


def test_too_little_memory_is_an_error_in_words(tmp_path):
    path = tmp_path / "log.csv"
    path.write_text("user_id,item_id,timestamp\n" + "".join(f"u{n},i{n},{n}\n" for n in range(100_000)))
    with pytest.raises(ValueError, match=r"log\.csv cannot be read with 1MiB of memory .*Raise max_memory") as error:
        prepare("csv", path, k_core=None, max_memory="1MiB")
    assert "\n" not in str(error.value)
    for wrong in ("much", "1; DROP", 5, "0MiB"):
        with pytest.raises(ValueError, match="max_memory is .*; give a size such as '768MiB'"):
            prepare("csv", path, max_memory=wrong)


def test_other_errors_of_the_database_are_not_blamed_on_memory(tmp_path, monkeypatch):
    def fails(*_):
        raise duckdb.ConversionException("Conversion Error: no such value")

    path = tmp_path / "log.csv"
    path.write_text("user_id,item_id,timestamp\n1,2,3\n")
    monkeypatch.setattr(log._Reader, "_read_block", fails)
    with pytest.raises(ValueError, match=r"log\.csv cannot be read by DuckDB \(Conversion Error: no such value\)"):
        prepare("csv", path, k_core=None)


def test_an_open_quote_ends_the_reading_by_line():
    block = pa.table({"number": [1], "line": ['a,"b\n']})
    with pytest.raises(UnfinishedQuoteError) as error:
        list(plain.Delimited(",", (0, 1, None, None), 2, 2, True, iter).records(block))
    assert error.value.rest is iter


def test_names_of_temporary_folders_are_not_columns(tmp_path, monkeypatch):
    folder = tmp_path / "user=bob" / "price=9"
    folder.mkdir(parents=True)
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    path = tmp_path / "log.csv"
    path.write_text("user_id,item_id,timestamp\na,x,1\nb,y,2\n")
    assert prepare("csv", path, k_core=None)[0].users == ["a", "b"]
    assert items_where(["x", "y"], {"x": {"price": 1}, "y": {"price": 3}}, "price < 2") == ["x"]


@pytest.mark.parametrize("ending", ["", ".gz", ".zst"])
def test_the_progress_bar_counts_packed_bytes(tmp_path, monkeypatch, ending):
    class Bar(contextlib.nullcontext):
        n = 0

        def __enter__(self):
            return self

        def update(self, count):
            self.n += count
            seen.append(self.n)

    chance, path, seen = random.Random(0), tmp_path / f"log.csv{ending}", []
    content = "".join(f"{chance.getrandbits(256):x}\n" for _ in range(9_000)).encode()
    packed = pa.compress(content, "zstd", asbytes=True) if ending == ".zst" else content
    path.write_bytes(gzip.compress(content) if ending == ".gz" else packed)
    monkeypatch.setattr(source, "byte_bar", lambda name, total: totals.append(total) or Bar())
    monkeypatch.setattr(source, "_BLOCK_BYTES", 50_000)
    monkeypatch.setattr(source, "_RAW_BYTES", 1_000)
    totals = []
    assert "".join(Source(path, "csv", "lines", 0.0).text_lines()).encode() == content
    assert totals == [path.stat().st_size] and len(seen) == -(-len(content) // 50_000)
    assert sorted(seen) == seen and seen[0] < totals[0] - 4 and totals[0] - 16 <= seen[-1] <= totals[0]
