"""The items that users have had before, for rankings that leave them out."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class SeenItems:
    """Items that each of B users has had, as `ItemCatalog.seen_items` finds them. The rows are the users,
    and all tensors are on the CPU.

    Attributes:
        leaves: `(B, X)` leaves of which a user has had every item, ascending, padded with -1 (X is at least 1). A beam
            search among unseen items excludes them. A leaf with other items stays.
        rows, items: `(E,)` all pairs of a row and a position in `catalog.items`, each once, sorted.
        most: the largest number of items of a row.
    """

    leaves: Tensor
    rows: Tensor
    items: Tensor
    most: int
    _keys: Tensor  # row * number of items + item, sorted
    _leaf_keys: Tensor  # row * number of leaves + leaf, sorted, once per item
    _num_items: int
    _num_leaves: int

    @classmethod
    def of(cls, keys: Tensor, item_leaf: Tensor, leaf_sizes: Tensor, num_rows: int) -> SeenItems:
        """Collect the seen items of all rows.

        Args:
            keys: row * number of items + item, sorted and distinct.
            item_leaf: `(items,)` leaf of each item.
            leaf_sizes: `(N,)` number of candidates at each leaf.
            num_rows: B.
        """
        num_items, num_leaves = len(item_leaf), len(leaf_sizes)
        rows, items = keys // num_items, keys % num_items
        leaf_keys = (rows * num_leaves + item_leaf[items]).sort().values
        distinct, count = leaf_keys.unique_consecutive(return_counts=True)
        whole = distinct[count == leaf_sizes[distinct % num_leaves]]
        row, per_row = whole // num_leaves, torch.bincount(whole // num_leaves, minlength=num_rows)
        column = torch.arange(len(whole), device=keys.device) - (per_row.cumsum(0) - per_row)[row]
        width = max(int(per_row.max()), 1) if num_rows else 1
        leaves = keys.new_full((num_rows, width), -1)
        leaves[row, column] = whole % num_leaves
        most = int(torch.bincount(rows).max()) if len(rows) else 0
        return cls(leaves, rows, items, most, keys, leaf_keys, num_items, num_leaves)

    def contains(self, items: Tensor) -> Tensor:
        """Return whether the user of each row has had the items: `(B, R) -> bool (B, R)`; False for -1."""
        begin, end = self._range(self._keys, items, self._num_items)
        return end > begin

    def counts(self, leaves: Tensor) -> Tensor:
        """Return how many items of each leaf the user of the row has had: `(B, R) -> (B, R)`; 0 for -1."""
        begin, end = self._range(self._leaf_keys, leaves, self._num_leaves)
        return end - begin

    def without(self, items: Tensor, k: int) -> Tensor:
        """Return the first `k` items of each row that its user has not had.

        Args:
            items: `(B, R)` positions in `catalog.items`, best first; -1 is skipped.
            k: length of the lists. They are complete if R is at least `k + most`.

        Returns:
            `(B, k)` positions in `catalog.items`, padded with -1.
        """
        items = items.to(self._keys.device)
        kept = (items >= 0) & ~self.contains(items)
        order = (~kept).to(torch.uint8).argsort(dim=1, stable=True)[:, :k]
        found = items.masked_fill(~kept, -1).gather(1, order)
        return torch.nn.functional.pad(found, (0, k - found.shape[1]), value=-1)

    @staticmethod
    def _range(keys: Tensor, values: Tensor, size: int) -> tuple[Tensor, Tensor]:
        """Return where the entries of each row with each value begin and end in `keys`."""
        values = values.to(keys.device)
        wanted = torch.arange(len(values), device=keys.device)[:, None] * size + values
        wanted = wanted.masked_fill(values < 0, -1)
        return torch.searchsorted(keys, wanted), torch.searchsorted(keys, wanted, right=True)
