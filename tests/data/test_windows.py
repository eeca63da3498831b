"""Windows of training rows: the items that prompts contain, for any subset and any order of the rows."""

import numpy as np
import pytest
import torch
from datasets import Dataset, Features, List, Value
from hypothesis import given, settings
from hypothesis import strategies as st

from gflowtrl.data import GroupedEpochSampler, LengthGroupedEpochSampler, RowWindows, Windows, user_windows
from gflowtrl.data import windows as module


ITEMS = ["a", "b", "c"]
USERS = st.lists(st.lists(st.sampled_from(ITEMS), min_size=2, max_size=14), min_size=1, max_size=5)
HISTORIES = st.lists(st.lists(st.sampled_from(ITEMS), min_size=1, max_size=5), min_size=1, max_size=12)


def rows_of(sequences):
    rows = [{"user": u, "history": s[:p], "target": s[p]} for u, s in enumerate(sequences) for p in range(1, len(s))]
    return [{"row_id": 5 + 3 * number, **row} for number, row in enumerate(rows)]


@settings(deadline=None)
@given(USERS, st.integers(1, 6), st.randoms(use_true_random=False))
def test_rows_see_the_windows_of_their_users(sequences, max_items, chance):
    rows = rows_of(sequences)
    expected, window_of, windows = [], [], 0
    for window in user_windows(sequences, max_items):
        expected += range(window.first_target, len(window.items))
        window_of += [windows] * (len(window.items) - window.first_target)
        windows += 1
    order = chance.sample(range(len(rows)), len(rows))
    found = RowWindows.of(Dataset.from_list(rows).select(order), ITEMS, max_items)
    assert found.seen_by([row["row_id"] for row in rows]) == expected
    assert found.cut == sum(seen < len(row["history"]) for seen, row in zip(expected, rows, strict=True))
    # A window's rows are a group, the shortest first.
    groups = [[order[row] for row in group] for group in found.groups]
    assert sorted(map(sorted, groups)) == [
        [row for row in range(len(rows)) if window_of[row] == window] for window in range(windows)
    ]
    for group, length in zip(groups, found.lengths, strict=True):
        assert [expected[row] for row in group] == sorted(expected[row] for row in group)
        assert length == expected[group[-1]]


@settings(deadline=None)
@given(USERS, st.integers(1, 6), st.randoms(use_true_random=False))
def test_missing_rows_do_not_change_the_windows_of_the_others(sequences, max_items, chance):
    """Each user's last row remains, and any of the others: the prompts of the remaining rows do not change."""
    rows = rows_of(sequences)
    kept = [
        row for row, following in zip(rows, [*rows[1:], {"user": None}], strict=True)
        if row["user"] != following["user"] or chance.random() < 0.5
    ]  # fmt: skip
    whole, part = (RowWindows.of(Dataset.from_list(some), ITEMS, max_items) for some in (rows, kept))
    ids = [row["row_id"] for row in kept]
    assert part.seen_by(ids) == whole.seen_by(ids)


def test_rows_without_users_are_grouped_by_their_items():
    sequences = [["a", "b", "c", "a"], ["b", "b", "c"]]
    rows = Dataset.from_list(rows_of(sequences)).remove_columns("user")
    assert sorted(RowWindows.of(rows, ITEMS, 9).groups) == [[0, 1, 2], [3, 4]]


@pytest.mark.parametrize("users", [[None] * 5, [None, "x", None, "x", "x"], [{"a": 0}] * 5, [[1]] * 5])
def test_users_of_any_type(users):
    rows = rows_of([["a", "b", "c", "a", "b", "c"]])
    with_users = Dataset.from_list([row | {"user": user} for row, user in zip(rows, users, strict=True)])
    groups = sorted(RowWindows.of(with_users, ITEMS, 9).groups)
    assert groups == ([[0, 1, 2, 3, 4]] if users[0] == users[1] else [[0, 2], [1, 3, 4]])


def test_item_ids_wider_than_the_history_type():
    rows = Dataset.from_list(
        [{"row_id": 0, "history": [1, 2], "target": 3}, {"row_id": 1, "history": [1], "target": 2}]
    )
    types = Features({"row_id": Value("int64"), "history": List(Value("int32")), "target": Value("int16")})
    assert RowWindows.of(rows.cast(types), [1, 2, 3, 2**40], 9).groups == [[1, 0]]


