"""Leave-one-out splits of interaction data."""

import warnings
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from itertools import groupby
from operator import itemgetter

import numpy as np
import pyarrow as pa
import torch
from datasets import Dataset
from torch import Tensor

from gflowtrl.catalog import Item
from gflowtrl.checks import COUNT, check_number

from .interactions import CLICKED, Event, InteractionData, flatten
from .sequences import Sequences, ranges


TRAIN, VALIDATION, TEST = "train", "validation", "test"


@dataclass
class Splits:
    """Leave-one-out splits of an `InteractionData`.

    Attributes:
        validation, test, train: rows of `row_id`, `user`, `history`, `target` and, if the data has events,
            `session_items` and `session_levels` (see `leave_one_out`).
        items: the whole catalog, in the order of the counts.
        train_sequences: all items but the last two of each user, empty for users without splits; the training data of
            teachers and supervised models.
        item_counts: long (items,), occurrences in `train_sequences`.
        impression_counts: long (items,), how often the log has shown each item, its propensity: the data's
            `impressions`, or with events the number of users who were shown the item up to and including the session
            of their last training item, without their held-out items; `None` if the data have neither.
        make_train: makes `train`.
    """

    validation: Dataset
    test: Dataset
    items: list[Item]
    train_sequences: Sequence[list[Item]]
    item_counts: Tensor
    impression_counts: Tensor | None
    make_train: Callable[[], Dataset] = field(repr=False)

    @cached_property
    def train(self) -> Dataset:
        """The training rows, which are made when they are needed; those of a million users take a gigabyte."""
        return self.make_train()

    @property
    def exposure_counts(self) -> Tensor:
        """How often each item was shown, `(items,)`; without impressions, how often it was taken."""
        return self.item_counts if self.impression_counts is None else self.impression_counts


def leave_one_out(data: InteractionData, max_history_items: int | None = None) -> Splits:
    """Split the targets of each user: the last item is for test, the one before for validation, others for training.

    A user's first item is never a target. The history of a row is all items before its target; prompts contain its
    most recent items (`PromptEncoder`), in training those of its window (`user_windows`). The `row_id` is the index of
    the target interaction in the whole data, so it is unique over all three splits and independent of
    `max_history_items`.

    If `data` has events, `session_items` are the items of the target's session, including the target, and
    `session_levels` are their levels (0 shown, 1 clicked, 2 purchased). They never contain the user's two held-out
    items in a training row, nor the test item in a validation row.

    Users with fewer than 3 items cannot be split. Where the data have exposed items, on which these users may still be
    measured, they have no rows, and a warning says how many they are; otherwise they are an error.

    Args:
        data: the interactions.
        max_history_items: maximum items per history; None: no limit. Memory grows with the square of a user's number
            of items, so logs of thousands of items per user need a limit, but then the rows of a user whose histories
            were cut share no computation in training.

    Raises:
        ValueError: if a user has fewer than 3 items (see above), `max_history_items` is below 1, or the histories of a
            split have 2^31 items or more in total.
    """
    check_number("max_history_items", max_history_items, COUNT, optional=True)
    flat, offsets = flatten(data.sequences, data.items)
    lengths = np.diff(offsets)
    _check_lengths(data, lengths)
    starts, stops = offsets[:-1][lengths >= 3], offsets[1:][lengths >= 3]
    learned = beginnings(flat, offsets, np.maximum(offsets[1:] - 2, offsets[:-1]), data.items)
    _check_total(data, starts, stops - 2, max_history_items)

    return Splits(
        validation=rows_of(data, flat, offsets, stops - 2, 1, max_history_items),
        test=rows_of(data, flat, offsets, stops - 1, 0, max_history_items),
        items=data.items,
        train_sequences=learned,
        item_counts=torch.from_numpy(np.bincount(learned.values, minlength=len(data.items))),
        impression_counts=_impression_counts(data),
        make_train=partial(_train_rows, data, max_history_items),
    )


def _train_rows(data: InteractionData, max_history_items: int | None) -> Dataset:
    flat, offsets = flatten(data.sequences, data.items)
    whole = np.diff(offsets) >= 3
    targets = ranges(offsets[:-1][whole] + 1, offsets[1:][whole] - 2)
    return rows_of(data, flat, offsets, targets, 2, max_history_items)


