"""Lists for all users of a folder: equal to those of `recommend`, on any number of processes, whatever was killed."""

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch

from gflowtrl import Recommender
from gflowtrl.cli import main
from gflowtrl.data import InteractionData, read_folder, write_folder
from gflowtrl.pipeline.all_users import Models, part_seed, read_exclusions, recommend_users
from tests.tiny import tiny_model
from tests.trainer.world import ITEMS, TOKENIZER, make_catalog


HISTORIES = [[ITEMS[user % len(ITEMS)], ITEMS[(user * 7 + 3) % len(ITEMS)]][: 1 + user % 2] for user in range(23)]
FEATURES = {item: {"price": price, "title": item.upper()} for price, item in enumerate(ITEMS)}
USERS = [f"u{user}" for user in range(len(HISTORIES))]


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("model")
    counts = torch.arange(len(ITEMS))
    catalog = make_catalog()
    Recommender(
        tiny_model(len(TOKENIZER)), TOKENIZER, catalog, max_history_items=5, item_counts=counts
    ).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("data")
    histories = [*HISTORIES[:-1], ["unknown"]]  # the last user is cold
    write_folder(InteractionData("test", USERS, histories, [*sorted(ITEMS), "unknown"], FEATURES), folder)
    return str(folder)


def lists_of(file: Path) -> dict[str, list[tuple[str, float, str]]]:
    """Item, probability and source of each user's list, in the order of the file."""
    if file.suffix == ".parquet":
        rows = pq.read_table(file).to_pylist()
    elif file.suffix == ".csv":
        with file.open() as lines:
            rows = list(csv.DictReader(lines))
    else:
        return {
            (row := json.loads(line))["user"]: [
                (entry["item"], entry["probability"], row["source"]) for entry in row["recommendations"]
            ]
            for line in file.read_text().splitlines()
        }
    found: dict = {}
    for row in rows:
        assert int(row["rank"]) == len(found.setdefault(row["user"], [])) + 1
        found[row["user"]].append((row["item"], float(row["probability"]), row["source"]))
    return found


@pytest.mark.parametrize("ending", [".parquet", ".csv", ".jsonl"])
def test_lists_equal_those_of_the_recommender(model, data_dir, tmp_path, ending):
    output = tmp_path / f"recs{ending}"
    report = recommend_users(Models([model]), data_dir, output, k=4, users_per_part=5, exclude_seen=True)
    recommender = Recommender.from_pretrained(model)
    expected = recommender.recommend([*HISTORIES[:-1], []], k=4, exclude_seen=True)
    found = lists_of(output)
    assert list(found) == USERS
    for user, rows in enumerate(expected):
        source = "popularity" if user == len(USERS) - 1 else "policy"
        assert [(item, kind) for item, _, kind in found[USERS[user]]] == [(row.item, source) for row in rows]
        assert [value for _, value, _ in found[USERS[user]]] == pytest.approx([row.probability for row in rows])
    assert (report.users, report.by_popularity, report.unknown_items, report.short_lists) == (23, 1, 1, 0)
    assert not output.with_name(f"{output.name}.parts").exists() and sorted(tmp_path.iterdir()) == [output]


def test_processes_and_parts_change_nothing(model, data_dir, tmp_path):
    for processes, ending in ((1, "a.parquet"), (2, "b.parquet")):
        recommend_users(
            Models([model]), data_dir, tmp_path / ending, k=3, processes=processes, users_per_part=4,
            strategy="sample", seed=5,
        )  # fmt: skip
    one, two = (lists_of(tmp_path / name) for name in ("a.parquet", "b.parquet"))
    assert one.keys() == two.keys()
    assert [[item for item, *_ in found] for found in one.values()] == [
        [i for i, *_ in found] for found in two.values()
    ]
    recommender = Recommender.from_pretrained(model)
    seed = part_seed(5, 1)  # the users of the second part
    expected = recommender.recommend(HISTORIES[4:8], k=3, strategy="sample", seed=seed)
    assert [[item for item, *_ in one[user]] for user in USERS[4:8]] == [[r.item for r in rows] for rows in expected]
    assert part_seed(5, 0) == 5 and len({part_seed(5, part) for part in range(50)}) == 50


