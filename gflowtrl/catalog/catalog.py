"""The item catalog: the semantic id of each item, and the prefix tree over all semantic ids."""

from __future__ import annotations

import json
import logging
import operator
import os
from collections import ChainMap
from collections.abc import Collection, Hashable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from gflowtrl.checks import check_choice, check_type, short_repr
from gflowtrl.files import write_text

from .items import Item, ItemIndex, as_items
from .rows import distinct_rows
from .saved import read_catalog
from .seen import SeenItems
from .token_ids import check_is_tokenizer, ids_of_tokens, pad_ids
from .tree import PrefixError, PrefixTree


if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)
CATALOG_FILE = "catalog.json"


class ItemCatalog:
    """Items, their semantic ids and the prefix tree over them.

    Every tensor with an item axis is in the order of `items`; every tensor with a leaf axis is in the order of
    `tree.paths`. Items with the same semantic id (a collision) share one leaf.

    Retired items are not in `items` and not in the tree, so they have no probability. Their tokens are kept, because
    histories may contain them.

    Args:
        items: the items, integers or strings, without duplicates.
        semantic_ids: the tokens of each item as text, parallel to `items`.
        item_token_ids: `(items, L)` token ids of each item, padded with -1 on the right.
        retired: those of the items that are retired.
        version: how many changes have led to this catalog, counted from 1 (`updated`).

    Attributes:
        items: as given, without the retired items.
        semantic_ids: their tokens as text.
        item_token_ids: `(items, L)`, the same as token ids.
        history_items: all items that a history may contain: `items`, then the retired ones.
        history_semantic_ids: their tokens as text.
        history_token_ids: `(history items, L)`, the same as token ids.
    """

    def __init__(
        self,
        items: Sequence[Item],
        semantic_ids: Sequence[Sequence[str]],
        item_token_ids: Tensor,
        retired: Iterable[Item] = (),
        version: int = 1,
    ):
        items, semantic_ids = as_items(items), [tuple(tokens) for tokens in semantic_ids]
        check_type("item_token_ids", item_token_ids, Tensor, "a tensor (items, L) of token ids")
        if not len(items) == len(semantic_ids) == len(item_token_ids):
            raise ValueError(
                f"{len(items)} items, {len(semantic_ids)} semantic ids and {len(item_token_ids)} rows of "
                f"token ids were given. Give one of each per item."
            )
        item_token_ids, kept = item_token_ids.long(), len(items)
        if gone := set(retired):
            order = [row for row, item in enumerate(items) if item not in gone]
            kept, order = len(order), order + [row for row, item in enumerate(items) if item in gone]
            if not kept:
                raise ValueError("Every item is retired; the catalog needs at least one that can be recommended.")
            if unknown := gone.difference(items):
                raise ValueError(f"Item {next(iter(unknown))!r} cannot be retired: it is not in the catalog.")
            items, semantic_ids = [items[row] for row in order], [semantic_ids[row] for row in order]
            item_token_ids = item_token_ids[torch.tensor(order)]
        self.history_items, self.history_semantic_ids, self.history_token_ids = items, semantic_ids, item_token_ids
        self.items, self.semantic_ids = (items[:kept], semantic_ids[:kept]) if gone else (items, semantic_ids)
        self._index, self._retired, self.version = ItemIndex(self.items), ItemIndex(items[kept:]), version
        self.item_token_ids = item_token_ids[:kept]
        paths, row = distinct_rows(self.item_token_ids)
        try:
            self.tree = PrefixTree(paths)
        except PrefixError as error:
            rows = [int((row == number).nonzero()[0]) for number in error.rows]
            short, other = (f"{' '.join(self.semantic_ids[one])} of item {self.items[one]!r}" for one in rows)
            raise ValueError(
                f"The semantic id {short} is a prefix of {other}, so generation could not tell where the shorter id "
                f"ends. Use ids of equal length, or add an end token."
            ) from None
        self.item_leaf = self.tree.leaf_of_row[row].long()
        self.leaf_sizes = torch.bincount(self.item_leaf, minlength=self.tree.num_leaves)
        # The items of a leaf are a slice of `_items_by_leaf`, in the catalog's order.
        self._items_by_leaf = torch.argsort(self.item_leaf, stable=True)
        self._leaf_start = torch.cumsum(self.leaf_sizes, 0) - self.leaf_sizes

    @classmethod
    def from_semantic_ids(
        cls,
        semantic_ids: Mapping[Item, Sequence[str]],
        tokenizer: PreTrainedTokenizerBase,
        retired: Iterable[Item] = (),
    ) -> ItemCatalog:
        """Build a catalog from `{item: ("<a_1>", "<b_7>", ...)}` with the token ids of `tokenizer`.

        Items with equal semantic ids are merged into one leaf, and their number is logged. The `retired` items are
        known in histories only.

        Raises:
            ValueError: there are no items, an item has no tokens, or the tokenizer does not know a token.
            TypeError: items are not integers or strings, or tokens are not strings.
        """
        check_type("semantic_ids", semantic_ids, Mapping, "a dictionary {item: tokens}")
        if not semantic_ids:
            raise ValueError("semantic_ids is empty; the catalog needs at least one item.")
        token_ids = ids_of_tokens(semantic_ids, tokenizer)
        paths = pad_ids(semantic_ids.values(), token_ids)
        catalog = cls(list(semantic_ids), list(semantic_ids.values()), paths, retired)
        if colliding := int(catalog.leaf_sizes[catalog.leaf_sizes > 1].sum()):
            logger.info(
                "%d of %d items share their semantic id with another item; the catalog has %d leaves.",
                colliding, len(catalog), catalog.tree.num_leaves,
            )  # fmt: skip
        return catalog

    def updated(
        self, add: Mapping[Item, Sequence[str]], retire: Iterable[Item], tokenizer: PreTrainedTokenizerBase
    ) -> ItemCatalog:
        """Return a new catalog with more items and without others; this one does not change.

        Ids and token ids of other items stay the same, and so does their order. Added items come last.

        Args:
            add: semantic ids of items to add. A retired item gets back its id, which must be the one given here.
            retire: items that can no longer be recommended.
            tokenizer: source of the token ids of the added items.

        Raises:
            ValueError: an item to add is in the catalog, or had another id before it was retired; an item to retire is
                not in the catalog, or is the last one; an id is invalid (`from_semantic_ids`, `PrefixTree`).
        """
        retire, token_ids = set(retire), ids_of_tokens(add, tokenizer)
        for item, tokens in add.items():
            if item in self:
                raise ValueError(f"Item {item!r} is in the catalog already. Leave it out, or retire it first.")
            if item in self._retired:
                old = self.history_semantic_ids[len(self) + self._retired[item]]
                if tuple(tokens) != old:
                    raise ValueError(
                        f"Item {item!r} had the semantic id {' '.join(old)} before it was retired, and histories "
                        f"contain that id. Add it again with the same one."
                    )
        self.index_of(list(retire))  # an unknown item raises
        items, ids, old = self.history_items, self.history_semantic_ids, self.history_token_ids
        if not self._retired.keys().isdisjoint(add):
            kept = [row for row, item in enumerate(items) if item not in add]
            items, ids, old = [items[row] for row in kept], [ids[row] for row in kept], old[torch.tensor(kept)]
        items, ids, new = [*items, *add], [*ids, *add.values()], pad_ids(add.values(), token_ids)
        width = max(old.shape[1], new.shape[1])
        paths = torch.cat([torch.nn.functional.pad(part, (0, width - part.shape[1]), value=-1) for part in (old, new)])
        retired = retire | {item for item in self._retired if item not in add}
        return ItemCatalog(items, ids, paths, retired, self.version + 1)

    # ------------------------------------------------------------------------------------------------------ queries
    def __len__(self) -> int:
        return len(self.items)

    def __contains__(self, item: Item) -> bool:
        return item in self._index

    def __repr__(self) -> str:
        return f"ItemCatalog(items={len(self)}, leaves={self.tree.num_leaves}, tokens_per_id={self.tree.max_depth})"

    @property
    def retired(self) -> list[Item]:
        """The items that are known in histories, but not recommended."""
        return list(self._retired)

    @property
    def known(self) -> Collection[Item]:
        """The items that histories may contain, for tests of membership."""
        return ChainMap(self._index, self._retired) if self._retired else self._index

    @property
    def device(self) -> torch.device:
        return self.tree.device

    def to(self, device: torch.device | str) -> ItemCatalog:
        """Move all tensors to `device`, in place, except token ids, since prompts are built on the CPU."""
        self.tree.to(device)
        for name in ("item_leaf", "leaf_sizes", "_items_by_leaf", "_leaf_start"):
            setattr(self, name, getattr(self, name).to(device))
        return self

    def index_of(self, items: Sequence[Item]) -> Tensor:
        """Return the positions `(n,)` of items, on the CPU. An unknown item raises a ValueError that names it."""
        try:
            return torch.tensor([self._index[item] for item in items], dtype=torch.long)
        except TypeError:
            raise TypeError(
                f"{_no_item(items)}; items are integers or strings, and a list of them is needed."
            ) from None

    def history_index_of(self, items: Sequence[Item]) -> Tensor:
        """Return the positions `(n,)` in `history_items`, on the CPU. An unknown item raises a ValueError."""
        if not self._retired:
            return self.index_of(items)
        size, retired = len(self), self._retired
        rows = [size + retired[item] if item in retired else self._index[item] for item in items]
        return torch.tensor(rows, dtype=torch.long)

    def readable_items(self, histories: Iterable[Sequence[Item]]) -> tuple[list[list[Item]], list[tuple[int, Item]]]:
        """Return the histories without items that are neither in the catalog nor retired, and `(row, item)` for each
        such item."""
        known, unknown = [], []
        for row, history in enumerate(histories):
            try:
                unknown += [(row, item) for item in history if item not in self and item not in self._retired]
                known.append([item for item in history if item in self or item in self._retired])
            except TypeError:
                wrong = _no_item(history) or "a history is not a list"
                raise TypeError(f"{wrong}; each history is a list of items, which are integers or strings.") from None
        return known, unknown

    def known_items(self, histories: Iterable[Sequence[Item]]) -> tuple[list[list[Item]], list[tuple[int, Item]]]:
        """Return the histories without items that are not in the catalog, and `(row, item)` for each such item."""
        histories = list(histories)
        try:
            unknown = [(row, item) for row, history in enumerate(histories) for item in history if item not in self]
        except TypeError:
            wrong = next(
                (_no_item(history) for history in histories if _no_item(history)), "histories has a wrong value"
            )
            raise TypeError(f"{wrong}; each history is a list of items, which are integers or strings.") from None
        return [[item for item in history if item in self] for history in histories], unknown

    def leaf_of(self, items: Sequence[Item]) -> Tensor:
        """Return the leaf of each item: `(n,)`."""
        return self.item_leaf[self.index_of(items).to(self.device)]

    def items_of(self, leaf: int) -> list[Item]:
        """Return all items at a leaf, in the catalog's order."""
        leaf = self._checked_leaf(leaf)
        start = int(self._leaf_start[leaf])
        rows = self._items_by_leaf[start : start + int(self.leaf_sizes[leaf])]
        return [self.items[i] for i in rows.tolist()]

    def leaf_text(self, leaf: int) -> str:
        """Return the semantic id of a leaf as text, its tokens joined by spaces."""
        return " ".join(self.semantic_ids[int(self._items_by_leaf[self._leaf_start[self._checked_leaf(leaf)]])])

    def _checked_leaf(self, leaf: int) -> int:
        last = self.tree.num_leaves - 1
        try:
            number = operator.index(leaf)
        except TypeError:
            number = -1
        if not 0 <= number <= last:
            raise ValueError(f"leaf is {short_repr(leaf)}; it must be a number from 0 to {last}.")
        return number

    def check_counts(self, item_counts: Tensor, retired: bool = False) -> None:
        """Check that a tensor `(items,)` has a count of at least 0 for each item.

        Args:
            item_counts: the counts.
            retired: also allow `(history items,)`, with counts of the retired items.

        Raises:
            TypeError: it is not a tensor.
            ValueError: it has another shape, or a count is negative, NaN or infinite; the error names its item.
        """
        check_type("item_counts", item_counts, Tensor, "a tensor with one count per item")
        if item_counts.shape not in ((len(self),), (len(self.history_items if retired else self.items),)):
            raise ValueError(
                f"item_counts has shape {tuple(item_counts.shape)}, but the catalog has {len(self)} items. Give "
                f"one count per item, in the order of catalog.items."
            )
        if len(wrong := (~(item_counts.isfinite() & (item_counts >= 0))).nonzero()):
            item, count = self.history_items[int(wrong[0])], item_counts[wrong[0]].item()
            raise ValueError(f"item_counts has {count} for item {item!r}; a count must be a number of at least 0.")

    def fold_items(self, values: Tensor, reduction: str = "sum") -> Tensor:
        """Reduce values per item to values per leaf, `(B, items) -> (B, N)`, by the "sum" or "max" over its items."""
        check_type("values", values, Tensor, "a tensor (B, items)")
        if values.ndim != 2 or values.shape[1] != len(self):
            raise ValueError(f"values has shape {tuple(values.shape)}; it must be (B, {len(self)}), a value per item.")
        check_choice("reduction", reduction, ("sum", "max"))
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
        """Collect the items that users have had, for rankings and rewards without them. Retired ones do not count.

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
        if self._retired:
            histories = [[item for item in history if item not in self._retired] for history in histories]
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
        token_ids = dict(zip(*self.distinct_tokens(), strict=True))
        content = {"items": self.items, "semantic_ids": self.semantic_ids, "token_ids": token_ids}
        if self.version > 1:
            content["version"] = self.version
        if self._retired:
            content["retired"] = {"items": self.retired, "semantic_ids": self.history_semantic_ids[len(self) :]}
        write_text(Path(directory, CATALOG_FILE), json.dumps(content))

    @classmethod
    def from_pretrained(cls, directory: str | os.PathLike) -> ItemCatalog:
        """Read a catalog that `save_pretrained` wrote.

        Raises:
            FileNotFoundError: `catalog.json` is missing.
            ValueError: `catalog.json` is damaged (`saved.read_catalog`).
        """
        check_type("directory", directory, str | os.PathLike, "the path of a folder")
        path = Path(directory) / CATALOG_FILE
        if not path.is_file():
            raise FileNotFoundError(
                f"{path} is missing. A recommender checkpoint of gflowtrl has this file; a plain language model does "
                f"not. Use the folder of a recommender."
            )
        saved = read_catalog(path)
        paths = pad_ids(saved.semantic_ids, saved.token_ids)
        return cls(saved.items, saved.semantic_ids, paths, saved.retired, saved.version)

    def check_tokenizer(self, tokenizer: PreTrainedTokenizerBase, where: str = "The catalog") -> None:
        """Check that each token has the token id that the tokenizer gives it.

        Args:
            tokenizer: the tokenizer of the same model.
            where: the catalog's name in the error, for example its file.

        Raises:
            ValueError: a token has another id in the tokenizer, or none: the catalog belongs to another tokenizer, or
                tokens were swapped.
        """
        check_is_tokenizer(tokenizer)
        tokens, token_ids = self.distinct_tokens()
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

    def distinct_tokens(self) -> tuple[list[str], list[int]]:
        """Return the tokens of all semantic ids, each once, as text and as token ids."""
        flat = self.history_token_ids.flatten().numpy()
        place = np.full(int(flat.max()) + 2, -1)  # the last element is for the padding
        place[flat] = np.arange(len(flat))
        token_ids = np.flatnonzero(place[:-1] >= 0)
        rows, columns = np.divmod(place[token_ids], self.history_token_ids.shape[1])
        tokens = [self.history_semantic_ids[row][column] for row, column in zip(rows, columns, strict=True)]
        return tokens, token_ids.tolist()


def _no_item(items: object) -> str:
    """Return what is wrong with items that cannot be looked up; an empty text for items that can."""
    if isinstance(items, str) or not isinstance(items, Iterable):
        return f"{short_repr(items)} is not a list of items"
    return next((f"{short_repr(item)} is not an item" for item in items if not isinstance(item, Hashable)), "")
