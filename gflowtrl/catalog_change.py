"""Changes of a recommender's catalog after its training: new items, and items that can no longer be recommended.

A change is planned without the model, so that a server can do it while it answers requests. Only new tokens change the
model: its tables get a row for each.
"""

from __future__ import annotations

import copy
import os
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from gflowtrl.catalog import Item, ItemCatalog
from gflowtrl.checks import check_text, check_titles, check_type, short_repr
from gflowtrl.data import PromptEncoder, TextPromptEncoder, add_item_tokens
from gflowtrl.data.recommender_files import write_recommender_files
from gflowtrl.policy import TreePolicy, check_positions, make_policy
from gflowtrl.semantic_ids import ItemTokenizer
from gflowtrl.semantic_ids.texts import feature_text
from gflowtrl.semantic_ids.tokenizer import DESCRIPTION_FILE, TENSOR_FILE, token_name

from .new_tokens import add_token_rows, check_growth, similar_tokens


ITEM_TOKENIZER_FOLDER = "item_tokenizer"
TEXT, SEMANTIC_ID = "text", "semantic_id"  # entries of a new item that are not features


class CatalogConflict(ValueError):
    """A change does not fit the catalog: an item to add is in it, or one to retire is not."""


@dataclass(frozen=True)
class ChangeReport:
    """What a change does.

    Attributes:
        added: items that the recommender did not know.
        restored: items that had been retired, and can be recommended again.
        retired: items that can no longer be recommended.
        sharing: of the added and restored items, those that share their semantic id with another item.
        new_tokens: tokens that no item had before.
        items: number of items that can be recommended now.
        leaves: number of their distinct ids.
        version: of the new catalog.
    """

    added: int
    restored: int
    retired: int
    sharing: int
    new_tokens: int
    items: int
    leaves: int
    version: int

    def __str__(self) -> str:
        return (
            f"{self.added:,} items added, {self.restored:,} restored, {self.retired:,} retired: {self.items:,} items "
            f"can be recommended (version {self.version} of the catalog). {self.sharing:,} of the added or restored "
            f"ones share their semantic id with another item; {self.new_tokens:,} tokens are new."
        )

    def as_dict(self) -> dict[str, int]:
        """Return the attributes by name."""
        return asdict(self)


@dataclass(frozen=True, eq=False)
class CatalogParts:
    """The parts of a recommender that depend on its catalog; those of `Recommender` with the same names."""

    catalog: ItemCatalog
    tokenizer: PreTrainedTokenizerBase
    encoder: PromptEncoder
    titles: dict[Item, str]
    item_counts: Tensor | None
    item_tokenizer: ItemTokenizer | None


@dataclass(frozen=True, eq=False)
class CatalogChange:
    """A planned change, for `Recommender.with_change`.

    Attributes:
        parts: those of the changed recommender.
        similar_tokens: the earlier tokens whose mean embedding a new token gets.
        report: what the change does.
    """

    parts: CatalogParts
    similar_tokens: Mapping[str, Sequence[str]]
    report: ChangeReport


def plan_change(parts: CatalogParts, add: Mapping[Item, Mapping[str, Any]], retire: Iterable[Item]) -> CatalogChange:
    """Plan a change; `Recommender.plan_change` has the arguments and errors."""
    old, retire = parts.catalog, _items_in(retire)
    _check_change(old, add, retire)
    returning = {
        item: old.history_semantic_ids[int(old.history_index_of([item]))] for item in add if item in old.known
    }
    fresh = [item for item in add if item not in returning]
    new_ids, item_tokenizer = _new_ids(parts, {item: add[item] for item in fresh})
    prompts = {*parts.encoder.head, *parts.encoder.tail, *parts.encoder.table.unique().tolist()}
    similar = similar_tokens(new_ids, old, parts.tokenizer, prompts, parts.item_tokenizer)
    tokenizer = copy.deepcopy(parts.tokenizer) if similar else parts.tokenizer
    add_item_tokens(tokenizer, new_ids)  # also checks that the ids survive a round trip
    ids = {item: returning[item] if item in returning else new_ids[item] for item in add}
    catalog = old.updated(ids, retire, tokenizer)
    titles = {item: entry["title"] for item, entry in add.items() if entry.get("title") is not None}
    titles = {**parts.titles, **titles}
    is_old, rows = _old_rows(old, catalog, set(fresh))
    counts = parts.item_counts
    if counts is not None:
        padded = torch.nn.functional.pad(counts.cpu(), (0, len(old.history_items) - len(counts)))
        counts = padded.new_zeros(len(is_old)).masked_scatter(is_old, padded[rows])
    encoder = _changed_encoder(parts.encoder, catalog, tokenizer, titles, is_old, rows)
    sharing = catalog.leaf_sizes[catalog.leaf_of(list(add))] > 1
    report = ChangeReport(
        len(fresh), len(returning), len(retire), int(sharing.sum()), len(similar), len(catalog),
        catalog.tree.num_leaves, catalog.version,
    )  # fmt: skip
    changed = CatalogParts(catalog, tokenizer, encoder, titles, counts, item_tokenizer)
    return CatalogChange(changed, similar, report)


