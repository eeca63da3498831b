"""The item catalog: the semantic id of each item, and the prefix tree over all semantic ids."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterable, Mapping, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from gflowtrl.files import write_text

from .items import Item, ItemIndex
from .saved import read_catalog
from .seen import SeenItems
from .tree import PrefixTree


if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)
CATALOG_FILE = "catalog.json"


class ItemCatalog:
    """Items, their semantic ids and the prefix tree over them.

    Every tensor with an item axis is in the order of `items`; every tensor with a leaf axis is in the order of
    `tree.paths`. Items with the same semantic id (a collision) share one leaf.

    Args:
        items: the items, integers or strings, without duplicates.
        semantic_ids: the tokens of each item as text, parallel to `items`.
        item_token_ids: `(items, L)` token ids of each item, padded with -1 on the right.
    """

    def __init__(self, items: Sequence[Item], semantic_ids: Sequence[Sequence[str]], item_token_ids: Tensor):
        self.items = list(items)
        self.semantic_ids = [tuple(tokens) for tokens in semantic_ids]
        if not len(self.items) == len(self.semantic_ids) == len(item_token_ids):
            raise ValueError(
                f"{len(self.items)} items, {len(self.semantic_ids)} semantic ids and {len(item_token_ids)} rows of "
                f"token ids were given. Give one of each per item."
            )
        self._index = ItemIndex(self.items)
        self.item_token_ids = item_token_ids.long()
        paths, row = torch.unique(self.item_token_ids, dim=0, return_inverse=True)
        self.tree = PrefixTree(paths)
        self.item_leaf = self.tree.leaf_of_row[row].long()
        self.leaf_sizes = torch.bincount(self.item_leaf, minlength=self.tree.num_leaves)
        # The items of a leaf are a slice of `_items_by_leaf`, in the catalog's order.
        self._items_by_leaf = torch.argsort(self.item_leaf, stable=True)
        self._leaf_start = torch.cumsum(self.leaf_sizes, 0) - self.leaf_sizes

    @classmethod
    def from_semantic_ids(
        cls, semantic_ids: Mapping[Item, Sequence[str]], tokenizer: PreTrainedTokenizerBase
    ) -> ItemCatalog:
        """Build a catalog from `{item: ("<a_1>", "<b_7>", ...)}` with the token ids of `tokenizer`.

        Items with equal semantic ids are merged into one leaf, and their number is logged.

        Raises:
            ValueError: there are no items, an item has no tokens, or the tokenizer does not know a token.
        """
        if not semantic_ids:
            raise ValueError("semantic_ids is empty; the catalog needs at least one item.")
        texts = sorted({token for tokens in semantic_ids.values() for token in tokens})
        token_ids = dict(zip(texts, tokenizer.convert_tokens_to_ids(texts), strict=True))
        for item, tokens in semantic_ids.items():
            if not tokens:
                raise ValueError(f"Item {item!r} has an empty semantic id.")
            if isinstance(tokens, str):
                raise ValueError(
                    f"The semantic id of item {item!r} is the text {tokens!r}; give a list of its tokens."
                )
            for token in tokens:
                if token_ids[token] in (None, tokenizer.unk_token_id):
                    raise ValueError(
                        f"The tokenizer does not know token {token!r} of item {item!r}. Build it with "
                        f"gflowtrl.data.build_tokenizer or add the tokens with gflowtrl.data.add_item_tokens."
                    )
        catalog = cls(list(semantic_ids), list(semantic_ids.values()), _pad_ids(semantic_ids.values(), token_ids))
        if colliding := int(catalog.leaf_sizes[catalog.leaf_sizes > 1].sum()):
            logger.info(
                "%d of %d items share their semantic id with another item; the catalog has %d leaves.",
                colliding, len(catalog), catalog.tree.num_leaves,
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
        """Move all tensors to `device`, in place, except `item_token_ids`, since prompts are built on the CPU."""
        self.tree.to(device)
        for name in ("item_leaf", "leaf_sizes", "_items_by_leaf", "_leaf_start"):
            setattr(self, name, getattr(self, name).to(device))
        return self

    def index_of(self, items: Sequence[Item]) -> Tensor:
        """Return the positions `(n,)` of items, on the CPU. An unknown item raises a ValueError that names it."""
        return torch.tensor([self._index[item] for item in items], dtype=torch.long)

    def known_items(self, histories: Iterable[Sequence[Item]]) -> tuple[list[list[Item]], list[tuple[int, Item]]]:
        """Return the histories without items that are not in the catalog, and `(row, item)` for each such item."""
        histories = list(histories)
        unknown = [(row, item) for row, history in enumerate(histories) for item in history if item not in self]
        return [[item for item in history if item in self] for history in histories], unknown

    def leaf_of(self, items: Sequence[Item]) -> Tensor:
        """Return the leaf of each item: `(n,)`."""
        return self.item_leaf[self.index_of(items).to(self.device)]

    def items_of(self, leaf: int) -> list[Item]:
        """Return all items at a leaf, in the catalog's order."""
        start = int(self._leaf_start[leaf])
        rows = self._items_by_leaf[start : start + int(self.leaf_sizes[leaf])]
        return [self.items[i] for i in rows.tolist()]

    def leaf_text(self, leaf: int) -> str:
        """Return the semantic id of a leaf as text, its tokens joined by spaces."""
        return " ".join(self.semantic_ids[int(self._items_by_leaf[self._leaf_start[leaf]])])

    def fold_items(self, values: Tensor, reduction: str = "sum") -> Tensor:
        """Reduce values per item to values per leaf, `(B, items) -> (B, N)`, by the "sum" or "max" over its items."""
        if reduction not in ("sum", "max"):
            raise ValueError(f"reduction is {reduction!r}; choose 'sum' or 'max'.")
        index = self.item_leaf.to(values.device).expand(values.shape[0], -1)
        folded = values.new_zeros(values.shape[0], self.tree.num_leaves)
        if reduction == "sum":
            return folded.scatter_add_(1, index, values)
        return folded.scatter_reduce_(1, index, values, "amax", include_self=False)

    def seen_items(
        self,
        histories: Sequence[Sequence[Item]],
        targets: Sequence[Item] | None = None,
        among: Iterable[Item] | None = None,
    ) -> SeenItems:
        """Collect the items that users have had, for rankings and rewards without them.

        Args:
            histories: all earlier items of each user, in any order.
            targets: an item of each user that stays a candidate even if the user has had it before.
            among: the only candidates, without repetitions. Default: all items. Other items do not count as seen, and
                a leaf is seen if the user has had each of its candidates.

        Raises:
            ValueError: an item is not in the catalog, or there are not as many targets as histories.
        """
        if targets is not None and len(targets) != len(histories):
            raise ValueError(f"There are {len(histories)} histories and {len(targets)} targets. Give one of each.")
        size = len(self)
        rows = torch.repeat_interleave(
            torch.arange(len(histories)), torch.tensor([len(history) for history in histories], dtype=torch.long)
        )
        keys = rows * size + self.index_of([item for history in histories for item in history])
        item_leaf, leaf_sizes = self.item_leaf.cpu(), self.leaf_sizes.cpu()
        if targets is not None:
            keys = keys[~torch.isin(keys, torch.arange(len(targets)) * size + self.index_of(targets))]
        if among is not None:
            candidates = self.index_of(list(among))
            keys = keys[torch.isin(keys % size, candidates)]
            leaf_sizes = torch.bincount(item_leaf[candidates], minlength=len(leaf_sizes))
        return SeenItems.of(keys.unique(), item_leaf, leaf_sizes, len(histories))

    def expand_leaves(self, leaves: Tensor, k: int, seen: SeenItems | None = None) -> Tensor:
        """Turn ranked leaves into ranked items. Each leaf yields all its items, and the list is cut at `k`.

        Args:
            leaves: `(U, R)`, best first; -1 is skipped.
            k: length of the item list.
            seen: items of each user that are left out.

        Returns:
            `(U, k)` positions in `items`, padded with -1.
        """
        if seen is not None:
            return seen.without(self.expand_leaves(leaves, k + seen.most), k)
        leaves = leaves.to(self.device)
        sizes = torch.where(leaves >= 0, self.leaf_sizes[leaves.clamp(min=0)], 0)
        ends = torch.cumsum(sizes, 1)
        ranks = torch.arange(k, device=leaves.device).expand(len(leaves), k).contiguous()
        column = torch.searchsorted(ends, ranks, right=True)  # the leaf that holds each rank
        exists = column < leaves.shape[1]
        column = column.clamp(max=leaves.shape[1] - 1)
        leaf = leaves.gather(1, column).clamp(min=0)
        within_leaf = ranks - (ends - sizes).gather(1, column)
        rows = torch.where(exists, self._leaf_start[leaf] + within_leaf, 0)
        return torch.where(exists, self._items_by_leaf[rows], -1)

    # ------------------------------------------------------------------------------------------------ saving, loading
    def save_pretrained(self, directory: str | os.PathLike) -> None:
        """Write `catalog.json` (items, tokens as text, token ids) into `directory`, atomically."""
        token_ids = dict(zip(*self._distinct_tokens(), strict=True))
        content = {"items": self.items, "semantic_ids": self.semantic_ids, "token_ids": token_ids}
        write_text(Path(directory, CATALOG_FILE), json.dumps(content))

    @classmethod
    def from_pretrained(cls, directory: str | os.PathLike) -> ItemCatalog:
        """Read a catalog that `save_pretrained` wrote.

        Raises:
            FileNotFoundError: `catalog.json` is missing.
            ValueError: `catalog.json` is damaged (`saved.read_catalog`).
        """
        path = Path(directory) / CATALOG_FILE
        if not path.is_file():
            raise FileNotFoundError(
                f"{path} is missing. A recommender checkpoint of gflowtrl has this file; a plain language model does "
                f"not. Use the folder of a recommender."
            )
        items, semantic_ids, token_ids = read_catalog(path)
        return cls(items, semantic_ids, _pad_ids(semantic_ids, token_ids))

    def check_tokenizer(self, tokenizer: PreTrainedTokenizerBase, where: str = "The catalog") -> None:
        """Check that each token has the token id that the tokenizer gives it.

        Args:
            tokenizer: the tokenizer of the same model.
            where: the catalog's name in the error, for example its file.

        Raises:
            ValueError: a token has another id in the tokenizer, or none: the catalog belongs to another tokenizer, or
                tokens were swapped.
        """
        tokens, token_ids = self._distinct_tokens()
        expected = tokenizer.convert_tokens_to_ids(tokens)
        entries = zip(tokens, token_ids, expected, strict=True)
        if wrong := [(token, token_id, other) for token, token_id, other in entries if token_id != other]:
            token, token_id, other = wrong[0]
            problem = "does not know it" if other in (None, tokenizer.unk_token_id) else f"gives it {other}"
            raise ValueError(
                f"{where} gives token {token!r} the token id {token_id}, but the tokenizer {problem} ({len(wrong)} of "
                f"{len(tokens)} tokens differ): they do not belong together. Restore the catalog and the tokenizer "
                f"that were saved with this model. ItemCatalog.from_semantic_ids builds a catalog for a tokenizer."
            )

    def _distinct_tokens(self) -> tuple[list[str], list[int]]:
        """Return the tokens of all semantic ids, each once, as text and as token ids."""
        token_ids, first = np.unique(self.item_token_ids.numpy(), return_index=True)
        rows, columns = np.divmod(first[token_ids >= 0], self.item_token_ids.shape[1])
        tokens = [self.semantic_ids[row][column] for row, column in zip(rows, columns, strict=True)]
        return tokens, token_ids[token_ids >= 0].tolist()


def _pad_ids(semantic_ids: Iterable[Sequence[str]], token_ids: Mapping[str, int]) -> Tensor:
    """Return the token ids of semantic ids, padded with -1 on the right."""
    levels = zip_longest(*([token_ids[token] for token in tokens] for tokens in semantic_ids), fillvalue=-1)
    return torch.tensor(list(levels)).T.contiguous()