def test_filters_and_exclusions(model, data_dir, tmp_path):
    allowed = ITEMS[:4]
    rows = [
        {"user": "u0", "items": [ITEMS[1], "gone"]},
        {"user": "u2", "items": ITEMS},
        {"user": "u22", "items": [ITEMS[3]]},
    ]
    (tmp_path / "exclude.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    output = tmp_path / "recs.jsonl"
    options = {"where": "price < 4", "exclude": tmp_path / "exclude.jsonl", "k": 3, "users_per_part": 7}
    report = recommend_users(Models([model]), data_dir, output, **options)
    found = {user: [item for item, *_ in rows] for user, rows in lists_of(output).items()}
    assert found["u2"] == [] and list(found) == USERS
    assert set(found["u0"]) == set(allowed) - {ITEMS[1]} and ITEMS[3] not in found["u22"]
    assert all(set(items) <= set(allowed) and len(items) == 3 for user, items in found.items() if user != "u2")
    assert (report.allowed_items, report.without_items, report.short_lists) == (4, 1, 1)
    narrow = {**options, "allowed_items": [ITEMS[0], ITEMS[9]]}
    assert recommend_users(Models([model]), data_dir, output, **narrow).allowed_items == 1
    (tmp_path / "recs.csv").write_text("before")
    recommend_users(Models([model]), data_dir, tmp_path / "recs.csv", **narrow)  # an existing output is replaced
    assert {item for rows in lists_of(tmp_path / "recs.csv").values() for item, *_ in rows} == {ITEMS[0]}


def test_an_average_answers_too(model, data_dir, tmp_path):
    output = tmp_path / "recs.parquet"
    recommend_users(Models([model], views=["full", "last=1"]), data_dir, output, k=2)
    assert len(lists_of(output)) == len(USERS)
    words = [
        "recommend",
        "--model",
        model,
        "--data_dir",
        data_dir,
        "--output",
        str(output),
        "--views",
        "full",
        "last=1",
    ]
    assert main([*words, "-k", "2"]) == 0
    assert main([*words, "--strategy", "sample"]) == 2


def test_a_killed_run_goes_on(model, data_dir, tmp_path, monkeypatch):
    """Killed after some parts, with a process in the middle of one: nothing is lost, nothing is done twice."""
    output, parts = tmp_path / "recs.parquet", tmp_path / "recs.parquet.parts"
    script = f"""
import time
import gflowtrl.pipeline.all_users as module
write = module.write_part
def slow(*args):
    time.sleep(0.3)
    write(*args)
module.write_part = slow
module.recommend_users(module.Models([{model!r}]), {data_dir!r}, {str(output)!r}, k=3, users_per_part=2)
"""
    child = subprocess.Popen([sys.executable, "-c", script])
    try:
        deadline = time.monotonic() + 120
        while len(list(parts.glob("part-*"))) < 3:
            assert time.monotonic() < deadline and child.poll() is None
            time.sleep(0.02)
        with pytest.raises(ValueError, match="Another run writes"):
            recommend_users(Models([model]), data_dir, output, k=3, users_per_part=2)
    finally:
        child.send_signal(signal.SIGKILL)
        child.wait()
    kept = {file: file.stat().st_mtime_ns for file in parts.glob("part-*")}
    assert 3 <= len(kept) < 12 and not output.exists()
    with pytest.raises(ValueError, match="another model, other data or other options"):
        recommend_users(Models([model]), data_dir, output, k=4, users_per_part=2)
    written = []
    from gflowtrl.pipeline import all_users

    write = all_users.write_part
    monkeypatch.setattr(all_users, "write_part", lambda *args: written.append(args[-1]) or write(*args))
    recommend_users(Models([model]), data_dir, output, k=3, users_per_part=2)
    assert len(written) == 12 - len(kept) and not kept.keys() & set(written)
    recommend_users(Models([model]), data_dir, tmp_path / "whole.parquet", k=3, users_per_part=2)
    assert pq.read_table(output).equals(pq.read_table(tmp_path / "whole.parquet"))
    assert not parts.exists()


def test_processes_end_with_a_killed_parent(model, data_dir, tmp_path):
    script = f"""
import gflowtrl.pipeline.all_users as module
if __name__ == "__main__":
    module.recommend_users(
        module.Models([{model!r}]), {data_dir!r}, {str(tmp_path / "recs.parquet")!r}, processes=2, users_per_part=1
    )
"""
    (tmp_path / "script.py").write_text(script)
    child = subprocess.Popen([sys.executable, tmp_path / "script.py"], start_new_session=True)
    deadline = time.monotonic() + 120
    while not list((tmp_path / "recs.parquet.parts").glob("part-*")) and child.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    child.send_signal(signal.SIGKILL)
    child.wait()
    while _group_lives(child.pid):
        assert time.monotonic() < deadline
        time.sleep(0.1)


def _group_lives(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--output", "recs.txt"], "recs.txt ends with '.txt'; choose one of .parquet, .csv, .jsonl"),
        (["--output", "recs"], "recs has no ending; choose"),
        ([], "--output is missing"),
        (["--output", "recs.csv", "--input", "x"], "Leave one out"),
        (["--output", "recs.csv", "--where", "cost < 3"], "is invalid"),
        (["--output", "recs.csv", "--where", "price > 1000"], "No item meets"),
        (["--output", "recs.csv", "--processes", "0"], "processes"),
        (["--output", "recs.csv", "-k", "0"], "k "),
        (["--output", "recs.csv", "--batch_size", "0"], "batch_size"),
        (["--output", "recs.csv", "--views", "last=0"], "last is 0"),
        (["--output", "recs.csv", "--weights", "1", "2"], "2 weights were given for 1 members"),
        (["--output", "recs.csv", "--exclude", "missing.jsonl"], "There is no file missing.jsonl"),
    ],
)
def test_mistakes_are_one_line(model, data_dir, tmp_path, monkeypatch, capsys, words, message):
    monkeypatch.chdir(tmp_path)
    assert main(["recommend", "--model", model, "--data_dir", data_dir, *words]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert not list(tmp_path.iterdir())  # nothing that would keep the corrected command from running


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"user": "u0", "items": 3}', "line 2 must be as"),
        ('{"user": "u0", "items": [5]}', "with items of test, whose items are like 'i001'"),
        ('{"user": "u99", "items": []}', "line 2: user 'u99' is not in test, whose users are like 'u0'"),
        ('{"user": "u1", "items": []}', "line 2: user 'u1' has an earlier line"),
        ("[1]", "line 2: expected a JSON object"),
    ],
)
def test_exclusions_name_the_line(model, data_dir, tmp_path, line, message):
    (tmp_path / "exclude.jsonl").write_text('{"user": "u1", "items": []}\n' + line)
    with pytest.raises(ValueError, match=message):
        recommend_users(Models([model]), data_dir, tmp_path / "recs.csv", exclude=tmp_path / "exclude.jsonl")


