"""Items of a user's history, which `exclude_history` gives no reward."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from gflowtrl.catalog import ItemCatalog, SeenItems
from gflowtrl.catalog.tree import in_rows
from gflowtrl.data import Step


def seen_items(step: Step, catalog: ItemCatalog) -> SeenItems:
    """Return all earlier items of each row's user, except the row's own target; computed once per step.

    The column `history` counts, not only the items in the prompt.

    Raises:
        ValueError: the rows have no column `history`.
    """
    histories, targets = step.column("history", "exclude_history"), step.columns.get("target")
    return step.once(catalog, "seen items", lambda: catalog.seen_items(histories, targets))


def as_mask(sets: Tensor, size: int) -> Tensor:
    """Return sets of numbers below `size`, padded with -1, as a mask: `(B, W) -> bool (B, size)`."""
    mask = torch.zeros(len(sets), size + 1, dtype=torch.bool, device=sets.device)  # the last column takes the padding
    return mask.scatter_(1, sets.masked_fill(sets < 0, size), True)[:, :size]


def contains(sets: Tensor, values: Tensor) -> Tensor:
    """Return which values are in their row's set: `(B, W), (B, n) -> bool (B, n)`. The entry -1 is in no set.

    Sets are ascending and end with the padding -1; W is at least 1.
    """
    return in_rows(sets.masked_fill(sets < 0, torch.iinfo(sets.dtype).max), values)


def without_reward(rewards: Tensor, excluded: Tensor, any_sign: bool) -> Tensor:
    """Return rewards before the transform in which excluded leaves have no reward.

    Args:
        rewards: `(B, n)`.
        excluded: bool `(B, n)`.
        any_sign: whether rewards may be negative, so that 0 could be the best one. Excluded leaves then have the least
            reward of the row's other leaves, or 0 if there are no others. Without it they have 0.
    """
    if not any_sign:
        return rewards.masked_fill(excluded, 0.0)
    least = rewards.masked_fill(excluded, math.inf).amin(1, keepdim=True)
    return torch.where(excluded, least.masked_fill(excluded.all(1, keepdim=True), 0.0), rewards)


def log_mean_of_others(log_rewards: Tensor, excluded: Tensor, counted: Tensor | None) -> Tensor:
    """Return the log of the mean R, where excluded leaves have R = 0: `(B, 1)`; 0 for a row without other leaves.

    Args:
        log_rewards: `(B, n)`.
        excluded: bool `(B, n)`.
        counted: bool `(B, n)`, the leaves to average over. None: all.
    """
    counted = torch.ones_like(excluded) if counted is None else counted
    others = log_rewards.masked_fill(excluded | ~counted, -math.inf).logsumexp(1, keepdim=True)
    mean = others - counted.sum(1, keepdim=True).log()
    return mean.masked_fill(excluded.all(1, keepdim=True), 0.0)
