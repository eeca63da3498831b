"""Logs as clusters write them: patterns, folders of Parquet, tables in memory, packed files, and Parquet folders."""

import json
import pickle
import threading
from dataclasses import replace

import duckdb
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gflowtrl.cli.prepare import main
from gflowtrl.data import Columns, InteractionData, k_core, leave_one_out, prepare, read_folder, write_folder
from gflowtrl.data.sequences import Sequences
from tests.data.raw_files import LOG, prepared, write, write_json_lines, write_lines


ROWS = [row._asdict() for row in LOG]
RENAMED = {"user": "user_id", "item": "item_id", "time": "timestamp"}
EXPECTED = prepared(LOG)[0]


def as_dict(data):
    return dict(zip(data.users, data.sequences, strict=True))


def named(rows):
    return [{RENAMED.get(name, name): value for name, value in row.items()} for row in rows]


# ------------------------------------------------------------------------------------------------- paths
def test_patterns_stand_for_files(tmp_path):
    rows = named(ROWS)
    for number, part in enumerate((rows[:4], rows[4:])):
        write_json_lines(tmp_path / f"part-{number}.jsonl.gz", part, packed=True)
    write(tmp_path / "_SUCCESS.jsonl.gz", "")
    assert as_dict(prepare("jsonl", str(tmp_path / "*.jsonl.gz"), k_core=None)[0]) == EXPECTED
    assert as_dict(prepare("jsonl", tmp_path, k_core=None)[0]) == EXPECTED  # the folder
    with pytest.raises(FileNotFoundError, match=r"No file matches .*\*\.csv"):
        prepare("csv", str(tmp_path / "*.csv"), k_core=None)
    with pytest.raises(FileNotFoundError, match=r"is a folder without files named \*\.csv, \*\.tsv, \*\.txt"):
        prepare("csv", tmp_path, k_core=None)


def test_hidden_files_and_those_of_clusters_are_not_read(tmp_path):
    (tmp_path / "day").mkdir()
    write_json_lines(tmp_path / "day" / "log.jsonl", named(ROWS))
    for folder in (".ipynb_checkpoints", "_temporary", "_delta_log"):
        (tmp_path / folder).mkdir()
        write_json_lines(tmp_path / folder / "0.json", named(ROWS))
    for path in (tmp_path, str(tmp_path / "**"), str(tmp_path / "*" / "*.json*")):
        data, report = prepare("jsonl", path, k_core=None, duplicates="keep")
        assert len(report.files) == 1 and data.num_interactions == len(ROWS)


def test_a_name_with_the_signs_of_a_pattern_is_taken_literally(tmp_path):
    path = write_json_lines(tmp_path / "log[1]*.jsonl", named(ROWS))
    write_json_lines(tmp_path / "log1.jsonl", named(ROWS[:1]))
    assert as_dict(prepare("jsonl", path, k_core=None)[0]) == EXPECTED


@pytest.mark.parametrize("url", ["https://example.org/log.csv", "s3://bucket/log.csv", "file:///log.csv"])
def test_urls_are_refused(url):
    with pytest.raises(ValueError, match="is a URL. Download the file first"):
        prepare("csv", url)


def test_partitions_of_a_warehouse(tmp_path):
    table = pa.Table.from_pylist(named(ROWS)).drop_columns("timestamp")
    days = [f"{2000 + row['time']}-01-01" for row in ROWS]
    database = duckdb.connect()
    database.register("log", table.append_column("day", pa.array(days)))
    database.execute(f"COPY log TO '{tmp_path}/log' (FORMAT parquet, PARTITION_BY (day))")
    assert (tmp_path / "log" / f"day={days[0]}").is_dir()
    data, report = prepare("parquet", tmp_path / "log", columns=Columns(time="day"), k_core=None)
    assert as_dict(data) == EXPECTED and len(report.files) == len(set(days))
    pattern = str(tmp_path / "log" / "*" / "*.parquet")
    assert prepare("parquet", pattern, columns=Columns(time="day"), k_core=None)[0].sequences == data.sequences
    with pytest.raises(ValueError, match="lacks the columns hour; it has user_id, item_id, rating, day"):
        prepare("parquet", pattern, columns=Columns(time="hour"))