def test_exclusions_may_hold_any_character(tmp_path):
    data = InteractionData("test", ["a\u2028b"], [["x\u2028"]], ["x\u2028"])
    row = {"user": "a\u2028b", "items": ["x\u2028"]}
    (tmp_path / "exclude.jsonl").write_bytes(json.dumps(row, ensure_ascii=False).encode() + b"\r\n")
    assert read_exclusions(tmp_path / "exclude.jsonl", data) == {row["user"]: row["items"]}


def test_parts_that_are_damaged_are_written_again(model, data_dir, tmp_path):
    output, parts = tmp_path / "recs.parquet", tmp_path / "recs.parquet.parts"
    parts.mkdir()
    (parts / "part-000001.parquet").write_bytes(b"")
    (parts / "part-000002.parquet").write_bytes(b"PAR1")
    recommend_users(Models([model]), data_dir, output, k=3, users_per_part=5)
    assert list(lists_of(output)) == USERS and not parts.exists()


def test_a_foreign_folder_is_not_removed(model, data_dir, tmp_path):
    (tmp_path / "recs.parquet.parts").mkdir()
    (tmp_path / "recs.parquet.parts" / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="is invalid"):
        recommend_users(Models([model]), data_dir, tmp_path / "recs.parquet", where="cost < 3")
    assert (tmp_path / "recs.parquet.parts" / "notes.txt").read_text() == "mine"


