"""Quality metrics of semantic ids that need no trained recommender."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from gflowtrl.catalog import Item

from .collisions import colliding
from .tokenizer import ItemTokenizer
from .vectors import as_vectors


NEIGHBORS = 10
MAX_QUERIES = 10_000  # in larger catalogs, only this many evenly spaced items are queries


@dataclass
class QualityReport:
    """Metrics of semantic ids. Lists have one entry per level. `print(report)` shows a table.

    Attributes:
        items: number of items.
        colliding_items: number of items that share their id with another item.
        relative_mse: squared error of the vectors decoded from the ids, divided by the squared deviation of the
            vectors from their mean: 0 is perfect, 1 is the error of the mean. `None` for ids without a quantizer,
            and if all vectors are equal.
        codes_used: number of distinct tokens at the level.
        share_used: `codes_used` divided by the number of available codes; `None` if unknown (the counting level).
        perplexity: exp of the entropy of the tokens at the level, the equivalent number of evenly used codes.
        neighbors_kept: share of the 10 nearest neighbors by cosine, averaged over items, whose id has the same first l
            tokens as the item's; the first entry is for l = 1. Items with a vector of zeros do not count.
        neighbors_by_chance: the same for all pairs of items.
    """

    items: int
    colliding_items: int
    relative_mse: float | None
    codes_used: list[int]
    share_used: list[float | None]
    perplexity: list[float]
    neighbors_kept: list[float]
    neighbors_by_chance: list[float]

    @property
    def common_prefix(self) -> float:
        """Mean length in tokens of the common prefix of the ids of an item and a neighbor."""
        return sum(self.neighbors_kept)

    @property
    def common_prefix_by_chance(self) -> float:
        """The same for any two items."""
        return sum(self.neighbors_by_chance)

    def as_dict(self) -> dict[str, Any]:
        """Return all metrics as a JSON-serializable dict."""
        means = {"common_prefix": self.common_prefix, "common_prefix_by_chance": self.common_prefix_by_chance}
        return {**asdict(self), **means}

    def __str__(self) -> str:
        error = "unknown" if self.relative_mse is None else f"{self.relative_mse:.4f}"
        lines = [
            f"{self.items} items, {self.colliding_items} of them share an id; relative error {error}; neighbors "
            f"share {self.common_prefix:.2f} tokens, any two items {self.common_prefix_by_chance:.2f}",
            "level  codes used  share  perplexity  neighbors kept  by chance",
        ]
        columns = (self.codes_used, self.share_used, self.perplexity, self.neighbors_kept, self.neighbors_by_chance)
        for level, (used, share, perplexity, kept, chance) in enumerate(zip(*columns, strict=True)):
            share = "" if share is None else f"{share:.2f}"
            lines.append(f"{level + 1:5d}  {used:10d}  {share:>5}  {perplexity:10.1f}  {kept:15.4f}  {chance:9.4f}")
        return "\n".join(lines)


def quality_report(
    ids: ItemTokenizer | Mapping[Item, Sequence[str]], vectors: Tensor | np.ndarray, num_codes: int | None = None
) -> QualityReport:
    """Measure the quality of semantic ids with item vectors.

    Args:
        ids: a fitted tokenizer, or any ids of one length.
        vectors: (N, D) in the order of the tokenizer's `items` or of the mapping. Neighbors and the reconstruction
            error are computed on them, so for a tokenizer use the vectors that it was fitted on.
        num_codes: codes per level, if `ids` is a mapping and the number is known.

    Raises:
        ValueError: if the number of rows is not the number of items, there are fewer than two items, vectors contain
            NaN, or ids have different lengths.
    """
    codes = ids.codes if isinstance(ids, ItemTokenizer) else _to_codes(ids)
    vectors = as_vectors(vectors, rows=len(codes))
    if len(codes) < 2:
        raise ValueError("A quality report needs at least two items.")
    relative_mse, available = None, [num_codes] * codes.shape[1]
    if isinstance(ids, ItemTokenizer):
        levels = ids.quantizer.num_levels
        available = [ids.quantizer.num_codes] * levels + [None] * (codes.shape[1] - levels)
        error = (vectors - ids.quantizer.decode(codes[:, :levels])).square().sum()
        spread = (vectors - vectors.mean(0)).square().sum()
        if spread > 1e-12 * vectors.square().sum():  # smaller values are rounding errors
            relative_mse = float(error / spread)
    counts = [torch.bincount(column).double() for column in codes.T]
    used = [int((count > 0).sum()) for count in counts]
    lengths = range(1, codes.shape[1] + 1)
    prefixes = torch.stack([codes[:, :length].unique(dim=0, return_inverse=True)[1] for length in lengths], dim=1)
    return QualityReport(
        items=len(codes),
        colliding_items=int(colliding(codes).sum()),
        relative_mse=relative_mse,
        codes_used=used,
        share_used=[None if total is None else count / total for count, total in zip(used, available, strict=True)],
        perplexity=[float(torch.special.entr(count / len(codes)).sum().exp()) for count in counts],
        neighbors_kept=_shared_with_neighbors(prefixes, vectors),
        neighbors_by_chance=[_same_by_chance(column) for column in prefixes.T],
    )


def nearest_neighbors(vectors: Tensor, queries: Tensor, k: int = NEIGHBORS) -> Tensor:
    """Return the k other rows of vectors (N, D) with the highest cosine to each of the rows `queries` (Q,): (Q, k)."""
    unit = F.normalize(vectors)
    neighbors = []
    for block in queries.split(1024):
        cosines = unit[block] @ unit.T
        cosines[torch.arange(len(block)), block] = -2.0
        neighbors.append(cosines.topk(min(k, len(vectors) - 1)).indices)
    return torch.cat(neighbors)


def _shared_with_neighbors(prefixes: Tensor, vectors: Tensor) -> list[float]:
    queries = vectors.abs().sum(1).nonzero().flatten()
    if len(queries) > MAX_QUERIES:
        queries = queries[torch.linspace(0, len(queries) - 1, MAX_QUERIES).long()]
    if len(queries) == 0:
        raise ValueError("All item vectors are zero, so no item has neighbors. Give other vectors.")
    neighbors = nearest_neighbors(vectors, queries)
    return (prefixes[neighbors] == prefixes[queries, None]).double().mean((0, 1)).tolist()


def _same_by_chance(numbers: Tensor) -> float:
    sizes = torch.bincount(numbers).double()
    return float((sizes * (sizes - 1)).sum() / (len(numbers) * (len(numbers) - 1)))


def _to_codes(ids: Mapping[Item, Sequence[str]]) -> Tensor:
    """Number the tokens of each level: (N, levels)."""
    lengths = {len(tokens) for tokens in ids.values()}
    if len(lengths) != 1:
        raise ValueError(f"Semantic ids must all have the same length, but these have {sorted(lengths)} tokens.")
    columns = [np.unique(np.array(column), return_inverse=True)[1] for column in zip(*ids.values(), strict=True)]
    return torch.from_numpy(np.stack(columns, axis=1))