def test_a_missing_partition_is_a_missing_value(tmp_path):
    folder = tmp_path / "time=__HIVE_DEFAULT_PARTITION__"
    folder.mkdir()
    pq.write_table(pa.table({"user_id": [1], "item_id": [2]}), folder / "0.parquet")
    with pytest.raises(ValueError, match="line 1 is not in the format 'parquet'"):
        prepare("parquet", tmp_path, columns=Columns(time="time"), k_core=None)


# ------------------------------------------------------------------------------------------------- packed files
def test_zstandard(tmp_path):
    text = "".join(json.dumps(row) + "\n" for row in named(ROWS)).encode()
    packed = pa.compress(text, codec="zstd", asbytes=True)
    path = tmp_path / "log.jsonl.zst"
    path.write_bytes(packed + packed)  # two frames
    data, report = prepare("jsonl", path, k_core=None)
    assert as_dict(data) == EXPECTED and report.lines == 2 * len(ROWS)
    path.write_bytes(packed[:-5])
    with pytest.raises(ValueError, match=r"log\.jsonl\.zst: the zstandard data is broken"):
        prepare("jsonl", path, k_core=None)


def test_a_log_larger_than_the_memory_of_duckdb(tmp_path):
    random = np.random.default_rng(0)
    users, items = random.integers(0, 10**12, 1_500_000), random.integers(0, 50, 1_500_000)
    pq.write_table(pa.table({"user_id": users, "item_id": items, "timestamp": items}), tmp_path / "log.parquet")
    data, report = prepare("parquet", tmp_path / "log.parquet", k_core=None, max_memory="128 MiB")
    assert report.steps[0]["users"] == len(np.unique(users)) == len(data.users)


# ------------------------------------------------------------------------------------------------- tables in memory
@pytest.mark.parametrize("kind", ["pandas", "arrow", "batch", "views", "several"])
def test_tables_in_memory(tmp_path, kind):
    rows, items = named(ROWS), [{"item_id": 10, "name": "Lamp"}, {"item_id": 20, "name": None}]
    frame, described = pd.DataFrame(rows), pd.DataFrame(items)
    if kind == "pandas":
        frame.index += 7
    elif kind == "batch":
        frame = pa.RecordBatch.from_pylist(rows)
    elif kind == "views":
        table = pa.Table.from_pylist(rows)
        frame = table.set_column(0, "user_id", table["user_id"].cast(pa.string()).cast(pa.string_view()))
    elif kind == "arrow":
        frame, described = pa.Table.from_pylist(rows), pa.Table.from_pylist(items)
    else:
        frame = [frame[:3], frame[3:]]
    options = {"columns": Columns(title="name"), "k_core": None, "min_rating": 3}
    data, report = prepare("table", frame, described, tmp_path / "out", **options)
    assert as_dict(data) == prepared(LOG, min_rating=3)[0] and data.item_features == {10: {"title": "Lamp"}}
    assert report.lines == len(LOG) and report.files[0].startswith("table")
    assert read_folder(tmp_path / "out") == data


def test_polars_is_read_through_arrow(tmp_path):
    class Frame:
        """What polars offers to Arrow."""

        def __arrow_c_stream__(self, requested_schema=None):
            return pa.Table.from_pylist(named(ROWS)).__arrow_c_stream__(requested_schema)

    assert as_dict(prepare("table", Frame(), k_core=None)[0]) == EXPECTED