def test_rows_with_cut_histories_are_separate():
    sequence = [ITEMS[(position * position) % 3] for position in range(9)]
    rows = [{"row_id": p, "history": sequence[max(0, p - 3) : p], "target": sequence[p]} for p in range(1, 9)]
    found = RowWindows.of(Dataset.from_list(rows), ITEMS, 3)
    assert sorted(found.groups) == [[0, 1, 2], [3], [4], [5], [6], [7]]
    assert found.seen_by([6]) == [3] and found.cut == 0


def test_large_data_is_processed_in_parts(monkeypatch):
    sequences = [[ITEMS[(user + position * position) % 3] for position in range(9)] for user in range(20)]
    rows = Dataset.from_list(rows_of(sequences))
    whole = RowWindows.of(rows, ITEMS, 4)
    for name, size in (("CHUNK", 7), ("ITEMS_AT_ONCE", 10)):
        monkeypatch.setattr(module, name, size)
        parts = RowWindows.of(rows, ITEMS, 4)
        assert parts.groups == whole.groups and parts.seen.equal(whole.seen)


def test_separate_rows_contain_their_last_items():
    rows = Dataset.from_list(rows_of([["a", "b", "c", "a", "b"]]))
    found = RowWindows.separate(rows, 2)
    assert found.seen_by(rows["row_id"][:]) == [1, 2, 2, 2]
    assert (found.cut, found.least_of_cut, found.groups) == (2, 2, [[0], [1], [2], [3]])


@given(HISTORIES, st.data())
def test_batches_are_packed_into_as_few_sequences_as_possible(histories, data):
    targets = data.draw(st.lists(st.sampled_from(ITEMS), min_size=len(histories), max_size=len(histories)))
    packed = Windows.pack(histories, targets)
    assert packed.histories == histories
    rows = [(*history, target) for history, target in zip(histories, targets, strict=True)]
    assert all(tuple(packed.items[u][: len(r)]) == r for u, r in zip(packed.trunk.tolist(), rows, strict=True))
    # Only a row that is not a prefix of another row needs its own sequence.
    assert len(packed.items) == len({r for r in rows if not any(q != r and q[: len(r)] == r for q in rows)})
    for u, prompt in enumerate(packed.prompts):
        assert len(prompt) == max(seen for seen, trunk in zip(packed.seen, packed.trunk, strict=True) if trunk == u)
    half = packed.rows(slice(1, 3))
    assert half.histories == histories[1:3] and len(half.items) == len(set(packed.trunk[1:3].tolist()))


@given(st.lists(st.integers(1, 7), min_size=1, max_size=40), st.integers(1, 9), st.integers(0, 3))
def test_an_epoch_contains_each_row_once_and_keeps_groups_together(sizes, batch_size, epoch):
    ends = np.cumsum(sizes).tolist()
    groups = [list(range(end - size, end)) for size, end in zip(sizes, ends, strict=True)]
    sampler = GroupedEpochSampler(groups, sizes, batch_size, seed=1, spread=3)
    sampler.set_epoch(epoch)
    order = list(sampler)
    assert order == list(sampler)
    assert sorted(order) == list(range(ends[-1])) and len(sampler) == ends[-1]
    batches = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
    pieces = [sum(any(row in batch for row in group) for batch in batches) for group in groups]
    # A group may be cut only at the ends of a batch.
    assert sum(pieces) <= len(groups) + len(batches) - 1 or batch_size < max(sizes)


def test_order_changes_from_epoch_to_epoch():
    sampler = LengthGroupedEpochSampler(torch.ones(100, dtype=torch.long), 4, seed=0)
    first = list(sampler)
    sampler.set_epoch(1)
    assert list(sampler) != first


def test_the_error_names_a_row_that_is_not_in_the_data():
    found = RowWindows.of(Dataset.from_list(rows_of([["a", "b"]])), ITEMS, 3)
    with pytest.raises(KeyError, match="no row 7"):
        found.seen_by([5, 7])
