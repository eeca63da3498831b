"""The item tokenizer, which assigns semantic ids to the items of a catalog and to new items."""

import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from gflowtrl.catalog import Item
from gflowtrl.catalog.items import ItemIndex
from gflowtrl.checks import check_choice
from gflowtrl.data import InteractionData
from gflowtrl.files import read_object, read_tensors, reading, write_atomically, write_text

from .collisions import POLICIES, check_room, resolve_collisions
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
    """Assign semantic ids to items: text -> vector -> codes -> unique codes -> tokens `<a_17>`, `<b_3>`, ...

    Args:
        quantizer: quantizer of the vectors; None: `ResidualKMeans()`.
        embedder: embedder of the texts; None: `TfidfEmbedder()` if texts are given.
        collisions: how to handle items with equal codes, `"reassign"`, `"level"` or `"keep"`; see
            `resolve_collisions`.
        features: features that form an item's text, if interaction data is given; None: `FEATURES`.

    Attributes:
        features: the features, also used by `add`.
        items: the items with an id, those of `fit` first.
        codes: long (items, levels), row i for `items[i]`; the token of code c at level 0 is `<a_c>`.
    """

    def __init__(
        self,
        quantizer: ResidualQuantizer | None = None,
        embedder: Embedder | None = None,
        collisions: str = "reassign",
        features: Sequence[str] | None = None,
    ) -> None:
        check_choice("collisions", collisions, POLICIES)
        self.quantizer = ResidualKMeans() if quantizer is None else quantizer
        self.embedder = embedder
        self.collisions = collisions
        self.features = list(FEATURES if features is None else features)
        self.items: list[Item] = []
        self.codes = torch.empty((0, self.num_levels), dtype=torch.long)

    @property
    def num_levels(self) -> int:
        """Tokens per id."""
        return self.quantizer.num_levels + (self.collisions == "level")

    @property
    def semantic_ids(self) -> dict[Item, tuple[str, ...]]:
        """Item -> tokens, the input of `build_tokenizer`, `add_item_tokens` and `ItemCatalog.from_semantic_ids`."""
        return self.ids_at(range(len(self.items)))

    def fit(
        self,
        source: Source,
        items: Sequence[Item] | None = None,
        collaborative: Tensor | np.ndarray | None = None,
    ) -> "ItemTokenizer":
        """Learn codebooks from a catalog and assign an id to each of its items, replacing an earlier fit.

        Args:
            source: interaction data with item features; or one text per item; or vectors (N, D).
            items: the items of the texts or vectors; not needed for interaction data.
            collaborative: one vector per item from interactions, for an `RQVAE` with `alignment`.

        Raises:
            TypeError: if collaborative vectors are given for another quantizer.
            ValueError: if the number of rows is not the number of items, an item occurs twice, vectors contain NaN, or
                there are fewer items than codes per level, or too few ids for unique ones.
        """
        if collaborative is not None and not isinstance(self.quantizer, RQVAE):
            raise TypeError(f"collaborative vectors are for an RQVAE, not for {type(self.quantizer).__name__}.")
        items, rows = _items_and_rows(source, items, (), self.features)
        if not isinstance(rows, Tensor | np.ndarray):
            self.embedder = TfidfEmbedder() if self.embedder is None else self.embedder
            self.embedder.fit(rows)
        elif self.embedder is not None:
            raise ValueError("An embedder is for texts, but vectors were given. Leave one of the two out.")
        vectors = self._vectors(rows, items)
        if self.collisions == "reassign":
            check_room(len(items), self.quantizer)  # before minutes are spent on training
        codes = (
            self.quantizer.fit_encode(vectors, collaborative)
            if isinstance(self.quantizer, RQVAE)
            else self.quantizer.fit_encode(vectors)
        )
        self.codes = resolve_collisions(codes, vectors, self.quantizer, self.collisions)
        self.items = items
        return self

    def add(self, source: Source, items: Sequence[Item] | None = None) -> dict[Item, tuple[str, ...]]:
        """Assign ids to new items with the existing codebooks; ids of other items do not change.

        The ids may contain tokens that a language model's tokenizer lacks: call `add_item_tokens` with them, and build
        the catalog again.

        Args:
            source, items: as in `fit`; items of interaction data that have an id are skipped. Create texts or vectors
                in the same way as those for `fit`. With `"keep"`, new items may share ids with each other and with
                old items.

        Returns:
            The ids of the new items.

        Raises:
            ValueError: as in `fit`, and if an item has an id already, items are strings and the others numbers (or the
                reverse), or no free ids are left.
        """
        if not self.items:
            raise RuntimeError("This ItemTokenizer is not fitted yet. Call fit() first.")
        items, rows = _items_and_rows(source, items, self.items, self.features)
        if not items:
            return {}
        vectors = self._vectors(rows, items)
        codes = self.quantizer.encode(vectors)
        taken = None if self.collisions == "keep" else self.codes
        codes = resolve_collisions(codes, vectors, self.quantizer, self.collisions, taken)
        self.codes = torch.cat([self.codes, codes])
        self.items = [*self.items, *items]
        return self.ids_at(range(len(self.items) - len(items), len(self.items)))

    def ids_at(self, rows: Sequence[int]) -> dict[Item, tuple[str, ...]]:
        """Return the ids of the items at these positions in `items`."""
        codes = self.codes[torch.tensor(rows, dtype=torch.long)].tolist()
        return {
            self.items[row]: tuple(token_name(level, code) for level, code in enumerate(path))
            for row, path in zip(rows, codes, strict=True)
        }

    def _vectors(self, rows: Sequence[str] | Tensor | np.ndarray, items: Sequence[Item]) -> Tensor:
        if isinstance(rows, Tensor | np.ndarray):
            return as_vectors(rows, rows=len(items))
        if self.embedder is None:
            raise ValueError("This ItemTokenizer was fitted on vectors and cannot embed texts. Give vectors.")
        return as_vectors(self.embedder.embed(rows), rows=len(items))

    # ------------------------------------------------------------------------------------------------ saving, loading
    def save_pretrained(self, directory: str | os.PathLike) -> None:
        """Write `item_tokenizer.safetensors` and then `item_tokenizer.json`, each atomically."""
        if not self.items:
            raise RuntimeError("This ItemTokenizer is not fitted yet. Call fit() before save_pretrained().")
        tensor_file, tensors = Path(directory, TENSOR_FILE), {"codes": self.codes}
        parts = {"quantizer": self.quantizer} | ({} if self.embedder is None else {"embedder": self.embedder})
        for name, part in parts.items():
            tensors |= {f"{name}/{key}": tensor.contiguous() for key, tensor in part.state().items()}
        write_atomically(tensor_file, lambda path: save_file(tensors, path))
        description = {
            "collisions": self.collisions,
            "features": self.features,
            "tensors_sha256": _digest(tensor_file),
            **{name: {"class": type(part).__name__, "config": part.config} for name, part in parts.items()},
            "items": self.items,
        }
        write_text(Path(directory, DESCRIPTION_FILE), json.dumps(description, ensure_ascii=False))

    @classmethod
    def from_pretrained(cls, directory: str | os.PathLike) -> "ItemTokenizer":
        """Load a tokenizer saved by `save_pretrained`, with the same ids for old and new items.

        Raises:
            FileNotFoundError: if one of the two files is missing.
            ValueError: if they do not belong together, as after an interrupted save.
        """
        description_file, tensor_file = Path(directory, DESCRIPTION_FILE), Path(directory, TENSOR_FILE)
        for file in (description_file, tensor_file):
            if not file.is_file():
                raise FileNotFoundError(f"There is no saved ItemTokenizer in {directory}: {file.name} is missing.")
        description = read_object(description_file)
        if description.get("tensors_sha256") != _digest(tensor_file):
            raise ValueError(
                f"The ItemTokenizer in {directory} has files of different saves ({DESCRIPTION_FILE}, {TENSOR_FILE}). "
                f"Save it again."
            )
        tensors = read_tensors(tensor_file)
        with reading(description_file, "the description of an item tokenizer"):
            return cls._from_saved(description, tensors)

    @classmethod
    def _from_saved(cls, description: dict[str, Any], tensors: dict[str, Tensor]) -> "ItemTokenizer":
        """Build the tokenizer that two saved files describe."""

        def load_part(name: str, classes: dict[str, type]) -> Any:
            prefix, saved = f"{name}/", description[name]
            state = {key.removeprefix(prefix): tensor for key, tensor in tensors.items() if key.startswith(prefix)}
            return classes[saved["class"]].from_state(saved["config"], state)

        embedder = load_part("embedder", EMBEDDERS) if "embedder" in description else None
        quantizer = load_part("quantizer", QUANTIZERS)
        tokenizer = cls(quantizer, embedder, description["collisions"], description["features"])
        tokenizer.items, tokenizer.codes = description["items"], tensors["codes"]
        ItemIndex(tokenizer.items)  # it refuses duplicates
        if any(type(item) not in (int, str) for item in tokenizer.items):
            raise ValueError("an item is neither a whole number nor text")
        if tokenizer.codes.shape != (size := (len(tokenizer.items), tokenizer.num_levels)):
            raise ValueError(f"the shape of the codes is {tuple(tokenizer.codes.shape)}, not (items, levels) {size}")
        if not all(isinstance(name, str) for name in tokenizer.features):
            raise ValueError("the name of a feature is not text")
        return tokenizer


