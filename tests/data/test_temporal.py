"""The split by points in time, compared with its definition; times in folders, filters and preparations."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gflowtrl.data import (
    InteractionData,
    SyntheticShop,
    has_clock,
    hold_out_items,
    k_core,
    leave_one_out,
    prepare,
    read_folder,
    temporal_split,
    write_folder,
)
from gflowtrl.data.interactions import CLICKED, Event
from tests.pipeline.micro import micro_settings


ITEMS = list(range(10))


@st.composite
def timed_data(draw):
    users = draw(st.integers(2, 6))
    sequences, times = [], []
    for _ in range(users):
        length = draw(st.integers(1, 7))
        sequences.append(draw(st.lists(st.sampled_from(ITEMS), min_size=length, max_size=length)))
        times.append(sorted(draw(st.lists(st.integers(0, 9), min_size=length, max_size=length))))
    return InteractionData("timed", list(range(users)), sequences, ITEMS, times=times)


@given(timed_data(), st.sampled_from([(0.1, 0.1), (0.2, 0.3), (0.4, 0.4)]))
@settings(max_examples=80, deadline=None)
def test_the_split_follows_its_definition(data, shares):
    validation_share, test_share = shares
    every = [time for times in data.times for time in times]
    first, second = np.quantile(every, [1 - sum(shares), 1 - test_share], method="higher")
    expected = {"train": [], "validation": [], "test": []}
    row_id = 0
    for user, (sequence, times) in enumerate(zip(data.sequences, data.times, strict=True)):
        seen = set()
        for place, (item, time) in enumerate(zip(sequence, times, strict=True)):
            period = "train" if time < first else "validation" if time < second else "test"
            if place and (period == "train" or period not in seen):
                expected[period].append((row_id, user, sequence[:place], item))
            seen.add(period)
            row_id += 1
    if not all(expected.values()):
        with pytest.raises(ValueError, match="rows when it is split at the times"):
            temporal_split(data, *shares)
        return
    splits = temporal_split(data, *shares)
    for name, rows in expected.items():
        found = getattr(splits, name)
        columns = (found[column] for column in ("row_id", "user", "history", "target"))
        assert list(zip(*columns, strict=True)) == rows, name
    before = [
        [i for i, t in zip(*both, strict=True) if t < first] for both in zip(data.sequences, data.times, strict=True)
    ]
    assert splits.train_sequences == before
    assert splits.item_counts.tolist() == [sum(row.count(item) for row in before) for item in ITEMS]


def test_the_shop_has_a_clock_and_nothing_of_the_future_is_counted():
    data, _ = SyntheticShop(**micro_settings("")["data"]["shop"]).generate()
    splits = temporal_split(data, 0.15, 0.15)
    logs = dict(zip(data.users, data.events, strict=True))
    clock = {(user, e.item): e.session for user, log in logs.items() for e in log if e.level >= CLICKED}
    times = {}
    for name in ("train", "validation", "test"):
        rows = getattr(splits, name)
        times[name] = [clock[pair] for pair in zip(rows["user"], rows["target"], strict=True)]
        for row, time in zip(rows, times[name], strict=True):
            assert sorted(row["session_items"]) == sorted(e.item for e in logs[row["user"]] if e.session == time)
    assert max(times["train"]) < min(times["validation"]) <= max(times["validation"]) < min(times["test"])
    limit = min(times["validation"])
    shown = [sum(any(e.item == item and e.session < limit for e in log) for log in data.events) for item in data.items]
    assert splits.impression_counts.tolist() == shown


def test_data_without_times_raise():
    data = InteractionData("still", [1, 2], [[0, 1, 2], [1, 2, 3]], ITEMS)
    assert not has_clock(data)
    with pytest.raises(ValueError, match="still has no times, or not for all users"):
        temporal_split(data)
    timed = InteractionData("timed", [1], [[0, 1, 2]], ITEMS, times=[[1, 2, 3]])
    for shares, message in (
        ((0, 0.1), "validation_share is 0"),
        ((0.6, 0.5), r"validation_share \+ test_share is 1.1"),
    ):
        with pytest.raises(ValueError, match=message):
            temporal_split(timed, *shares)


def test_sessions_without_times_may_be_of_the_future():
    events = [[Event(0, 1, 2), Event(1, 2, 1), Event(1, 3, 2), Event(1, 4, 2)]]
    data = InteractionData("log", [7], [[1, 2, 3, 4]], ITEMS, events=events, times=[[0, 1, 5, 9]])
    assert not has_clock(data)
    with pytest.raises(ValueError, match="what was shown in a session has no time"):
        temporal_split(data, 0.25, 0.25)


def test_histories_may_be_cut():
    data = InteractionData("t", [1], [ITEMS], ITEMS, times=[ITEMS])
    splits = temporal_split(data, 0.2, 0.2, max_history_items=2)
    assert splits.test["history"][:] == [[6, 7]] and max(map(len, splits.train["history"])) == 2


def test_times_stay_with_their_interactions(tmp_path):
    times = [[1, 1, 2.5], [0, 3, 4, 9], [5, 6, 7]]
    data = InteractionData("t", [1, 2, 3], [[0, 1, 2], [0, 1, 2, 3], [0, 1, 2]], ITEMS, times=times)
    write_folder(data, tmp_path)
    assert read_folder(tmp_path).times == times
    assert k_core(data, 3).times == [[1, 1, 2.5], [0, 3, 4], [5, 6, 7]]
    held, new = hold_out_items(data, 0.1, seed=3)
    for user, sequence, kept in zip(held.users, held.sequences, held.times, strict=True):
        original = dict(zip(data.sequences[user - 1], times[user - 1], strict=True))
        assert kept == [original[item] for item in sequence]
    assert len(new) == 1
    plain = InteractionData("t", [1], [[0, 1, 2]], ITEMS)
    write_folder(plain, tmp_path)
    assert read_folder(tmp_path).times is None and leave_one_out(plain).test["target"][:] == [2]


@pytest.mark.parametrize(
    ("times", "message"),
    [
        ("[1, 2]", "line 1: 'times' must be a list of 3 numbers"),
        ('[1, 2, "3"]', "the time '3' is not a number"),
        ("[1, 2, 1e999]", "the time inf is not a number"),
        ("[1, 3, 2]", "the times of user 1 decrease"),
        ("[1, true, 2]", "the time True is not a number"),
    ],
)
def test_broken_times_are_named(tmp_path, times, message):
    (tmp_path / "sequences.jsonl").write_text(f'{{"user": 1, "items": [0, 1, 2], "times": {times}}}\n')
    with pytest.raises(ValueError, match=message):
        read_folder(tmp_path)


def test_times_of_some_users_are_no_times(tmp_path):
    lines = [{"user": 1, "items": [0, 1, 2], "times": [1, 2, 3]}, {"user": 2, "items": [0, 1, 2]}]
    (tmp_path / "sequences.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    data = read_folder(tmp_path)
    assert data.times is None
    with pytest.raises(ValueError, match="has no times, or not for all users"):
        temporal_split(data)


def test_prepare_keeps_the_times_of_a_log(tmp_path):
    log = "user_id,item_id,timestamp\n" + "".join(f"{u},{i},{10 * i + u}\n" for u in (1, 2) for i in (3, 2, 1))
    (tmp_path / "log.csv").write_text(log + "1,3,1\n")
    data, _ = prepare("csv", tmp_path / "log.csv", out=tmp_path / "out", k_core=None, duplicates="last")
    assert data.sequences == [[1, 2, 3], [1, 2, 3]] and data.times == [[11, 21, 31], [12, 22, 32]]
    assert read_folder(tmp_path / "out").times == data.times
    again, _ = prepare("folder", tmp_path / "out", k_core=2)
    assert again.times == data.times and all(type(time) is int for row in again.times for time in row)
    untimed = tmp_path / "untimed.csv"
    untimed.write_text("user_id,item_id\n1,2\n1,3\n2,2\n")
    from gflowtrl.data import Columns

    assert prepare("csv", untimed, k_core=None, columns=Columns(time=None))[0].times is None
