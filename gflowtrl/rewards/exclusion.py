"""Items of a user's history, which `exclude_history` gives no reward."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from gflowtrl.catalog import ItemCatalog
from gflowtrl.data import Step


def seen_items(step: Step, catalog: ItemCatalog) -> Tensor:
    """Return all earlier items of each row's user, except the row's own target.

    The column `history` counts, not only the items in the prompt.

    Returns:
        `(B, W)` indices in `catalog.items`, distinct in each row, padded with -1 on the right.

    Raises:
        ValueError: the rows have no column `history`.
    """

    def compute() -> Tensor:
        histories = step.column("history", "exclude_history")
        targets = step.columns.get("target", [None] * len(step))
        rows = [{*history} - {target} for history, target in zip(histories, targets, strict=True)]
        return pad_sequence([catalog.index_of(sorted(row, key=repr)) for row in rows], True, -1).to(step.device)

    return step.once(catalog, "seen items", compute)


def seen_leaves(step: Step, catalog: ItemCatalog) -> Tensor:
    """Return the leaves of which every item is one of `seen_items`: `(B, W)`, distinct, ascending, padded with -1."""

    def compute() -> Tensor:
        items = seen_items(step, catalog)
        missing = catalog.tree.num_leaves  # sorts after all leaves
        leaves = catalog.item_leaf[items.clamp(min=0)].masked_fill(items < 0, missing).sort(1).values
        first, after = (torch.searchsorted(leaves, leaves, right=right) for right in (False, True))
        sizes = torch.nn.functional.pad(catalog.leaf_sizes, (0, 1))[leaves]
        position = torch.arange(leaves.shape[1], device=leaves.device)
        closed = (leaves < missing) & (after - first == sizes) & (first == position)
        leaves = leaves.masked_fill(~closed, missing).sort(1).values
        return leaves.masked_fill(leaves == missing, -1)

    return step.once(catalog, "seen leaves", compute)


def contains(sets: Tensor, values: Tensor) -> Tensor:
    """Return which values are in their row's set: `(B, W), (B, n) -> bool (B, n)`. The entry -1 is in no set."""
    if not sets.shape[1]:
        return torch.zeros_like(values, dtype=torch.bool)
    ordered = sets.masked_fill(sets < 0, torch.iinfo(sets.dtype).max).sort(1).values
    place = torch.searchsorted(ordered, values.contiguous()).clamp(max=ordered.shape[1] - 1)
    return ordered.gather(1, place) == values


def as_mask(sets: Tensor, size: int) -> Tensor:
    """Return sets of numbers below `size`, padded with -1, as a mask: `(B, W) -> bool (B, size)`."""
    mask = torch.zeros(len(sets), size + 1, dtype=torch.bool, device=sets.device)  # the last column takes the padding
    return mask.scatter_(1, sets.masked_fill(sets < 0, size), True)[:, :size]
