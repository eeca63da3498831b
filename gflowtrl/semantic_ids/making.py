"""Semantic ids by named options: what `gflowtrl tokenize` and the section `data.semantic_ids` of a recipe have."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from gflowtrl.catalog import Item
from gflowtrl.checks import NOT_NEGATIVE, SEED, SHARE, Bound, at_least, check_choice, check_number
from gflowtrl.data import InteractionData

from .collisions import POLICIES
from .embedders import SentenceTransformerEmbedder, TfidfEmbedder
from .residual import MOST_LEVELS, ResidualKMeans, ResidualQuantizer
from .rqvae import RQVAE
from .texts import FEATURES, item_texts
from .tokenizer import ItemTokenizer
from .vectors import combine_vectors, cooccurrence_vectors, load_vectors


QUANTIZER_NAMES = ("kmeans", "balanced", "rqvae")
TFIDF = "tfidf"
_LEVELS = Bound(
    f"a whole number from 1 to {MOST_LEVELS}", lambda value: isinstance(value, int) and 1 <= value <= MOST_LEVELS
)
_WEIGHT = Bound("a number from 0 to 1", SHARE.holds)


def _option(default: Any, help: str) -> Any:
    return field(default=default, metadata={"help": help})


@dataclass
class SemanticIdOptions:
    """How semantic ids are made: from the texts of items, from given vectors or from interactions.

    Args:
        quantizer: `"kmeans"` or `"balanced"` (`ResidualKMeans`), or `"rqvae"` (`RQVAE`).
        levels: tokens per id, one more with `collisions="level"`.
        codes: codes per level; None: `default_num_codes`.
        features: item features that form the texts; None: `FEATURES`.
        embedder: `"tfidf"`, or the name or folder of a sentence-transformers model.
        vectors: file of vectors to use instead of texts (`load_vectors`).
        collaborative: weight of co-occurrence vectors, 0 (not used) to 1 (nothing else is used).
        collisions: `"reassign"`, `"level"` or `"keep"` (`resolve_collisions`).
        seed: seed of embedding, clustering and training.
        alignment: weight of LETTER's alignment with collaborative vectors, for `"rqvae"` (`RQVAE`).
        alignment_vectors: file of these vectors, as LETTER's from a SASRec; None: co-occurrence vectors.
        diversity: weight of LETTER's diversity of codes, for `"rqvae"`.

    Raises:
        ValueError: an option is out of range, or would have no effect. The message begins with the option's name.
    """

    quantizer: str = _option("kmeans", "kmeans, balanced (evenly used codes) or rqvae (takes minutes)")
    levels: int = _option(3, "tokens per id")
    codes: int | None = _option(None, "codes per level; null: 256, fewer below 1,024 items")
    features: list[str] | None = _option(
        None, "item features of the texts; null: title, brand, categories, attributes and description"
    )
    embedder: str = _option(TFIDF, "tfidf, or a sentence-transformers model (name or folder)")
    vectors: str | None = _option(None, ".npy or .safetensors with one vector per item, in order, instead of texts")
    collaborative: float = _option(0.0, "weight of co-occurrence vectors of the training part, 0 to 1")
    collisions: str = _option("reassign", "reassign, level (one more level) or keep")
    seed: int = _option(0, "seed of clustering and training")
    alignment: float = _option(0.0, "rqvae: weight of LETTER's alignment with collaborative vectors")
    alignment_vectors: str | None = _option(None, "file of these vectors, as for vectors; null: co-occurrence vectors")
    diversity: float = _option(0.0, "rqvae: weight of LETTER's diversity of codes")

    def __post_init__(self) -> None:
        check_choice("quantizer", self.quantizer, QUANTIZER_NAMES)
        check_choice("collisions", self.collisions, POLICIES)
        check_number("levels", self.levels, _LEVELS)
        check_number("codes", self.codes, at_least(2), optional=True)
        check_number("collaborative", self.collaborative, _WEIGHT)
        check_number("seed", self.seed, SEED)
        for name in ("alignment", "diversity"):
            check_number(name, getattr(self, name), NOT_NEGATIVE)
            if getattr(self, name) and self.quantizer != "rqvae":
                raise ValueError(f"{name} is set, but quantizer is {self.quantizer!r}. Use quantizer 'rqvae'.")
        if self.alignment_vectors is not None and not self.alignment:
            raise ValueError("alignment_vectors is set, but alignment is 0. Set the weight, or drop the file.")
        texts = {"features": self.features, "embedder": None if self.embedder == TFIDF else self.embedder}
        if self.features == []:
            raise ValueError("features is empty; name at least one item feature, or leave it out.")
        for name, value in {**texts, "vectors": self.vectors}.items():
            if value is None:
                continue
            if self.collaborative == 1:
                raise ValueError(
                    f"{name} is set, but collaborative is 1: only co-occurrences are used. Drop one of them."
                )
            if name != "vectors" and self.vectors is not None:
                raise ValueError(f"{name} is set, but vectors are used instead of texts. Drop one of the two.")

    @property
    def uses_texts(self) -> bool:
        """Whether ids are made from the texts of items."""
        return self.vectors is None and self.collaborative < 1

    @property
    def uses_interactions(self) -> bool:
        """Whether ids are made from interactions, alone or with texts."""
        return self.collaborative > 0 or (self.alignment > 0 and self.alignment_vectors is None)

    def make_quantizer(self, num_items: int, latent_dim: int = RQVAE.latent_dim) -> ResidualQuantizer:
        """Return the quantizer for a catalog of this size, not yet fitted; `latent_dim` is for `"rqvae"`."""
        codes = default_num_codes(num_items) if self.codes is None else self.codes
        if self.quantizer == "rqvae":
            return RQVAE(
                self.levels, codes, latent_dim, seed=self.seed, alignment=self.alignment, diversity=self.diversity
            )
        return ResidualKMeans(self.levels, codes, self.quantizer == "balanced", self.seed)


def default_num_codes(num_items: int) -> int:
    """Return the default number of codes per level: 256 as is usual, or for small catalogs the largest power of two
    with at least four items per code."""
    return min(256, max(2, 2 ** ((num_items // 4).bit_length() - 1)))


def make_embedder(name: str, seed: int = 0) -> TfidfEmbedder | SentenceTransformerEmbedder:
    """Return the embedder of a recipe: TF-IDF and SVD for `"tfidf"`, else a sentence-transformers model."""
    return TfidfEmbedder(seed=seed) if name == TFIDF else SentenceTransformerEmbedder(name)


def make_item_tokenizer(
    options: SemanticIdOptions, data: InteractionData, train_sequences: Sequence[Sequence[Item]]
) -> tuple[ItemTokenizer, Tensor]:
    """Make semantic ids for the items of `data`.

    Args:
        options: how.
        data: the items and their features. Interactions and ids in it are not read.
        train_sequences: `Splits.train_sequences`, read if `options.uses_interactions`.

    Returns:
        The fitted tokenizer, and the vectors that it was fitted to, (items, D). New texts can be added to a tokenizer
        that was made from texts alone; otherwise new items need vectors.

    Raises:
        ValueError: too few items for the codes, or too few ids for the items; no item has a text; broken vectors.
        FileNotFoundError: no file of vectors, or no folder of the embedder.
        ImportError: the embedder needs a package that is not installed.
    """
    quantizer, weight, vectors = options.make_quantizer(len(data.items)), options.collaborative, None
    aligned = _alignment_vectors(options, data.items, train_sequences)
    if aligned is not None:
        quantizer = options.make_quantizer(len(data.items), latent_dim=aligned.shape[1])
    if options.vectors is not None:
        vectors = load_vectors(options.vectors, data.items)
    elif options.uses_texts:
        embedder = make_embedder(options.embedder, options.seed)
        texts = item_texts(data, options.features or FEATURES)
        if not weight:  # the embedder is saved with the tokenizer, for new items
            tokenizer = ItemTokenizer(quantizer, embedder, options.collisions, options.features)
            return tokenizer.fit(texts, data.items, aligned), embedder.embed(texts)
        vectors = embedder.fit(texts).embed(texts)
    if weight:
        other = cooccurrence_vectors(train_sequences, data.items, seed=options.seed)
        vectors = other if vectors is None else combine_vectors(vectors, other, weight)
    tokenizer = ItemTokenizer(quantizer, collisions=options.collisions, features=options.features)
    return tokenizer.fit(vectors, data.items, aligned), vectors


def _alignment_vectors(
    options: SemanticIdOptions, items: Sequence[Item], train_sequences: Sequence[Sequence[Item]]
) -> Tensor | None:
    """Return the vectors that latents are aligned with, whose dimension is that of the latents."""
    if not options.alignment:
        return None
    if options.alignment_vectors is not None:
        return load_vectors(options.alignment_vectors, items)
    return cooccurrence_vectors(train_sequences, items, RQVAE.latent_dim, options.seed)