def _items_in(retire: Iterable[Item]) -> set[Item]:
    """Return the items to retire as a set. Anything else than a list of items is a TypeError."""
    if isinstance(retire, str) or not isinstance(retire, Iterable):
        raise TypeError(f"The items to retire are {short_repr(retire)}; they must be a list of items.")
    try:
        return set(retire)
    except TypeError:
        raise TypeError("The items to retire hold a list or a dictionary; items are integers or strings.") from None


def _check_change(catalog: ItemCatalog, add: Mapping[Item, Mapping[str, Any]], retire: set[Item]) -> None:
    """Check a change before anything is computed."""
    check_type("add", add, Mapping, "a dictionary {item: features}")
    if not add and not retire:
        raise ValueError("The change is empty. Give items to add, or items to retire.")
    kind = type(catalog.items[0])
    for item, entry in add.items():
        check_item(item)
        if type(item) is not kind:
            raise ValueError(
                f"Item {item!r} is of type {type(item).__name__}, but the items of the catalog are of type "
                f"{kind.__name__}, for example {catalog.items[0]!r}. Use one type."
            )
        if item in catalog:
            raise CatalogConflict(f"Item {item!r} is in the catalog already. Leave it out, or retire it first.")
        if item in retire:
            raise ValueError(f"Item {item!r} is to be added and to be retired. Leave it out in one of the two.")
        if not isinstance(entry, Mapping):
            raise ValueError(f"Item {item!r} has {short_repr(entry)}; it must have features by name.")
        check_text(f"The {TEXT} of item {item!r}", entry.get(TEXT), optional=True)
    check_titles({item: entry["title"] for item, entry in add.items() if entry.get("title") is not None})
    for item in retire:
        if item not in catalog:
            what = "is retired already" if item in catalog.known else "is not in the catalog"
            raise CatalogConflict(f"Item {item!r} cannot be retired, because it {what}. Leave it out.")
    if len(retire) == len(catalog) and not add:
        raise CatalogConflict("Every item would be retired. Keep at least one.")


def check_item(item: Any) -> None:
    """Check that an item is text without half characters, or a whole number of at most 64 bits."""
    if type(item) is str:
        return check_text("An item", item)
    if type(item) is not int or not -(2**63) <= item < 2**63:
        raise ValueError(f"Item {short_repr(item)} is neither text nor a whole number of at most 64 bits. Correct it.")


def _new_ids(
    parts: CatalogParts, add: Mapping[Item, Mapping[str, Any]]
) -> tuple[dict[Item, tuple[str, ...]], ItemTokenizer | None]:
    """Return the semantic ids of new items, and the item tokenizer that knows them."""
    if parts.item_tokenizer is None:
        return {item: _given_id(item, entry) for item, entry in add.items()}, None
    tokenizer = copy.copy(parts.item_tokenizer)  # `add` replaces its attributes and changes none in place
    for item, entry in add.items():
        if entry.get(SEMANTIC_ID) is not None:
            raise ValueError(f"Item {item!r} has a {SEMANTIC_ID}, but this recommender makes its ids. Leave it out.")
    # Items that were tokenized, but not in the data that the recommender was trained on.
    rows = [row for row, item in enumerate(tokenizer.items) if item in add]
    ids = tokenizer.ids_at(rows)
    fresh = [item for item in add if item not in ids]
    if fresh and tokenizer.embedder is None:
        raise ValueError(
            "The ids of this recommender were made from vectors, so that new items cannot be added by their texts. "
            "Give them ids with gflowtrl tokenize --add --vectors, and use its item tokenizer (--semantic_ids)."
        )
    texts = [_text_of(item, add[item], tokenizer.features) for item in fresh]
    return {**ids, **tokenizer.add(texts, fresh)}, tokenizer