def test_no_table_and_a_table_in_place_of_a_file(tmp_path):
    for nothing in ([], None):
        with pytest.raises(ValueError, match="No table of a log was given"):
            prepare("table", nothing, k_core=None)
    frame = pd.DataFrame(named(ROWS))
    with pytest.raises(ValueError, match="interactions is a DataFrame, not a file. Read it with format 'table'"):
        prepare("csv", frame, k_core=None)
    columns = [pa.array(["u"]), pa.array(["i"]), pa.array([1]), pa.array([1])]
    twice = pa.Table.from_arrays(columns, ["user_id", "item_id", "timestamp", "timestamp"])
    with pytest.raises(ValueError, match="has the column 'timestamp' twice"):
        prepare("table", twice, k_core=None)


def test_what_is_no_table_is_refused(tmp_path, capsys):
    with pytest.raises(ValueError, match="The table of log is a dict. Format 'table' takes DataFrames"):
        prepare("table", {"user_id": [1]}, k_core=None)
    mixed = pd.DataFrame({"user_id": [1, "a"], "item_id": [1, 2], "timestamp": [1, 2]})
    with pytest.raises(ValueError, match="The table of log is not a table of Arrow"):
        prepare("table", mixed, k_core=None)
    with pytest.raises(ValueError, match="table of log lacks the columns timestamp"):
        prepare("table", mixed[["item_id"]].assign(user_id=1), k_core=None)
    assert main(["--format", "table", "--interactions", "log.csv", "--out", str(tmp_path / "out")]) == 2
    assert "is a str. Format 'table' takes" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------- columns
def test_time_format(tmp_path):
    lines = ["user_id,item_id,timestamp", "u,a,03.01.2024 10:00", "u,b,02.02.2024 09:00", "u,c,01.03.2024 11:00"]
    path = write_lines(tmp_path / "log.csv", [*lines, "u,d,2024-03-02"])
    columns = Columns(time_format="%d.%m.%Y %H:%M")
    data, report = prepare("csv", path, columns=columns, k_core=None, max_malformed=0.5)
    assert data.sequences == [["a", "b", "c"]] and data.times[0][0] == 1704276000
    assert report.malformed_lines == ["line 5: the time '2024-03-02' does not have the format '%d.%m.%Y %H:%M'"]
    rows = [
        {"user_id": "u", "item_id": "a", "timestamp": 20240302},
        {"user_id": "u", "item_id": "b", "timestamp": 20231231},
    ]
    path = write_json_lines(tmp_path / "log.jsonl", rows)
    assert prepare("jsonl", path, columns=Columns(time_format="%Y%m%d"), k_core=None)[0].sequences == [["b", "a"]]
    frame = pd.DataFrame(rows)
    assert prepare("table", frame, columns=Columns(time_format="%Y%m%d"), k_core=None)[0].sequences == [["b", "a"]]
    for wrong in ("days", "%d %"):
        with pytest.raises(ValueError, match="time_format is .*; give codes of strptime"):
            Columns(time_format=wrong)
    with pytest.raises(ValueError, match="time_format is given, but the column of times is None"):
        Columns(time=None, time_format="%Y")


def test_categories_column(tmp_path):
    log = write_lines(tmp_path / "log.csv", ["user_id,item_id", "u,1"])
    items = write_lines(tmp_path / "items.csv", ["item_id,name,genre", "1,Heat,Crime"])
    columns = Columns(time=None, title="name", categories="genre")
    data, report = prepare("csv", log, items, columns=columns, k_core=None)
    assert data.item_features == {1: {"title": "Heat", "categories": "Crime"}}
    assert "times are equal or missing" not in report.summary()  # one interaction has no order
    with pytest.raises(ValueError, match="has no column 'kind' for categories; it has item_id, name, genre"):
        prepare("csv", log, items, columns=Columns(time=None, categories="kind"), k_core=None)
    with pytest.raises(ValueError, match="The categories column 'genre' belongs to the items file"):
        prepare("csv", log, columns=Columns(categories="genre"))


