"""A split by points in time: nothing of the future is learned."""

from __future__ import annotations

from functools import partial

import numpy as np
import torch
from datasets import Dataset

from gflowtrl.checks import COUNT, POSITIVE_SHARE, check_number

from .interactions import CLICKED, InteractionData, flat_times, flatten
from .splits import TEST, TRAIN, VALIDATION, Splits, beginnings, count_users, rows_of


def _same(rows: Dataset) -> Dataset:
    return rows


def has_clock(data: InteractionData) -> bool:
    """Return whether interactions have times: `times`, or the sessions of a synthetic shop, which all users share."""
    return data.events is None and data.times is not None or data.synthetic and data.events is not None


def interaction_times(data: InteractionData) -> np.ndarray:
    """Return the time of each interaction, user after user, float64 (T,).

    Raises:
        ValueError: the data have no times, or real events, whose sessions have none.
    """
    if data.events is None and data.times is not None:
        return flat_times(data.times).astype(np.float64)
    if has_clock(data):
        return np.array([event.session for log in data.events for event in log if event.level >= CLICKED], np.float64)
    if data.times is not None:
        raise ValueError(
            f"{data.name} has times and events, but what was shown in a session has no time, so it may be of the "
            f"future. Leave events.jsonl out to split by time."
        )
    raise ValueError(
        f"{data.name} has no times, or not for all users, so it cannot be split by time. Prepare it again from a log "
        f"with times (gflowtrl prepare writes them), or split off the last items of each user (split: leave_one_out)."
    )


def temporal_split(
    data: InteractionData,
    validation_share: float = 0.1,
    test_share: float = 0.1,
    max_history_items: int | None = None,
) -> Splits:
    """Split all interactions at two points in time, the same for all users.

    Everything before the first point is for training, as in `leave_one_out`. Each user's first interaction at or after
    a point, and before the next one, is the target of the validation or the test row; its history is everything before
    it. Leave-one-out lets a model learn from what others did after a test target. With points in time it cannot (Ji
    et al., ACM TOIS 2023): items that are new in the test period have no interactions in training.

    Args:
        data: interactions with times.
        validation_share: share of the interactions between the two points, approximately, because interactions at the
            same time stay together.
        test_share: share of the interactions at or after the second point.
        max_history_items: as for `leave_one_out`.

    Returns:
        The splits. The events of the validation and test periods do not count as impressions, and `impressions`, which
        have no times, are not used.

    Raises:
        ValueError: the data have no times, a share is out of bounds, or a split has no rows.
    """
    check_number("validation_share", validation_share, POSITIVE_SHARE)
    check_number("test_share", test_share, POSITIVE_SHARE)
    check_number("validation_share + test_share", validation_share + test_share, POSITIVE_SHARE)
    check_number("max_history_items", max_history_items, COUNT, optional=True)
    times, (flat, offsets) = interaction_times(data), flatten(data.sequences, data.items)
    shares = [1 - validation_share - test_share, 1 - test_share]
    first, second = np.quantile(times, shares, method="higher")
    user_of = np.repeat(np.arange(len(data.users)), np.diff(offsets))
    position = np.arange(len(flat)) - offsets[user_of]
    period = (times >= first).astype(int) + (times >= second)
    begins = np.append(True, (user_of[1:] != user_of[:-1]) | (period[1:] != period[:-1]))  # of a user in a period
    members = {TRAIN: period == 0, VALIDATION: begins & (period == 1), TEST: begins & (period == 2)}
    splits: dict[str, Dataset] = {}
    for name, member in members.items():
        targets = np.flatnonzero(member & (position >= 1))
        if not len(targets):
            raise ValueError(
                f"{data.name} has no {name} rows when it is split at the times {first:g} and {second:g}: no user has "
                f"an interaction with a history then. Change the shares, or use split: leave_one_out."
            )
        splits[name] = rows_of(data, flat, offsets, targets, max_history_items=max_history_items)
    ends = np.bincount(user_of, weights=period == 0, minlength=len(data.users)).astype(int)  # training items per user
    counts = np.bincount(flat[period == 0], minlength=len(data.items))
    shown = ({event.item for event in log if event.session < first} for log in data.events or ())
    train = splits.pop(TRAIN)
    return Splits(
        **splits,
        make_train=partial(_same, train),
        items=data.items,
        train_sequences=beginnings(flat, offsets, offsets[:-1] + ends, data.items),
        item_counts=torch.from_numpy(counts),
        impression_counts=None if data.events is None else count_users(data.items, shown),
    )
