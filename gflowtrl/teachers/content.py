"""SASRec whose item vectors come from texts too, so that it can score items without interactions."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gflowtrl.catalog import Item
from gflowtrl.checks import SHARE_BELOW_ONE

from .sasrec import SASRec
from .teacher import History
from .text import ReadsTexts, check_vectors


class ContentSASRec(ReadsTexts, SASRec):
    """SASRec whose item vector is a projection of the item's content plus an embedding.

    In training, the embedding of each item is left out at random, so that the projection alone must do (DropoutNet,
    Volkovs et al., NeurIPS 2017). Items without interactions in training have no embedding at all: their vectors are
    projections, and they are scored like any other item. They are not in the softmax of the training. There is nothing
    else to do for new items: fit with them in `items`, and rows of `vectors` for them.

    Args:
        items: the catalog, in the order of the score columns.
        dim: dimension of the content vectors.
        embedding_dropout: probability in training that the embedding of an item is left out.
        **config: options of `SASRec`.

    Raises:
        ValueError: an option is out of bounds.
    """

    bounds = {**SASRec.bounds, "embedding_dropout": SHARE_BELOW_ONE}

    def __init__(self, items: Sequence[Item], dim: int, embedding_dropout: float = 0.5, **config: Any) -> None:
        self.check_options(embedding_dropout=embedding_dropout)
        super().__init__(items, **config)
        self.config |= {"dim": dim, "embedding_dropout": embedding_dropout}
        self.embedding_dropout = embedding_dropout
        width = self.item_embedding.embedding_dim
        self.projection = nn.Sequential(nn.Linear(dim, width), nn.GELU(), nn.Linear(width, width))
        nn.init.normal_(self.projection[2].weight, std=0.02)
        self.register_buffer("vectors", torch.zeros(len(self.items), dim))
        self.register_buffer("known", torch.ones(len(self.items), dtype=torch.bool))

    def item_vectors(self) -> Tensor:
        kept = self.known
        if self.training:
            kept = kept & (torch.rand(len(kept), device=kept.device) >= self.embedding_dropout)
        return self.projection(self.vectors) + self.item_embedding.weight * kept[:, None]

    def _training_items(self) -> Tensor:
        # As negatives, new items would teach the projection what is never a target.
        return self.known.nonzero().flatten()

    @classmethod
    def fit(
        cls,
        train_sequences: Iterable[History],
        items: Sequence[Item],
        validation: Iterable[Mapping[str, Any]] | None = None,
        *,
        vectors: Tensor,
        **options: Any,
    ) -> ContentSASRec:
        """Train a model as `SASRec.fit` does.

        Args:
            train_sequences: one chronological list of items per user.
            items: the whole catalog, also items that occur in no sequence.
            validation: rows with `"history"` and `"target"`.
            vectors: `(len(items), D)`, the content of each item, for example of `gflowtrl.semantic_ids.TfidfEmbedder`.
                Rows are scaled to norm 1; a row of zeros stays.
            **options: of `SASRec.fit` and of this class, without `dim`.

        Raises:
            ValueError: `vectors` has another number of rows.
            NonFiniteError: `vectors` has NaN or infinity, or the training diverged.
        """
        check_vectors(vectors, items, cls.__name__)
        return super().fit(train_sequences, items, validation, vectors=vectors, **options)

    @classmethod
    def _new(
        cls, items: Sequence[Item], sequences: Sequence[History], *, vectors: Tensor, **config: Any
    ) -> ContentSASRec:
        teacher = cls(items, vectors.shape[1], **config)
        indices = [index for row in teacher.encode(sequences) for index in row]
        teacher.known.copy_(torch.bincount(torch.tensor(indices, dtype=torch.long), minlength=len(items)) > 0)
        teacher.vectors.copy_(F.normalize(vectors.float(), dim=1))
        return teacher

    @classmethod
    def _fit_parameters(cls) -> set[str]:
        return SASRec._fit_parameters() | {"vectors", "embedding_dropout"}