def test_ids_with_special_characters_survive_csv(model, tmp_path):
    users = ["a,b", 'a"b', "a\rb", "a b", "ä"]
    write_folder(InteractionData("test", users, [[ITEMS[0]]] * 5, sorted(ITEMS)), tmp_path / "data")
    recommend_users(Models([model]), tmp_path / "data", tmp_path / "recs.csv", k=1)
    with (tmp_path / "recs.csv").open(newline="") as lines:
        assert [row["user"] for row in csv.DictReader(lines)] == users


def test_an_error_of_a_process_is_its_own(model, data_dir, tmp_path):
    """Not "a process has ended early", and the others do not go on."""
    broken = tmp_path / "broken"
    shutil.copytree(model, broken)
    (broken / "model.safetensors").write_bytes(b"no tensors")
    with pytest.raises(Exception, match="(?i)safetensors|header|tensor"):
        recommend_users(Models([str(broken)]), data_dir, tmp_path / "recs.csv", processes=2, users_per_part=3)
    assert not (tmp_path / "recs.csv.parts").exists() and not list(tmp_path.glob(".*"))


def test_data_of_another_model_is_refused(model, tmp_path):
    write_folder(InteractionData("other", [1], [[2, 3]], [2, 3]), tmp_path / "data")
    with pytest.raises(
        ValueError, match=r"knows no item of other: its items are like 'i001', those of the data like 2"
    ):
        recommend_users(Models([model]), tmp_path / "data", tmp_path / "recs.csv")
    poor = tmp_path / "poor"
    Recommender(tiny_model(len(TOKENIZER)), TOKENIZER, make_catalog()).save_pretrained(poor)
    write_folder(InteractionData("cold", ["a", "b"], [[ITEMS[0]], ["x"]], [*sorted(ITEMS), "x"]), tmp_path / "cold")
    with pytest.raises(ValueError, match="User 'b' has no item that the model knows, and the model has no counts"):
        recommend_users(Models([str(poor)]), tmp_path / "cold", tmp_path / "recs.csv")
    with pytest.raises(ValueError, match="There is no argument 'temprature'"):
        recommend_users(Models([model]), tmp_path / "data", tmp_path / "recs.csv", temprature=2)


def test_options_of_all_users_need_a_folder(model, capsys):
    assert main(["recommend", "--model", model, "--where", "price < 3"]) == 2
    assert "are used with --data_dir only" in capsys.readouterr().err


def test_the_command_reports(model, data_dir, tmp_path, capsys):
    output = tmp_path / "recs.parquet"
    words = ["recommend", "--model", model, "--data_dir", data_dir, "--output", str(output), "-k", "3"]
    assert main(words) == 0
    assert capsys.readouterr().out == (
        "23 users; 1 by popularity, because the model knows no item of their history. 1 items of the histories are "
        f"not in the model's catalog and were skipped. Written to {output}.\n"
    )
    assert main([*words, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["users"] == 23
    assert read_folder(data_dir).users == list(lists_of(output))