def token_name(level: int, code: int) -> str:
    """Return the token of a code: `<a_17>` for code 17 at level 0."""
    return f"<{chr(ord('a') + level)}_{code}>"


def _items_and_rows(
    source: Source, items: Sequence[Item] | None, known: Sequence[Item], features: Sequence[str]
) -> tuple[list[Item], Sequence[str] | Tensor | np.ndarray]:
    """Return the checked items, without the `known` ones of interaction data, and one text or vector for each."""
    if isinstance(source, InteractionData):
        if items is None:
            old = set(known)
            items = [item for item in source.items if item not in old]
        rows = item_texts(source, features, items) if items else []
    elif items is None:
        raise ValueError("Texts and vectors need items, the list of the items that they belong to.")
    else:
        rows = source if isinstance(source, Tensor | np.ndarray) else list(source)
    index = ItemIndex(items)
    if len(rows) != len(index):
        raise ValueError(f"There are {len(index)} items but {len(rows)} texts or vectors. Give one for each item.")
    for item in items:
        if known and isinstance(item, str) != isinstance(known[0], str):
            raise ValueError(
                f"Item {item!r} is of type {type(item).__name__}, but items with a semantic id are of type "
                f"{type(known[0]).__name__}, for example {known[0]!r}. Use one type, or old items would count as new."
            )
    for item in known:
        if item in index:
            raise ValueError(f"Item {item!r} has a semantic id already, and ids never change. Add only new items.")
    return list(items), rows


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