def _given_id(item: Item, entry: Mapping[str, Any]) -> tuple[str, ...]:
    tokens = entry.get(SEMANTIC_ID)
    if tokens is None:
        raise ValueError(
            f"Item {item!r} has no {SEMANTIC_ID}, and the recommender has no item tokenizer to make one. Give each "
            f"new item a list of tokens as {SEMANTIC_ID}, or give the folder of the item tokenizer (--semantic_ids)."
        )
    if not isinstance(tokens, list | tuple) or not tokens or not all(isinstance(token, str) for token in tokens):
        raise ValueError(f"The {SEMANTIC_ID} of item {item!r} is {short_repr(tokens)}; it must be a list of tokens.")
    return tuple(tokens)


def _text_of(item: Item, entry: Mapping[str, Any], features: Sequence[str]) -> str:
    try:
        text = entry.get(TEXT) or feature_text(entry, features)
    except RecursionError:
        raise ValueError(f"The features of item {item!r} are nested too deeply. Leave them out.") from None
    if not text.strip():
        raise ValueError(f"Item {item!r} has no text. Give {TEXT}, or one of the features {', '.join(features)}.")
    return text


def check_ids(item_tokenizer: ItemTokenizer, catalog: ItemCatalog, where: str = "The item tokenizer") -> None:
    """Check that an item tokenizer has made the ids of a catalog.

    Args:
        item_tokenizer: it may know further items.
        catalog: the catalog, with its retired items.
        where: the tokenizer's name in the error.

    Raises:
        ValueError: an item of the catalog has no id or another id in the tokenizer.
    """
    items, ids = catalog.history_items, catalog.history_token_ids
    known = {item: row for row, item in enumerate(item_tokenizer.items)}
    rows = torch.tensor([known.get(item, -1) for item in items])
    number = dict(zip(*catalog.distinct_tokens(), strict=True))
    right = rows >= 0
    if ids.shape[1] != item_tokenizer.num_levels:
        right[:] = False
    for level in range(ids.shape[1] if bool(right.any()) else 0):
        codes = item_tokenizer.codes[:, level]
        table = [number.get(token_name(level, code), -1) for code in range(int(codes.max()) + 1)]
        right &= torch.tensor(table)[codes[rows]] == ids[:, level]
    if not bool(right.all()):
        wrong = (~right).nonzero().flatten()
        raise ValueError(
            f"{where} has not made the ids of this recommender: {len(wrong):,} of {len(items):,} items have another "
            f"id or none, for example {items[int(wrong[0])]!r}. Give the one that made them."
        )


def _old_rows(old: ItemCatalog, new: ItemCatalog, fresh: set[Item]) -> tuple[Tensor, Tensor]:
    """Return which history items of a new catalog the old one has, bool `(history items,)`, and their rows there."""
    is_old = torch.tensor([item not in fresh for item in new.history_items])
    return is_old, old.history_index_of([item for item in new.history_items if item not in fresh])


def _changed_encoder(
    old: PromptEncoder,
    catalog: ItemCatalog,
    tokenizer: PreTrainedTokenizerBase,
    titles: Mapping[Item, str],
    is_old: Tensor,
    rows: Tensor,
) -> PromptEncoder:
    """Return the encoder of a changed catalog. Prompts of old items are the same tokens as before."""
    encoder = copy.copy(old)
    encoder.catalog, encoder.table = catalog, catalog.history_token_ids
    if old.format is None:
        return encoder
    table = old.table.new_full((len(is_old), old.table.shape[1]), -1)
    table[is_old] = old.table[rows]
    new = (~is_old).nonzero().flatten().tolist()
    if new:
        items = [catalog.history_items[row] for row in new]
        ids, token_ids = [catalog.history_semantic_ids[row] for row in new], catalog.history_token_ids[new]
        added = TextPromptEncoder(ItemCatalog(items, ids, token_ids), tokenizer, titles, old.format).table
        missing = added.shape[1] - table.shape[1]
        table = torch.nn.functional.pad(table, (0, max(missing, 0)), value=-1)
        table[new] = torch.nn.functional.pad(added, (0, max(-missing, 0)), value=-1)
    encoder.table = table
    return encoder


