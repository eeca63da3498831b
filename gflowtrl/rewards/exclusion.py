"""Items of a user's history, which `exclude_history` gives no reward."""

from __future__ import annotations

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