def test_a_log_without_times_says_so(tmp_path):
    log = write_lines(tmp_path / "log.csv", ["user_id,item_id", "u,1", "u,2"])
    _, report = prepare("csv", log, columns=Columns(time=None), k_core=None)
    assert "times are equal or missing, so interactions keep the order of the file" in report.summary()


def test_a_table_is_not_read_as_s3rec(tmp_path):
    log = write(tmp_path / "log.txt", "1\t5 6 7\n2\t7 5\n")
    assert prepare("s3rec", log, k_core=None)[0].sequences == [[5, 6, 7], [7, 5]]
    write(log, "1\t5\t4.0\n")
    with pytest.raises(ValueError, match="line 1 is not in the format 's3rec': 3 columns separated by tabs"):
        prepare("s3rec", log, k_core=None)


# ------------------------------------------------------------------------------------------------- Parquet folders
texts_or_numbers = st.one_of(st.integers(-5, 2**62), st.text(max_size=3))


@settings(max_examples=60, deadline=None)
@given(st.data(), st.booleans(), st.booleans(), st.booleans())
def test_a_folder_of_parquet_is_read_as_json_lines(tmp_path_factory, drawn, numeric, timed, described):
    ids = st.integers(-(2**63), 2**63 - 1) if numeric else st.text(st.characters(codec="utf-8"), max_size=3)
    items = drawn.draw(st.lists(ids, min_size=1, max_size=5, unique=True))
    sequences = drawn.draw(st.lists(st.lists(st.sampled_from(items), min_size=1, max_size=6), min_size=1, max_size=5))
    users = drawn.draw(st.lists(ids, min_size=len(sequences), max_size=len(sequences), unique=True))
    times = [[float(n) / 2 for n in range(len(sequence))] for sequence in sequences] if timed else None
    catalog = sorted(items if described else {item for sequence in sequences for item in sequence})
    features = {catalog[0]: {"title": "A", "price": 2.5}} if described else {}
    data = InteractionData("toy", users, sequences, catalog, features, times=times)
    found = []
    for parquet in (False, True):
        folder = tmp_path_factory.mktemp("folder")
        write_folder(data, folder, parquet)
        assert (folder / "sequences.parquet").is_file() == parquet != (folder / "sequences.jsonl").is_file()
        found.append(read_folder(folder))
    assert found[0] == found[1] == data


def test_folders_that_a_cluster_writes(tmp_path):
    tables = [
        pa.table({"user": [1, 2], "items": [[5, 6, 5], [6, 7, 5]]}),
        pa.table({"user": [3], "items": [[7, 5, 9]]}),
    ]
    (tmp_path / "sequences.parquet").mkdir()
    for number, table in enumerate(tables):
        pq.write_table(table, tmp_path / "sequences.parquet" / f"part-{number}.snappy.parquet")
    (tmp_path / "sequences.parquet" / "_SUCCESS").touch()
    features = {
        "item": [5, 6, 8],
        "title": ["A", None, "C"],
        "tags": [["x"], None, []],
        "day": [None, None, pd.Timestamp(0)],
    }
    pq.write_table(pa.table(features), tmp_path / "items.parquet")
    data = read_folder(tmp_path)
    assert (data.users, data.sequences) == ([1, 2, 3], [[5, 6, 5], [6, 7, 5], [7, 5, 9]])
    assert data.items == [5, 6, 7, 8, 9] and data.times is None
    assert data.item_features[5] == {"title": "A", "tags": ["x"]} and data.item_features[8]["day"].startswith("1970")
    (tmp_path / "sequences.jsonl").write_text('{"user": 1, "items": [5]}\n')
    with pytest.raises(ValueError, match=r"sequences\.parquet and .*sequences\.jsonl both exist"):
        read_folder(tmp_path)


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"user": [1]}, "lacks the columns items; it has user"),
        ({"user": [1, None], "items": [[1], [2]]}, "row 2: 'user' is missing"),
        ({"user": [1.5], "items": [[1]]}, "users are of type double"),
        ({"user": [1, 2], "items": [[1], None]}, "row 2: 'items' is missing"),
        ({"user": [1, 2], "items": [[1], []]}, "row 2 has no items"),
        ({"user": [1, 2], "items": [[1], [2, None]]}, "row 2: a value of 'items' is missing"),
        ({"user": [1], "items": ["a"]}, "'items' is of type string. It must hold a list"),
        ({"user": [1], "items": [[0.5]]}, "items are of type double"),
        ({"user": [1], "items": [[1]], "times": [["a"]]}, "times are of type .*string"),
        ({"user": [1, 2], "items": [[1], [2]], "times": [[1], [1, 2]]}, "row 2: 'times' must be a list of one number"),
        ({"user": [1], "items": [[1]], "times": [[float("nan")]]}, "a time is not a number"),
        ({"user": [1, 1], "items": [[1], [2]]}, "user 1 is given twice"),
        ({"user": pa.array([], pa.int64()), "items": pa.array([], pa.list_(pa.int64()))}, "is empty"),
        ({"user": [1], "items": [[[5]]]}, r"sequences\.parquet: items are of type list<.*whole numbers or text"),
        ({"user": [1], "items": [[{"a": 5}]]}, r"sequences\.parquet: items are of type struct<"),
        ({"user": [1], "items": [[b"a"]]}, r"sequences\.parquet: items are of type binary"),
    ],
)
def test_broken_parquet_sequences(tmp_path, columns, message):
    pq.write_table(pa.table(columns), tmp_path / "sequences.parquet")
    with pytest.raises(ValueError, match=message) as error:
        read_folder(tmp_path)
    assert "\n" not in str(error.value)