class ChangeableCatalog:
    """The methods of `Recommender` that change its catalog. They return a new recommender."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    catalog: ItemCatalog
    encoder: PromptEncoder
    policy: TreePolicy
    titles: dict[Item, str]
    item_counts: Tensor | None
    _item_tokenizer: ItemTokenizer | Path | None
    _ids_are_checked = False
    _grown = False

    @property
    def item_tokenizer(self) -> ItemTokenizer | None:
        """What made the semantic ids, for new items; None if the folder has none.

        Raises:
            ValueError: its files are damaged, or it did not make the ids of this recommender.
        """
        found = self._item_tokenizer
        if found is not None and not self._ids_are_checked:
            where = "The item tokenizer" if isinstance(found, ItemTokenizer) else f"The item tokenizer in {found}"
            found = found if isinstance(found, ItemTokenizer) else ItemTokenizer.from_pretrained(found)
            check_ids(found, self.catalog, where)
            self._item_tokenizer, self._ids_are_checked = found, True
        return found

    def set_item_tokenizer(self, item_tokenizer: ItemTokenizer | str | os.PathLike) -> None:
        """Set what made the semantic ids, or its folder, for a recommender that was saved without it."""
        is_loaded = isinstance(item_tokenizer, ItemTokenizer)
        self._item_tokenizer = item_tokenizer if is_loaded else Path(item_tokenizer)
        self._ids_are_checked = False

    def plan_change(
        self, add: Mapping[Item, Mapping[str, Any]] | None = None, retire: Iterable[Item] = ()
    ) -> CatalogChange:
        """Plan a change of the catalog, for `with_change`. It reads nothing that a decoding changes, so a server may
        plan in another thread.

        Args:
            add: the features of items to add, such as `{"title": "A lamp"}`. The item tokenizer makes a semantic id
                of the features that it was made with, or of `"text"` instead. Without an item tokenizer, give
                `"semantic_id"`, a list of tokens. An item that was retired gets its id back, whatever is given.
            retire: items that must not be recommended any more. Histories may still contain them.

        Raises:
            CatalogConflict: an item to add is in the catalog, or one to retire is not, or none would be left.
            ValueError: an item to add has no text or no id; items are of another type; an item is in both; the prompts
                become too long; a quantized model, or one with adapters, would need new tokens.
            TypeError: `add` is not a mapping, or `retire` is not a list of items.
        """
        tokenizer = self.item_tokenizer if add else None
        parts = CatalogParts(self.catalog, self.tokenizer, self.encoder, self.titles, self.item_counts, tokenizer)
        change = plan_change(parts, add or {}, retire)
        encoder, depth = change.parts.encoder, change.parts.catalog.tree.max_depth
        check_positions(self.model, encoder.max_length, depth, encoder.max_history_items)
        if change.similar_tokens:
            check_growth(self.model)
        return change

    def with_change(self, change: CatalogChange) -> Self:
        """Return a recommender with a changed catalog and the same model object. This one keeps its catalog.

        If tokens are new, the model's tables get rows for them, the mean of the rows of similar tokens; all other rows
        stay. The next change of such a model must start from the returned recommender, unless `discard_change` is
        called.

        Raises:
            ValueError: the model has got rows for another change of this recommender.
        """
        if change.similar_tokens:
            if self._grown:
                raise ValueError(
                    "The model has got rows for the new tokens of another change. Change the recommender that "
                    "with_change returned then."
                )
            add_token_rows(self.model, change.parts.tokenizer, change.similar_tokens)
            self._grown = True
        changed, parts = copy.copy(self), change.parts
        changed.catalog, changed.tokenizer, changed.encoder = parts.catalog, parts.tokenizer, parts.encoder
        changed.titles, changed.item_counts = parts.titles, parts.item_counts
        changed._item_tokenizer = parts.item_tokenizer or self._item_tokenizer
        changed._grown, changed.policy = False, make_policy(self.model, parts.catalog)
        return changed

    def discard_change(self) -> None:
        """Allow another change instead of the one of `with_change`, whose recommender must not be used any more."""
        self._grown = False

    def add_items(self, items: Mapping[Item, Mapping[str, Any]]) -> Self:
        """Return a recommender that can also recommend these items; `plan_change` and `with_change` have the details.

        Example:
            ```python
            larger = recommender.add_items({"B0042": {"title": "Blue fountain pen", "brand": "Lamy"}})
            ```
        """
        return self.with_change(self.plan_change(add=items))

    def retire_items(self, items: Iterable[Item]) -> Self:
        """Return a recommender that no longer recommends these items; histories may still contain them."""
        return self.with_change(self.plan_change(retire=items))

    def save_catalog(self, directory: str | os.PathLike) -> None:
        """Write the files that depend on the catalog, into the folder of a recommender with the same model."""
        write_recommender_files(directory, self.encoder, self.item_counts, self.titles)
        folder = Path(directory, ITEM_TOKENIZER_FOLDER)
        if isinstance(self._item_tokenizer, ItemTokenizer):
            self._item_tokenizer.save_pretrained(folder)
        elif self._item_tokenizer is not None and not (folder.exists() and folder.samefile(self._item_tokenizer)):
            folder.mkdir(parents=True, exist_ok=True)
            for name in (TENSOR_FILE, DESCRIPTION_FILE):
                shutil.copyfile(self._item_tokenizer / name, folder / name)