def _check_total(data: InteractionData, starts: np.ndarray, stops: np.ndarray, most: int | None) -> None:
    """Check that histories of up to `most` items of all targets of the sequences from `starts` to `stops` fit."""
    lengths = stops - starts
    whole = np.minimum(lengths - 1, lengths if most is None else most)  # histories of at most `most` items
    _check_size(data, int((whole * (whole + 1) // 2 + (lengths - 1 - whole) * whole).sum()))


def _check_size(data: InteractionData, total: int) -> None:
    if total >= 2**31:
        raise ValueError(f"{data.name}: the histories of a split have {total} items in total. Set max_history_items.")


def beginnings(flat: np.ndarray, offsets: np.ndarray, stops: np.ndarray, items: list[Item]) -> Sequences[Item]:
    """Return the beginnings of sequences.

    Args:
        flat, offsets: from `flatten`.
        stops: where the beginnings end in `flat`, `(sequences,)`.
        items: the catalog.
    """
    return Sequences(flat.astype(np.int32), offsets, items).parts(offsets[:-1], stops)


def rows_of(
    data: InteractionData,
    flat: np.ndarray,
    offsets: np.ndarray,
    targets: np.ndarray,
    hidden_tail: int = 0,
    max_history_items: int | None = None,
) -> Dataset:
    """Build rows of all items before their targets.

    Args:
        data: the interactions.
        flat, offsets: from `flatten`.
        targets: positions of the targets in `flat`.
        hidden_tail: items at the end of each sequence that sessions must not contain.
        max_history_items: maximum items per history.
    """
    users = np.searchsorted(offsets, targets, side="right") - 1
    starts = offsets[users]
    if max_history_items is not None:
        starts = np.maximum(starts, targets - max_history_items)
    columns = _row_columns(data, flat, users, starts, targets)
    if data.events is not None:
        columns |= _session_columns(data, users, targets - offsets[users], hidden_tail)
    return Dataset(pa.table(columns))


def _check_lengths(data: InteractionData, lengths: np.ndarray) -> None:
    short = lengths < 3
    if not short.any():
        return
    if data.exposed is None or short.all():
        row = int(np.argmax(short))
        raise ValueError(
            f"{data.name}: user {data.users[row]!r} has {lengths[row]} items, and {short.sum()} users have "
            "fewer than the 3 that leave-one-out needs (train, validation, test). Filter first: k_core(data, k=5)."
        )
    warnings.warn(
        f"{data.name}: {short.sum():,} of {len(lengths):,} users have fewer than 3 items and take no part in "
        f"training, validation and test. They are measured on the items that they were exposed to.",
        stacklevel=3,
    )


def ragged(values: pa.Array, lengths: np.ndarray) -> pa.ListArray:
    """Split `values` into consecutive lists of the given lengths."""
    return pa.ListArray.from_arrays(pa.array(np.cumsum([0, *lengths], dtype=np.int32)), values)


def _row_columns(
    data: InteractionData, flat: np.ndarray, users: np.ndarray, starts: np.ndarray, targets: np.ndarray
) -> dict[str, pa.Array]:
    """Build the columns of the rows with targets `flat[targets]` and histories `flat[start:target]`."""
    _check_size(data, int((targets - starts).sum()))
    items = pa.array(data.items)
    return {
        "row_id": pa.array(targets),
        "user": pa.array(data.users).take(pa.array(users)),
        "history": ragged(items.take(pa.array(flat[ranges(starts, targets)])), targets - starts),
        "target": items.take(pa.array(flat[targets])),
    }


def _session_columns(
    data: InteractionData, rows: np.ndarray, positions: np.ndarray, hidden_tail: int
) -> dict[str, pa.Array]:
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


def _impression_counts(data: InteractionData) -> Tensor | None:
    if data.impressions is not None:
        return torch.tensor([data.impressions.get(item, 0) for item in data.items])
    if data.events is None:
        return None
    shown = []
    for sequence, log in zip(data.sequences, data.events, strict=True):
        if len(sequence) >= 3:  # shorter ones take no part in training
            last = [event.session for event in log if event.level >= CLICKED][-3]
            shown.append({event.item for event in log if event.session <= last} - set(sequence[-2:]))
    return count_users(data.items, shown)


def count_users(items: Sequence[Item], of_users: Iterable[set[Item]]) -> Tensor:
    """Return how many users have each item in their set: long `(len(items),)`."""
    index_of = {item: index for index, item in enumerate(items)}
    counts = torch.zeros(len(items), dtype=torch.long)
    for found in of_users:
        counts[[index_of[item] for item in found]] += 1
    return counts
