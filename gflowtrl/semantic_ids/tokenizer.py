"""Items to semantic ids, and whatever is needed to give new items theirs later."""

import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from gflowtrl.catalog import Item
from gflowtrl.catalog.items import ItemIndex
from gflowtrl.data import InteractionData
from gflowtrl.files import read_json, reading, write_atomically, write_text

from .collisions import POLICIES, resolve_collisions
from .embedders import Embedder, SentenceTransformerEmbedder, TfidfEmbedder
from .residual import ResidualKMeans, ResidualQuantizer
from .rqvae import RQVAE
from .texts import FEATURES, item_texts
from .vectors import as_vectors


DESCRIPTION_FILE, TENSOR_FILE = "item_tokenizer.json", "item_tokenizer.safetensors"
EMBEDDERS = {kind.__name__: kind for kind in (TfidfEmbedder, SentenceTransformerEmbedder)}
QUANTIZERS = {kind.__name__: kind for kind in (ResidualKMeans, RQVAE)}
Source = InteractionData | Sequence[str] | Tensor | np.ndarray


class ItemTokenizer:
    """Gives every item a semantic id: text -> vector -> codes -> unique codes -> tokens `<a_17>`, `<b_3>`, ...

    Args:
        quantizer: vectors to codes; `ResidualKMeans()` where none is given.
        embedder: texts to vectors; `TfidfEmbedder()` where none is given and texts come.
        collisions: what becomes of items with equal codes, `"reassign"`, `"level"` or `"keep"`: see
            `resolve_collisions`.
        features: what makes an item's text, where interaction data are given; `FEATURES` where nothing is said.

    Attributes:
        features: the same, kept for `add`.
        items: the items that have an id, those of `fit` first.
        codes: long (items, levels), row i for `items[i]`; the token of code c at level 0 is `<a_c>`.
    """

    def __init__(
        self,
        quantizer: ResidualQuantizer | None = None,
        embedder: Embedder | None = None,
        collisions: str = "reassign",
        features: Sequence[str] | None = None,
    ) -> None:
        if collisions not in POLICIES:
            raise ValueError(f"Collisions can be handled by {', '.join(POLICIES)}, but {collisions!r} was given.")
        self.quantizer = ResidualKMeans() if quantizer is None else quantizer
        self.embedder = embedder
        self.collisions = collisions
        self.features = list(FEATURES if features is None else features)
        self.items: list[Item] = []
        self.codes = torch.empty((0, self.num_levels), dtype=torch.long)

    @property
    def num_levels(self) -> int:
        """Tokens an id."""
        return self.quantizer.num_levels + (self.collisions == "level")

    @property
    def semantic_ids(self) -> dict[Item, tuple[str, ...]]:
        """Item to tokens, what `build_tokenizer`, `add_item_tokens` and `ItemCatalog.from_semantic_ids` take."""
        return self._ids(slice(None))

    def fit(self, source: Source, items: Sequence[Item] | None = None) -> "ItemTokenizer":
        """Learns codebooks from a catalog and gives each of its items an id. What was fitted before is forgotten.

        Args:
            source: interaction data with features of items; or one text an item; or vectors (N, D).
            items: what the texts or vectors are of. Interaction data has its own items.

        Raises:
            ValueError: if numbers of rows differ, an item is there twice, vectors hold NaN, or there are fewer items
                than codes a level.
        """
        items, rows = _items_and_rows(source, items, (), self.features)
        if not isinstance(rows, Tensor | np.ndarray):
            self.embedder = TfidfEmbedder() if self.embedder is None else self.embedder
            self.embedder.fit(rows)
        elif self.embedder is not None:
            raise ValueError("An embedder makes vectors of texts, but vectors were given. Leave one of the two out.")
        vectors = self._vectors(rows, items)
        codes = self.quantizer.fit_encode(vectors)
        self.codes = resolve_collisions(codes, vectors, self.quantizer, self.collisions)
        self.items = items
        return self

    def add(self, source: Source, items: Sequence[Item] | None = None) -> dict[Item, tuple[str, ...]]:
        """Gives new items ids, by the codebooks that are there; ids of other items do not change.

        Their tokens may be new to a language model's tokenizer: call `add_item_tokens` with these ids, and build its
        catalog again.

        Args:
            source, items: as in `fit`; of interaction data, the items that have no id yet. Vectors must be made in the
                way of those that `fit` saw, texts too. Under `"keep"` new items may share an id, with old ones too.

        Returns:
            The ids of the new items.

        Raises:
            ValueError: as `fit`, and if an item has an id already, items are strings where the others are numbers (or
                the other way round), or there are no free ids left.
        """
        if not self.items:
            raise RuntimeError("This ItemTokenizer knows no items yet. Call fit() first.")
        items, rows = _items_and_rows(source, items, self.items, self.features)
        if not items:
            return {}
        vectors = self._vectors(rows, items)
        codes = self.quantizer.encode(vectors)
        taken = None if self.collisions == "keep" else self.codes
        codes = resolve_collisions(codes, vectors, self.quantizer, self.collisions, taken)
        self.codes = torch.cat([self.codes, codes])
        self.items = [*self.items, *items]
        return self._ids(slice(len(self.items) - len(items), None))

    def _ids(self, rows: slice) -> dict[Item, tuple[str, ...]]:
        return {
            item: tuple(f"<{chr(ord('a') + level)}_{code}>" for level, code in enumerate(path))
            for item, path in zip(self.items[rows], self.codes[rows].tolist(), strict=True)
        }

    def _vectors(self, rows: Sequence[str] | Tensor | np.ndarray, items: Sequence[Item]) -> Tensor:
        if isinstance(rows, Tensor | np.ndarray):
            return as_vectors(rows, rows=len(items))
        if self.embedder is None:
            raise ValueError("This ItemTokenizer was fitted on vectors and cannot read texts. Give vectors.")
        return as_vectors(self.embedder.embed(rows), rows=len(items))

    # ------------------------------------------------------------------------------------------------ saving, loading
    def save_pretrained(self, directory: str | os.PathLike) -> None:
        """Writes `item_tokenizer.safetensors` and `item_tokenizer.json`, each atomically, the latter last."""
        if not self.items:
            raise RuntimeError("This ItemTokenizer knows no items yet. Call fit() before save_pretrained().")
        tensor_file, tensors = Path(directory, TENSOR_FILE), {"codes": self.codes}
        parts = {"quantizer": self.quantizer} | ({} if self.embedder is None else {"embedder": self.embedder})
        for part, owner in parts.items():
            tensors |= {f"{part}/{name}": tensor.contiguous() for name, tensor in owner.state().items()}
        write_atomically(tensor_file, lambda path: save_file(tensors, path))
        description = {
            "collisions": self.collisions,
            "features": self.features,
            "tensors_sha256": _digest(tensor_file),
            **{part: {"class": type(owner).__name__, "config": owner.config} for part, owner in parts.items()},
            "items": self.items,
        }
        write_text(Path(directory, DESCRIPTION_FILE), json.dumps(description, ensure_ascii=False))

    @classmethod
    def from_pretrained(cls, directory: str | os.PathLike) -> "ItemTokenizer":
        """Loads what `save_pretrained` wrote: the same ids, and the same ids for new items.

        Raises:
            FileNotFoundError: if one of the two files is missing.
            ValueError: if they do not belong together, as after a save that was interrupted.
        """
        description_file, tensor_file = Path(directory, DESCRIPTION_FILE), Path(directory, TENSOR_FILE)
        for file in (description_file, tensor_file):
            if not file.is_file():
                raise FileNotFoundError(f"There is no saved ItemTokenizer in {directory}: {file.name} is missing.")
        description = read_json(description_file)
        if description["tensors_sha256"] != _digest(tensor_file):
            raise ValueError(f"The files of the ItemTokenizer in {directory} are of different saves. Save it again.")
        with reading(tensor_file, "a .safetensors file"):
            tensors = load_file(tensor_file)

        def part(name: str, classes: dict[str, type]) -> Any:
            own = {key.removeprefix(f"{name}/"): value for key, value in tensors.items() if key.startswith(f"{name}/")}
            saved = description[name]
            return classes[saved["class"]].from_state(saved["config"], own)

        embedder = part("embedder", EMBEDDERS) if "embedder" in description else None
        tokenizer = cls(part("quantizer", QUANTIZERS), embedder, description["collisions"], description["features"])
        tokenizer.items, tokenizer.codes = description["items"], tensors["codes"]
        return tokenizer