def test_an_old_folder_is_replaced_as_a_whole(tmp_path):
    """A folder of part files, too; and nothing is lost if the new one cannot be written."""
    (tmp_path / "sequences.parquet").mkdir()
    pq.write_table(pa.table({"user": [1], "items": [[5, 6]]}), tmp_path / "sequences.parquet" / "part.parquet")
    pq.write_table(pa.table({"item": [5], "title": ["A"]}), tmp_path / "items.parquet")
    data = read_folder(tmp_path)
    write_folder(data, tmp_path)
    assert not (tmp_path / "sequences.parquet").exists() and read_folder(tmp_path) == data
    with pytest.raises(ValueError, match="a time does not fit into 64 bits. Write the folder as JSON lines"):
        write_folder(replace(data, times=[[1, 10**23]]), tmp_path, parquet=True)
    assert read_folder(tmp_path) == data
    write_folder(data, tmp_path, parquet=True)
    assert not (tmp_path / "sequences.jsonl").exists() and read_folder(tmp_path) == data


def test_times_of_numpy_are_written_as_numbers(tmp_path):
    data = InteractionData("toy", [1], [[5, 6]], [5, 6], times=[list(np.array([1.5, 2.0]))])
    write_folder(data, tmp_path)
    assert read_folder(tmp_path).times == [[1.5, 2.0]]


def test_users_without_times_leave_all_without(tmp_path):
    pq.write_table(
        pa.table({"user": [1, 2], "items": [[5], [6]], "times": [[1], None]}), tmp_path / "sequences.parquet"
    )
    assert read_folder(tmp_path).times is None


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"title": ["a"]}, "lacks the columns item"),
        ({"item": [1, 1]}, "row 2: item 1 is on an earlier row"),
        ({"item": [1], "title": [float("nan")]}, "row 1: 'title' must be text"),
        ({"item": [1], "title": [["a"]]}, "row 1: 'title' must be text"),
        ({"item": [1], "photo": [b"abc"]}, "the column 'photo' is of type binary"),
        ({"item": [1], "photo": pa.array([b"abc"], pa.binary(3))}, "'photo' is of type fixed_size_binary"),
        ({"item": [1], "days": [[pd.Timestamp(0).date()]]}, "'days' is of type list"),
        ({"item": pa.array([2**63], pa.uint64())}, "does not fit into 64 bits"),
        ({"item": ["a"]}, "Items must be all whole numbers or all strings"),
    ],
)
def test_broken_parquet_items(tmp_path, columns, message):
    pq.write_table(pa.table({"user": [1], "items": [[1, 2]]}), tmp_path / "sequences.parquet")
    pq.write_table(pa.table(columns), tmp_path / "items.parquet")
    with pytest.raises(ValueError, match=message):
        read_folder(tmp_path)


