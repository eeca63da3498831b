import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gflowtrl.data import CLICKED, InteractionData, k_core, leave_one_out, user_windows


def make(sequences, **extra):
    items = sorted({item for sequence in sequences for item in sequence})
    return InteractionData("toy", list(range(len(sequences))), sequences, items, **extra)


sequences_of_users = st.lists(st.lists(st.integers(0, 9), min_size=3, max_size=12), min_size=1, max_size=6)


@settings(max_examples=60, deadline=None)
@given(sequences_of_users, st.sampled_from([None, 1, 3, 20]))
def test_leave_one_out_follows_its_definition(sequences, max_history):
    splits = leave_one_out(make(sequences), max_history)
    expected = {"train": [], "validation": [], "test": []}
    row_id = 0
    for user, items in enumerate(sequences):
        for position, target in enumerate(items):
            name = {len(items) - 1: "test", len(items) - 2: "validation"}.get(position, "train" if position else None)
            history = items[:position][-max_history:] if max_history else items[:position]
            if name:
                row = {"row_id": row_id, "user": user, "history": history, "target": target}
                expected[name].append(row)
            row_id += 1
    for name, rows in expected.items():
        assert getattr(splits, name).to_list() == rows
    assert splits.train_sequences == [items[:-2] for items in sequences]
    flat = [item for items in splits.train_sequences for item in items]
    assert splits.item_counts.tolist() == [flat.count(item) for item in splits.items]
    assert splits.impression_counts is None


def test_string_ids_are_kept():
    data = InteractionData("toy", ["u", "v"], [["a", "b", "c"], ["c", "a", "b", "c"]], ["a", "b", "c"])
    splits = leave_one_out(data)
    assert splits.train.to_list() == [{"row_id": 4, "user": "v", "history": ["c"], "target": "a"}]
    assert splits.test["target"][:] == ["c", "c"]


def test_leave_one_out_refuses_short_sequences():
    with pytest.raises(ValueError, match="user 1 has 2 items, and 1 users have fewer than the 3 .*k_core"):
        leave_one_out(make([[1, 2, 3], [1, 2]]))
    with pytest.raises(ValueError, match="max_history_items"):
        leave_one_out(make([[1, 2, 3]]), 0)


def test_sessions_contain_no_held_out_item(small_shop):
    data, _ = small_shop
    splits = leave_one_out(data)
    for name, hidden_tail in (("train", 2), ("validation", 1), ("test", 0)):
        for row in getattr(splits, name).to_list():
            sequence, log = data.sequences[row["user"]], data.events[row["user"]]
            hidden = sequence[len(sequence) - hidden_tail :]
            (session,) = {event.session for event in log if event.item == row["target"] and event.level >= CLICKED}
            expected = [(e.item, e.level) for e in log if e.session == session and e.item not in hidden]
            assert list(zip(row["session_items"], row["session_levels"], strict=True)) == expected
            assert row["target"] in row["session_items"]


def test_impressions_are_counted_up_to_the_last_training_item(small_shop):
    data, _ = small_shop
    seen = [0] * len(data.items)
    for sequence, log in zip(data.sequences, data.events, strict=True):
        (last,) = {event.session for event in log if event.item == sequence[-3] and event.level >= CLICKED}
        for item in {event.item for event in log if event.session <= last}:
            seen[item] += item not in sequence[-2:]
    assert leave_one_out(data).impression_counts.tolist() == seen


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 70), max_size=5), st.integers(1, 20))
def test_windows_cover_every_target_once(lengths, max_items):
    sequences = [[(user, position) for position in range(length)] for user, length in enumerate(lengths)]
    covered = []
    for items, first_target in user_windows(sequences, max_items):
        assert len(items) <= max_items + 1
        user, start = items[0]
        assert items == sequences[user][start : start + len(items)]  # a contiguous part of one sequence
        for position in range(first_target, len(items)):
            assert position >= min(start + position, max_items // 2)  # enough history
            covered.append(items[position])
    assert sorted(covered) == [target for sequence in sequences for target in sequence[1:]]


def test_a_sequence_that_fits_is_one_window():
    assert user_windows([list(range(21)), [5], []], 20) == [(list(range(21)), 1)]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.lists(st.integers(0, 5), min_size=1, max_size=6), min_size=1, max_size=8), st.integers(1, 3))
def test_k_core_is_the_largest_part_with_k_of_each(sequences, k):
    def drop_one_at_a_time(rows, rng):
        """Oracle: remove single users or items below k in any order; the k-core does not depend on the order."""
        rows = {user: list(items) for user, items in enumerate(rows)}
        while True:
            flat = [item for items in rows.values() for item in items]
            bad_items = sorted({item for item in flat if flat.count(item) < k})
            bad_users = [user for user, items in rows.items() if len(items) < k]
            if not bad_items and not bad_users:
                return rows
            if bad_items and (not bad_users or rng.random() < 0.5):
                dropped = rng.choice(bad_items)
                rows = {user: [item for item in items if item != dropped] for user, items in rows.items()}
            else:
                del rows[rng.choice(bad_users)]

    expected = drop_one_at_a_time(sequences, random.Random(0))
    if not expected:
        with pytest.raises(ValueError, match=f"no {k}-core"):
            k_core(make(sequences), k)
        return
    core = k_core(make(sequences), k)
    assert dict(zip(core.users, core.sequences, strict=True)) == expected
    assert core.items == sorted({item for items in expected.values() for item in items})


def test_k_core_filters_all_parts_alike(small_shop):
    data, _ = small_shop
    core = k_core(data, 6)  # the constructor checks that events, ids and sequences agree
    assert 0 < len(core.users) < len(data.users) and core.synthetic
    assert list(core.semantic_ids) == list(core.item_features) == core.items
    leave_one_out(core)
    with pytest.raises(ValueError, match="k is 0; it must be a whole number of at least 1"):
        k_core(data, 0)
