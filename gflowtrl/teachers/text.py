"""A teacher from the texts of items."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from gflowtrl.catalog import Item
from gflowtrl.checks import check_text
from gflowtrl.finite import check_tensors

from .calibrated import CalibratedTeacher
from .recency import DECAY, recent_items
from .teacher import History, TeacherModule


TFIDF = "tfidf"  # the embedder of TF-IDF and SVD


def check_vectors(vectors: Tensor, items: Sequence[Item], teacher: str) -> None:
    """Check that there is one finite vector per item; `teacher` is the name of its class in errors."""
    if vectors.ndim != 2 or len(vectors) != len(items):
        raise ValueError(
            f"vectors has shape {tuple(vectors.shape)}, but there are {len(items)} items; give one row per item."
        )
    check_tensors({"vectors": vectors}, f"The input of {teacher}")


class ReadsTexts(TeacherModule):
    """Base class of teachers whose `fit` takes `vectors`: a recipe names the embedder that makes them of the texts."""

    needs = frozenset({"texts"})

    @classmethod
    def option_names(cls) -> set[str]:
        return super().option_names() | {"embedder"}

    @classmethod
    def check_options(cls, **options: Any) -> None:
        super().check_options(**options)
        check_text("embedder", options.get("embedder", TFIDF))

    @classmethod
    def from_spec(cls, spec: Mapping[str, Any], context: Mapping[str, Any]) -> TeacherModule:
        """Fit the teacher of a recipe. `context["embed"]` returns the vectors of an embedder, by its name."""
        options = dict(spec)
        vectors = context["embed"](options.pop("embedder", TFIDF))
        return super().from_spec(options, {**context, "vectors": vectors})


class ItemText(ReadsTexts, CalibratedTeacher):
    """Similarity of texts: the cosine of an item's vector and the mean vector of the history.

    The vectors are scaled to norm 1, and later items of the history count more in the mean. Only the temperature comes
    from interactions, so the scores also say something about items that were never bought. An item without a text (a
    vector of zeros) has a raw score of 0.

    Args:
        items: the catalog, in the order of the score columns.
        dim: dimension of the vectors.
        decay: weight of an item of the history relative to the one after it; 1 ignores the order.
        temperature: divisor of the scores (`CalibratedTeacher`).

    Raises:
        ValueError: an option is out of bounds.
    """

    bounds = {"decay": DECAY}

    def __init__(self, items: Sequence[Item], dim: int, decay: float = 0.7, temperature: float = 1.0) -> None:
        self.check_options(decay=decay)
        super().__init__(items, temperature, dim=dim, decay=decay)
        self.register_buffer("vectors", torch.zeros(len(self.items), dim))

    @torch.no_grad()
    def raw_scores(self, histories: Sequence[History]) -> Tensor:
        indices, weights = recent_items(self.encode(histories), self.config["decay"], self.device)
        profiles = torch.einsum("bt,btd->bd", weights, self.vectors[indices])
        return F.normalize(profiles, dim=1) @ self.vectors.T

    @classmethod
    @torch.no_grad()
    def fit(
        cls,
        train_sequences: Iterable[History],
        items: Sequence[Item],
        validation: Iterable[Mapping[str, Any]] | None = None,
        *,
        vectors: Tensor,
        decay: float = 0.7,
    ) -> "ItemText":
        """Take the vectors and, with `validation` rows, choose the temperature.

        Args:
            train_sequences: not used, because the texts say it all.
            items: the whole catalog.
            validation: rows with `"history"` and `"target"`.
            vectors: `(len(items), D)`, one vector per item, for example of `gflowtrl.semantic_ids.TfidfEmbedder`.
            decay: see the class.

        Raises:
            ValueError: `vectors` has another number of rows.
            NonFiniteError: `vectors` has NaN or infinity.
        """
        check_vectors(vectors, items, cls.__name__)
        teacher = cls(items, vectors.shape[1], decay)
        teacher.vectors.copy_(F.normalize(vectors.float(), dim=1))
        teacher.calibrate(validation)
        return teacher