def _items_and_rows(
    source: Source, items: Sequence[Item] | None, known: Sequence[Item], features: Sequence[str]
) -> tuple[list[Item], Sequence[str] | Tensor | np.ndarray]:
    """The items, checked, and one text or vector for each."""
    if isinstance(source, InteractionData):
        if items is None:
            old = set(known)
            items = [item for item in source.items if item not in old]
        rows = item_texts(source, features, items) if items else []
    elif items is None:
        raise ValueError("Texts and vectors need items, the list of what they are of.")
    else:
        rows = source if isinstance(source, Tensor | np.ndarray) else list(source)
    index = ItemIndex(items)
    if len(rows) != len(index):
        raise ValueError(f"There are {len(index)} items but {len(rows)} texts or vectors; give one for each item.")
    other = next((item for item in items if known and isinstance(item, str) != isinstance(known[0], str)), None)
    if other is not None:
        raise ValueError(
            f"Item {other!r} is of type {type(other).__name__}, but those that have semantic ids are of type "
            f"{type(known[0]).__name__}, as {known[0]!r}. Give all items in one type, or old ones would pass for new."
        )
    again = next((item for item in known if item in index), None)
    if again is not None:
        raise ValueError(f"Item {again!r} has a semantic id already, and ids never change. Add only new items.")
    return list(items), rows


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