def test_a_file_that_is_not_parquet(tmp_path):
    (tmp_path / "sequences.parquet").write_bytes(b"PAR1 and more")
    with pytest.raises(ValueError, match=r"sequences\.parquet cannot be read as Parquet"):
        read_folder(tmp_path)


# ------------------------------------------------------------------------------------------------- Sequences
lists = st.lists(st.lists(st.integers(0, 9), max_size=5), max_size=6)


def packed(content, names=None):
    offsets = np.cumsum([0, *map(len, content)])
    return Sequences(np.array([value for one in content for value in one], np.int32), offsets, names)


@given(lists, st.integers(-7, 7), st.slices(6))
def test_sequences_are_lists_of_lists(content, index, part):
    found, texts = packed(content), packed(content, list("abcdefghij"))
    assert found == content and content == found and list(found) == content and len(found) == len(content)
    assert texts == [["abcdefghij"[value] for value in one] for one in content]
    assert found[part] == content[part] and found != [*content, []]
    if -len(content) <= index < len(content):
        assert found[index] == content[index]
    else:
        with pytest.raises(IndexError, match="lists, but number"):
            found[index]


def test_splits_can_be_sent_to_other_processes(small_shop):
    shop, _ = small_shop
    splits = leave_one_out(k_core(replace(shop, semantic_ids=None), 1))
    assert pickle.loads(pickle.dumps(splits)).train.to_dict() == splits.train.to_dict()


def test_decreasing_times_are_found_however_large_they_are():
    late = 1_700_000_000_000_000_005
    items, offsets = [5, 6], np.array([0, 2])
    times = Sequences(np.array([late, late - 4]), offsets)
    with pytest.raises(ValueError, match="the times of user 1 decrease"):
        InteractionData("toy", [1], Sequences(np.array([0, 1]), offsets, items), items, times=times)


def test_splits_and_filters_agree_with_lists(small_shop):
    shop, _ = small_shop
    times = [[float(n) for n in range(len(row))] for row in shop.sequences]
    bare = replace(shop, events=None, semantic_ids=None, times=times)
    compact = k_core(bare, 1)
    bare = replace(bare, items=compact.items, item_features=compact.item_features)
    assert isinstance(compact.sequences, Sequences) and compact == bare
    assert k_core(compact, 4) == k_core(bare, 4)
    ours, theirs = leave_one_out(compact), leave_one_out(bare)
    assert ours.train_sequences == theirs.train_sequences == [row[:-2] for row in bare.sequences]
    assert ours.train.to_dict() == theirs.train.to_dict()


def test_empty_chunks_of_a_table(tmp_path):
    table = pa.table({"user_id": ["a", "b"], "item_id": ["x", "y"], "timestamp": [1, 2]})
    data, _ = prepare("table", pa.concat_tables([table.slice(0, 0), table, table.slice(0, 0)]), k_core=None)
    assert as_dict(data) == {"a": ["x"], "b": ["y"]}


def test_no_thread_is_left_after_an_error(tmp_path):
    """The garbage collection would end it, at any time: in the middle of a start of another thread, too."""
    file = tmp_path / "log.csv"
    file.write_text("user_id,item_id,timestamp\nA,B,noon\n")
    with pytest.raises(ValueError, match="the time 'noon'") as kept:
        prepare("csv", file, k_core=None)
    assert kept.tb and not [thread for thread in threading.enumerate() if "ThreadPoolExecutor" in thread.name]
