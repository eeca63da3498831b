"""Teachers from counts of item pairs: item-item nearest neighbors and transitions."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import scipy.sparse as sp
import torch
from torch import Tensor, nn

from gflowtrl.catalog import Item
from gflowtrl.catalog.items import as_items
from gflowtrl.checks import COUNT, POSITIVE, check_choice
from gflowtrl.data.interactions import flatten

from .calibrated import CalibratedTeacher
from .recency import DECAY, recent_items
from .teacher import History, TeacherModule


WEIGHTINGS = ("cosine", "bm25")


class NeighborTable(nn.Module):
    """The strongest entries of each row of a sparse item-item matrix.

    Buffers: `neighbors` `(N, k)` long, distinct items of each row, and `strengths` `(N, k)`, their positive entries. A
    row with fewer entries ends with strengths of 0. Memory grows with N times k, not with the square of N.
    """

    def __init__(self, num_items: int, num_neighbors: int) -> None:
        super().__init__()
        self.register_buffer("neighbors", torch.zeros(num_items, num_neighbors, dtype=torch.long))
        self.register_buffer("strengths", torch.zeros(num_items, num_neighbors))

    def fill(self, matrix: sp.spmatrix) -> None:
        """Store the largest entries of each row of a matrix `(N, N)`; of equal entries, those of the first columns."""
        pairs = matrix.tocoo()
        order = np.lexsort((pairs.col, -pairs.data, pairs.row))
        row, column, value = pairs.row[order], pairs.col[order], pairs.data[order]
        rank = np.arange(len(row)) - np.searchsorted(row, row)
        kept = (rank < self.neighbors.shape[1]) & (value > 0)
        place = torch.from_numpy(row[kept]).long(), torch.from_numpy(rank[kept])
        self.neighbors[place] = torch.from_numpy(column[kept]).long()
        self.strengths[place] = torch.from_numpy(value[kept]).float()

    def forward(self, indices: Tensor, weights: Tensor) -> Tensor:
        """Return the weighted sum of rows `(B, N)`, given their indices and weights, `(B, T)` (`recent_items`)."""
        total = weights.new_zeros(len(indices), len(self.neighbors))
        # One item of each history at a time: the neighbors of one item are distinct, so that the order of additions,
        # and with it the rounding, is the same on every device.
        for items, weight in zip(indices.T, weights.T, strict=True):
            total.scatter_add_(1, self.neighbors[items], weight[:, None] * self.strengths[items])
        return total


class ItemKNN(CalibratedTeacher):
    """Item-item nearest neighbors (Sarwar et al., WWW 2001; Deshpande and Karypis, TOIS 2004).

    Two items are as similar as the cosine of the sets of users that have them. The raw score of an item is its mean
    similarity to the items of the history, of which later ones count more. Only the `neighbors` most similar items of
    each item count; an item is not its own neighbor.

    Args:
        items: the catalog, in the order of the score columns.
        neighbors: most similar items that are kept of each item.
        decay: weight of an item of the history relative to the one after it; 1 ignores the order.
        temperature: divisor of the scores (`CalibratedTeacher`).

    Raises:
        ValueError: an option is out of bounds.
    """

    bounds = {"neighbors": COUNT, "decay": DECAY}

    def __init__(
        self, items: Sequence[Item], neighbors: int = 200, decay: float = 0.7, temperature: float = 1.0
    ) -> None:
        self.check_options(neighbors=neighbors, decay=decay)
        items = as_items(items)
        super().__init__(items, temperature, neighbors=min(neighbors, len(items)), decay=decay)
        self.table = NeighborTable(len(self.items), self.config["neighbors"])

    @torch.no_grad()
    def raw_scores(self, histories: Sequence[History]) -> Tensor:
        return self.table(*recent_items(self.encode(histories), self.config["decay"], self.device))

    @classmethod
    def check_options(cls, **options: Any) -> None:
        super().check_options(**options)
        check_choice("weighting", options.get("weighting", "cosine"), WEIGHTINGS)

    @classmethod
    @torch.no_grad()
    def fit(
        cls,
        train_sequences: Iterable[History],
        items: Sequence[Item],
        validation: Iterable[Mapping[str, Any]] | None = None,
        *,
        weighting: str = "cosine",
        **config: Any,
    ) -> "ItemKNN":
        """Count the similarities and, with `validation` rows, choose the temperature.

        Args:
            train_sequences: one list of items per user.
            items: the whole catalog.
            validation: rows with `"history"` and `"target"`.
            weighting: `"cosine"`: all users count the same. `"bm25"`: users with many items count less, by the length
                factor of BM25 (k1 = 1.2, b = 0.75). BM25's other factor, the rarity of an item, cancels in a cosine.
            **config: `neighbors`, `decay`.
        """
        cls.check_options(weighting=weighting, **config)
        teacher = cls(items, **config)
        taken = _user_items(list(train_sequences), teacher.items)
        lengths = np.diff(taken.indptr)
        if weighting == "bm25":
            taken = sp.diags_array(2.2 / (2.2 - 0.9 + 0.9 * lengths / max(lengths.mean(), 1))) @ taken
        shared = (taken.T @ taken).tocoo()
        norms = np.sqrt(shared.diagonal())
        others = shared.row != shared.col
        row, column = shared.row[others], shared.col[others]
        cosines = shared.data[others] / (norms[row] * norms[column])
        teacher.table.fill(sp.coo_array((cosines, (row, column)), shape=shared.shape))
        teacher.calibrate(validation)
        return teacher


class Transitions(TeacherModule):
    """A graph of the transitions from item to item: a Markov chain that also counts steps over a few items.

    The count c(i, j) sums 1 / d over all places in training where item j is d <= `window` steps after item i. The
    probability of j after i is (c(i, j) + s p(j)) / (c(i) + s), where c(i) is the sum over j, p the popularity of the
    items (training count + 1), and s the `smoothing` (a Dirichlet prior). The score is the logarithm of the mean of
    these probabilities over the items of the history, of which later ones count more. `softmax(score)` therefore is a
    distribution without any temperature, and that of an empty history is p.

    Args:
        items: the catalog, in the order of the score columns.
        neighbors: most frequent successors that are kept of each item. Counts of others are dropped.
        decay: weight of an item of the history relative to the one after it; 1 ignores the order.

    Raises:
        ValueError: an option is out of bounds.
    """

    bounds = {"neighbors": COUNT, "decay": DECAY, "window": COUNT, "smoothing": POSITIVE}

    def __init__(self, items: Sequence[Item], neighbors: int = 500, decay: float = 0.4) -> None:
        self.check_options(neighbors=neighbors, decay=decay)
        items = as_items(items)
        super().__init__(items, neighbors=min(neighbors, len(items)), decay=decay)
        self.table = NeighborTable(len(self.items), self.config["neighbors"])
        self.register_buffer("popularity", torch.full((len(self.items),), 1 / len(self.items)))

    @torch.no_grad()
    def score(self, histories: Sequence[History]) -> Tensor:
        counted = self.table(*recent_items(self.encode(histories), self.config["decay"], self.device))
        rest = (1 - counted.sum(1, keepdim=True)).clamp_min(torch.finfo(counted.dtype).eps)  # the share of the prior
        return (counted + rest * self.popularity).log()

    @classmethod
    @torch.no_grad()
    def fit(
        cls,
        train_sequences: Iterable[History],
        items: Sequence[Item],
        *,
        window: int = 10,
        smoothing: float = 30.0,
        **config: Any,
    ) -> "Transitions":
        """Count the transitions.

        Args:
            train_sequences: one chronological list of items per user.
            items: the whole catalog.
            window: longest distance between two items that are counted.
            smoothing: s, in units of counts.
            **config: `neighbors`, `decay`.
        """
        cls.check_options(window=window, smoothing=smoothing, **config)
        teacher = cls(items, **config)
        flat, starts = flatten(list(train_sequences), teacher.items)
        user = np.repeat(np.arange(len(starts) - 1), np.diff(starts))
        size = len(teacher.items)
        counts = sp.csr_array((size, size))
        for distance in range(1, min(window, len(flat) - 1) + 1):
            same = user[:-distance] == user[distance:]
            pairs = flat[:-distance][same], flat[distance:][same]
            counts += sp.coo_array((np.full(same.sum(), 1 / distance), pairs), shape=counts.shape).tocsr()
        teacher.table.fill(counts)
        strengths = teacher.table.strengths
        strengths /= strengths.sum(1, keepdim=True) + smoothing
        popularity = torch.from_numpy(np.bincount(flat, minlength=size) + 1.0)
        teacher.popularity.copy_(popularity / popularity.sum())
        return teacher


def _user_items(sequences: Sequence[History], items: Sequence[Item]) -> sp.csr_array:
    """Return which items each user has, `(users, N)` of zeros and ones."""
    columns, starts = flatten(sequences, items)
    taken = sp.csr_array((np.ones(len(columns)), columns, starts), shape=(len(sequences), len(items)))
    taken.sum_duplicates()
    taken.data[:] = 1
    return taken
