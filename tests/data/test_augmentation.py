"""Altered copies of sequences: what is kept, how often, and the rows that they give."""

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gflowtrl.data import (
    Augmentation,
    InteractionData,
    RowWindows,
    SyntheticShop,
    augmented_rows,
    leave_one_out,
    write_folder,
)
from gflowtrl.pipeline.run_data import prepare
from gflowtrl.pipeline.training import _untrained_inputs
from tests.pipeline.micro import micro_recipe, micro_settings


ITEMS = [f"i{number:02}" for number in range(30)]


def make_data() -> InteractionData:
    sequences = [ITEMS[start : start + length] for start, length in ((0, 3), (3, 9), (5, 22), (1, 5))]
    return InteractionData("tiny", ["a", "b", "c", "d"], sequences, ITEMS)


@given(st.lists(st.integers(0, 12), max_size=4), st.floats(0, 0.9), st.floats(0, 6), st.integers(1, 3))
@settings(max_examples=60, deadline=None)
def test_copies_hold_items_of_the_sequence_and_at_least_two(lengths, drop, shift, copies):
    if drop == shift == 0:
        shift = 1.0
    sequences = [ITEMS[:length] for length in lengths]
    found = Augmentation(copies, drop, shift)(sequences, seed=1)
    assert len(found) == copies * len(sequences)
    for number, copy in enumerate(found):
        original = sequences[number % len(sequences)]
        assert len(set(copy)) == len(copy) and set(copy) <= set(original)
        assert len(copy) >= min(2, len(original))
        places = [original.index(item) for item in copy]
        # An item stays within `shift` places of where its kept neighbors would put it.
        assert all(later > earlier - shift for i, earlier in enumerate(places) for later in places[i + 1 :])
    assert found == Augmentation(copies, drop, shift)(sequences, seed=1)


def test_items_are_dropped_with_the_given_probability_and_moved_at_random():
    copies = Augmentation(400, drop=0.25, shift=0)([ITEMS])
    assert all(copy == sorted(copy) for copy in copies)
    assert sum(map(len, copies)) / (400 * len(ITEMS)) == pytest.approx(0.75, abs=0.02)
    for item in ITEMS:  # no position is kept more often
        assert sum(item in copy for copy in copies) / 400 == pytest.approx(0.75, abs=0.1)
    moved = Augmentation(400, drop=0, shift=1.5)([ITEMS])
    assert all(sorted(copy) == ITEMS for copy in moved)
    # Neighbors change places if u + 1 < v for two numbers up to 1.5: (0.5 / 1.5) ** 2 / 2 of the time.
    swapped = sum(copy.index(ITEMS[11]) < copy.index(ITEMS[10]) for copy in moved) / 400
    assert swapped == pytest.approx(1 / 18, abs=0.03)


def test_rows_are_those_of_the_copies():
    data, augmentation = make_data(), Augmentation(3)
    splits = leave_one_out(data)
    rows = augmented_rows(splits.train, data.users, splits.train_sequences, augmentation, seed=5)
    assert rows[: len(splits.train)] == splits.train[:]
    added = rows.select(range(len(splits.train), len(rows)))
    expected = [
        (data.users[number % 4], copy[:end], copy[end])
        for number, copy in enumerate(augmentation(splits.train_sequences, 5))
        for end in range(1, len(copy))
    ]
    assert list(zip(added["user"], added["history"], added["target"], strict=True)) == expected
    assert len(set(rows["row_id"])) == len(rows)
    windows = RowWindows.of(rows, data.items, 20)
    assert sorted(row for group in windows.groups for row in group) == list(range(len(rows)))
    assert max(map(len, windows.groups)) == 19  # those of the longest sequence share one, as without copies


def test_histories_of_copies_may_be_cut_and_row_ids_follow_all_interactions():
    data = make_data()
    splits = leave_one_out(data, 3)
    rows = augmented_rows(splits.train, data.users, splits.train_sequences, Augmentation(1), 0, 39, 3)
    assert max(map(len, rows["history"])) == 3 and rows["row_id"][len(splits.train)] == 39


def test_bad_options_and_sessions_raise():
    for options, message in (
        ({"copies": 0}, "copies is 0"),
        ({"drop": 1.0}, "drop is 1.0"),
        ({"shift": -1.0}, "shift is -1.0"),
        ({"drop": 0, "shift": 0}, "both 0"),
    ):
        with pytest.raises(ValueError, match=message):
            Augmentation(**options)
    data, _ = SyntheticShop(**micro_settings("")["data"]["shop"]).generate()
    splits = leave_one_out(data)
    with pytest.raises(ValueError, match="the training rows have session_items, session_levels"):
        augmented_rows(splits.train, data.users, splits.train_sequences, Augmentation())


def test_a_run_trains_on_the_copies_and_its_teacher_does_not(tmp_path):
    data, _ = SyntheticShop(**micro_settings("")["data"]["shop"]).generate()
    write_folder(replace(data, events=None), tmp_path / "data")
    section = {"max_history_items": 6}
    plain, altered = (
        prepare(micro_recipe(tmp_path / "out", data_dir=str(tmp_path / "data"), data=section | more))
        for more in ({}, {"augmentation": {"copies": 2}})
    )
    assert plain.train is plain.splits.train and plain.train_sequences is plain.splits.train_sequences
    assert len(altered.train) > 2 * len(plain.train) and len(altered.train_sequences) == 3 * len(data.users)
    assert altered.splits.train_sequences == plain.splits.train_sequences
    assert altered.fingerprint == plain.fingerprint
    inputs = _untrained_inputs(altered)
    assert inputs.pop("augmentation") == {"copies": 2, "drop": 0.2, "shift": 1.5}
    assert inputs == _untrained_inputs(plain)
