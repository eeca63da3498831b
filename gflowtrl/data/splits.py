"""Leave-one-out splits, and the windows of one-row-per-user supervised fine-tuning."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from operator import itemgetter
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import torch
from datasets import Dataset
from torch import Tensor

from gflowtrl.catalog import Item
from gflowtrl.checks import COUNT, check_number

from .interactions import CLICKED, Event, InteractionData, flatten, ranges


TRAIN, VALIDATION, TEST = "train", "validation", "test"


@dataclass
class Splits:
    """Leave-one-out splits of an `InteractionData`.

    Attributes:
        train, validation, test: rows of `row_id`, `user`, `history`, `target`, and where there are events also
            `session_items` and `session_levels` (see `leave_one_out`).
        items: the whole catalog, the order of the counts.
        train_sequences: for each user all items but the last two: what teachers and supervised models are fitted on.
        item_counts: long (items,), occurrences in `train_sequences`.
        impression_counts: long (items,), number of users who were shown the item up to and including the session of
            their last training item, held-out items not counted; `None` without events. The propensity of the log.
    """

    train: Dataset
    validation: Dataset
    test: Dataset
    items: list[Item]
    train_sequences: list[list[Item]]
    item_counts: Tensor
    impression_counts: Tensor | None = None


def leave_one_out(data: InteractionData, max_history_items: int | None = None) -> Splits:
    """The last item of each user is the test target, the one before it validation, each other but the first training.

    The history of a row is everything before its target; prompts hold its last items (`PromptEncoder`), in training
    those of its window (`user_windows`). Its `row_id` is the number of the target interaction in the whole data, so it
    is unique over all three splits and does not depend on the cut.

    Where `data` has events, `session_items` are the items of the session in which the target was taken, target
    included, and `session_levels` their levels (0 shown, 1 clicked, 2 purchased). A training row never shows the
    user's two held-out items there, a validation row never the test item.

    Args:
        data: the interactions.
        max_history_items: cut histories to their last so many items. Memory grows with the square of what a user has
            done, so logs of thousands of items per user need it; but rows of a user whose histories were cut share
            nothing in training.

    Raises:
        ValueError: a user has fewer than 3 items, `max_history_items` is below 1, or the histories hold more items
            than a table takes.
    """
    check_number("max_history_items", max_history_items, COUNT, optional=True)
    flat, offsets = flatten(data.sequences, data.items)
    lengths = np.diff(offsets)
    if (lengths < 3).any():
        row = int(np.argmax(lengths < 3))
        raise ValueError(
            f"{data.name}: user {data.users[row]!r} has {lengths[row]} items, and {(lengths < 3).sum()} users have "
            "fewer than the 3 that leave-one-out needs (train, validation, test). Filter first: k_core(data, k=5)."
        )
    user_of = np.repeat(np.arange(len(lengths)), lengths)
    position = np.arange(len(flat)) - offsets[user_of]
    items_after = lengths[user_of] - 1 - position
    members = {TRAIN: (items_after >= 2) & (position >= 1), VALIDATION: items_after == 1, TEST: items_after == 0}

    item_ids, user_ids = pa.array(data.items), pa.array(data.users)
    splits = {}
    for name, member in members.items():
        targets = np.flatnonzero(member)
        starts = offsets[user_of[targets]]
        if max_history_items is not None:
            starts = np.maximum(starts, targets - max_history_items)
        if (total := int((targets - starts).sum())) >= 2**31:
            raise ValueError(f"{data.name}: the histories of all rows hold {total} items; set max_history_items.")
        columns = {
            "row_id": pa.array(targets),
            "user": user_ids.take(pa.array(user_of[targets])),
            "history": ragged(item_ids.take(pa.array(flat[ranges(starts, targets)])), targets - starts),
            "target": item_ids.take(pa.array(flat[targets])),
        }
        if data.events is not None:
            columns |= _session_columns(data, user_of[targets], position[targets], name)
        splits[name] = Dataset(pa.table(columns))

    counts = np.bincount(flat[items_after >= 2], minlength=len(data.items))
    return Splits(
        **splits,
        items=data.items,
        train_sequences=[sequence[:-2] for sequence in data.sequences],
        item_counts=torch.from_numpy(counts),
        impression_counts=None if data.events is None else _impression_counts(data),
    )


class Window(NamedTuple):
    """A piece of a sequence, of which the items from position `first_target` on are targets."""

    items: list[Item]
    first_target: int


def user_windows(sequences: Sequence[Sequence[Item]], max_items: int = 20) -> list[Window]:
    """Cut sequences so that each item but a user's first is a target in exactly one window.

    A window has at most `max_items + 1` items, so that no target sees more than the `max_items` before it that it
    would see as a row of its own. A sequence that fits is one window. A longer one becomes overlapping windows, in
    which a target beyond the first window sees at least `max_items // 2` items. Sequences of fewer than two items
    give none.
    """
    check_number("max_items", max_items, COUNT)
    stride = max_items - max_items // 2
    windows = []
    for sequence in sequences:
        done, end = 1, max_items + 1  # items before `done` have been targets, or are the first
        while done < len(sequence):
            end = min(end, len(sequence))
            start = max(0, end - max_items - 1)
            windows.append(Window(list(sequence[start:end]), done - start))
            done, end = end, end + stride
    return windows


def ragged(values: pa.Array, lengths: np.ndarray) -> pa.ListArray:
    """A column of lists, which follow each other in `values`."""
    return pa.ListArray.from_arrays(pa.array(np.cumsum([0, *lengths], dtype=np.int32)), values)


def _session_columns(
    data: InteractionData, rows: np.ndarray, positions: np.ndarray, split: str
) -> dict[str, pa.Array]:
    hidden_tail = {TRAIN: 2, VALIDATION: 1, TEST: 0}[split]
    items, levels, lengths = [], [], []
    for row, targets in groupby(zip(rows.tolist(), positions.tolist(), strict=True), itemgetter(0)):
        sequence, log = data.sequences[row], data.events[row]
        hidden = set(sequence[len(sequence) - hidden_tail :])
        taken = [event.session for event in log if event.level >= CLICKED]
        by_session: defaultdict[int, list[Event]] = defaultdict(list)
        for event in log:
            if event.item not in hidden:
                by_session[event.session].append(event)
        for _, position in targets:
            session = by_session[taken[position]]
            items += [event.item for event in session]
            levels += [event.level for event in session]
            lengths.append(len(session))
    item_type = pa.array(data.items).type
    return {
        "session_items": ragged(pa.array(items, item_type), np.array(lengths)),
        "session_levels": ragged(pa.array(levels, pa.int64()), np.array(lengths)),
    }


def _impression_counts(data: InteractionData) -> Tensor:
    index_of = {item: index for index, item in enumerate(data.items)}
    counts = torch.zeros(len(data.items), dtype=torch.long)
    for sequence, log in zip(data.sequences, data.events, strict=True):
        last = [event.session for event in log if event.level >= CLICKED][-3]
        seen = {event.item for event in log if event.session <= last} - set(sequence[-2:])
        counts[[index_of[item] for item in seen]] += 1
    return counts
