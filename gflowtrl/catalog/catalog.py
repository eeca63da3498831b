"""The catalog: which item has which semantic id, and the prefix tree over all ids."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterable, Mapping, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from gflowtrl.files import write_text

from .items import Item, ItemIndex
from .saved import read_catalog
from .tree import PrefixTree


if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)
CATALOG_FILE = "catalog.json"


class ItemCatalog:
    """Items, their semantic ids and the prefix tree over them.

    Every tensor with an item axis is in the order of `items`; every tensor with a leaf axis is in the order of
    `tree.paths`. Items that share one semantic id (a collision) share one leaf.

    Args:
        items: the items, integers or strings, without duplicates.
        semantic_ids: the token texts of each item, parallel to `items`.
        item_token_ids: `(items, L)` token numbers of each item, padded with -1 at the right.
    """

    def __init__(self, items: Sequence[Item], semantic_ids: Sequence[Sequence[str]], item_token_ids: Tensor):
        self.items = list(items)
        self.semantic_ids = [tuple(tokens) for tokens in semantic_ids]
        if not len(self.items) == len(self.semantic_ids) == len(item_token_ids):
            raise ValueError(
                f"{len(self.items)} items, {len(self.semantic_ids)} semantic ids and {len(item_token_ids)} rows of "
                f"token numbers were given; there must be one of each per item."
            )
        self._index = ItemIndex(self.items)
        self.item_token_ids = item_token_ids.long()
        paths, row = torch.unique(self.item_token_ids, dim=0, return_inverse=True)
        self.tree = PrefixTree(paths)
        self.item_leaf = self.tree.leaf_of_row[row].long()
        self.leaf_sizes = torch.bincount(self.item_leaf, minlength=self.tree.num_leaves)
        # Items of a leaf: a slice of `_items_by_leaf`, in the catalog's order.
        self._items_by_leaf = torch.argsort(self.item_leaf, stable=True)
        self._leaf_start = torch.cumsum(self.leaf_sizes, 0) - self.leaf_sizes

    @classmethod
    def from_semantic_ids(
        cls, semantic_ids: Mapping[Item, Sequence[str]], tokenizer: PreTrainedTokenizerBase
    ) -> ItemCatalog:
        """Build the catalog of `{item: ("<a_1>", "<b_7>", ...)}` with the token numbers of `tokenizer`.

        Items with equal ids are merged into one leaf, and the log says how many.

        Raises:
            ValueError: no items, an item without tokens, a token that the tokenizer does not know as one token.
        """
        if not semantic_ids:
            raise ValueError("semantic_ids is empty; the catalog needs at least one item.")
        texts = sorted({token for tokens in semantic_ids.values() for token in tokens})
        numbers = dict(zip(texts, tokenizer.convert_tokens_to_ids(texts), strict=True))
        for item, tokens in semantic_ids.items():
            if not tokens:
                raise ValueError(f"Item {item!r} has an empty semantic id.")
            if isinstance(tokens, str):
                raise ValueError(
                    f"The semantic id of item {item!r} is the text {tokens!r}; give a list of its tokens."
                )
            for token in tokens:
                if numbers[token] in (None, tokenizer.unk_token_id):
                    raise ValueError(
                        f"The tokenizer does not know token {token!r} of item {item!r}. Build it with "
                        f"gflowtrl.data.build_tokenizer or add the tokens with gflowtrl.data.add_item_tokens."
                    )
        catalog = cls(list(semantic_ids), list(semantic_ids.values()), _numbered(semantic_ids.values(), numbers))
        merged = int((catalog.leaf_sizes - 1).sum())
        if merged:
            logger.info(
                "%d of %d items share a semantic id with another one; they are merged into %d leaves.",
                int(catalog.leaf_sizes[catalog.leaf_sizes > 1].sum()), len(catalog), catalog.tree.num_leaves,
            )  # fmt: skip
        return catalog

    # ------------------------------------------------------------------------------------------------------ queries
    def __len__(self) -> int:
        return len(self.items)

    def __contains__(self, item: Item) -> bool:
        return item in self._index

    def __repr__(self) -> str:
        return f"ItemCatalog(items={len(self)}, leaves={self.tree.num_leaves}, tokens_per_id={self.tree.max_depth})"

    @property
    def device(self) -> torch.device:
        return self.tree.device

    def to(self, device: torch.device | str) -> ItemCatalog:
        """Move all tensors to `device`, in place, but for `item_token_ids`: prompts are made on the CPU."""
        self.tree.to(device)
        for name in ("item_leaf", "leaf_sizes", "_items_by_leaf", "_leaf_start"):
            setattr(self, name, getattr(self, name).to(device))
        return self

    def index_of(self, items: Sequence[Item]) -> Tensor:
        """Positions of items in `items`: `(n,)`, on the CPU. Raises a ValueError that names an unknown item."""
        return torch.tensor([self._index[item] for item in items], dtype=torch.long)

    def known_items(self, histories: Iterable[Sequence[Item]]) -> tuple[list[list[Item]], list[tuple[int, Item]]]:
        """Histories without the items that are not in the catalog, and those items, each with the row it is in."""
        histories = list(histories)
        unknown = [(row, item) for row, history in enumerate(histories) for item in history if item not in self]
        return [[item for item in history if item in self] for history in histories], unknown

    def leaf_of(self, items: Sequence[Item]) -> Tensor:
        """Leaf of each item: `(n,)`."""
        return self.item_leaf[self.index_of(items).to(self.device)]

    def items_of(self, leaf: int) -> list[Item]:
        """All items at a leaf, in the catalog's order."""
        start = int(self._leaf_start[leaf])
        rows = self._items_by_leaf[start : start + int(self.leaf_sizes[leaf])]
        return [self.items[i] for i in rows.tolist()]

    def leaf_text(self, leaf: int) -> str:
        """The semantic id of a leaf as text, tokens joined by spaces."""
        return " ".join(self.semantic_ids[int(self._items_by_leaf[self._leaf_start[leaf]])])

    def fold_items(self, values: Tensor, reduction: str = "sum") -> Tensor:
        """Values per item to values per leaf: `(B, items) -> (B, N)`; "sum" or "max" over a leaf's items."""
        if reduction not in ("sum", "max"):
            raise ValueError(f"reduction is {reduction!r}; choose 'sum' or 'max'.")
        index = self.item_leaf.to(values.device).expand(values.shape[0], -1)
        folded = values.new_zeros(values.shape[0], self.tree.num_leaves)
        if reduction == "sum":
            return folded.scatter_add_(1, index, values)
        return folded.scatter_reduce_(1, index, values, "amax", include_self=False)

    def expand_leaves(self, leaves: Tensor, k: int) -> Tensor:
        """Ranked leaves to ranked items: a leaf yields all its items, and the list is cut at `k`.

        Args:
            leaves: `(U, R)`, best first; -1 is skipped.
            k: length of the item list.

        Returns:
            `(U, k)` positions in `items`, padded with -1.
        """
        leaves = leaves.to(self.device)
        sizes = torch.where(leaves >= 0, self.leaf_sizes[leaves.clamp(min=0)], 0)
        ends = torch.cumsum(sizes, 1)
        wanted = torch.arange(k, device=leaves.device).expand(len(leaves), k).contiguous()
        place = torch.searchsorted(ends, wanted, right=True)
        found = place < leaves.shape[1]
        place = place.clamp(max=leaves.shape[1] - 1)
        leaf = leaves.gather(1, place).clamp(min=0)
        within = wanted - (ends - sizes).gather(1, place)
        rows = torch.where(found, self._leaf_start[leaf] + within, 0)
        return torch.where(found, self._items_by_leaf[rows], -1)

    # ------------------------------------------------------------------------------------------------ saving, loading
    def save_pretrained(self, directory: str | os.PathLike) -> None:
        """Write `catalog.json` (items, token texts, token numbers) into `directory`, atomically."""
        numbers = {}
        for tokens, row in zip(self.semantic_ids, self.item_token_ids.tolist(), strict=True):
            numbers.update(zip(tokens, row, strict=False))
        content = {"items": self.items, "semantic_ids": self.semantic_ids, "token_ids": numbers}
        write_text(Path(directory, CATALOG_FILE), json.dumps(content))

    @classmethod
    def from_pretrained(cls, directory: str | os.PathLike) -> ItemCatalog:
        """Read what `save_pretrained` wrote.

        Raises:
            FileNotFoundError: `catalog.json` is missing.
            ValueError: it is damaged (`saved.read_catalog`).
        """
        path = Path(directory) / CATALOG_FILE
        if not path.is_file():
            raise FileNotFoundError(
                f"{path} is missing. A recommender checkpoint of gflowtrl holds it; a plain language model does not."
            )
        items, texts, numbers = read_catalog(path)
        return cls(items, texts, _numbered(texts, numbers))

    def check_tokenizer(self, tokenizer: PreTrainedTokenizerBase, where: str = "The catalog") -> None:
        """Every token must have the number that the tokenizer gives it.

        Args:
            tokenizer: of the same model.
            where: what an error calls the catalog, its file say.

        Raises:
            ValueError: a token has another number, or none: the catalog of another tokenizer, or swapped tokens.
        """
        flat = self.item_token_ids.flatten()
        numbers, row = torch.unique(flat, return_inverse=True)
        first = torch.full((len(numbers),), len(flat)).scatter_reduce_(0, row, torch.arange(len(flat)), "amin")
        places = [pair for pair in zip(numbers.tolist(), first.tolist(), strict=True) if pair[0] >= 0]
        width = self.item_token_ids.shape[1]
        texts = [self.semantic_ids[place // width][place % width] for _, place in places]
        known = tokenizer.convert_tokens_to_ids(texts)
        pairs = zip(texts, [number for number, _ in places], known, strict=True)
        if wrong := [(text, number, other) for text, number, other in pairs if number != other]:
            text, number, other = wrong[0]
            told = "does not know it" if other in (None, tokenizer.unk_token_id) else f"gives it {other}"
            raise ValueError(
                f"{where} gives token {text!r} the number {number}, but the tokenizer {told} ({len(wrong)} of "
                f"{len(texts)} tokens differ): they do not belong together. Restore the catalog and the tokenizer "
                f"that were saved with this model; ItemCatalog.from_semantic_ids builds a catalog for a tokenizer."
            )


def _numbered(semantic_ids: Iterable[Sequence[str]], numbers: Mapping[str, int]) -> Tensor:
    """The token numbers of ids, padded with -1 at the right."""
    levels = zip_longest(*([numbers[token] for token in tokens] for tokens in semantic_ids), fillvalue=-1)
    return torch.tensor(list(levels)).T.contiguous()
