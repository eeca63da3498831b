"""Reading a saved catalog, with checks for damage."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from gflowtrl.files import read_json

from .items import Item


RESTORE = "Restore the file as it was saved, or build the catalog again with ItemCatalog.from_semantic_ids."


@dataclass(frozen=True)
class SavedCatalog:
    """The content of `catalog.json`: all items with their semantic ids, and which of them are retired."""

    items: list[Item]
    semantic_ids: list[list[str]]
    token_ids: dict[str, int]
    retired: list[Item]
    version: int


def read_catalog(file: Path) -> SavedCatalog:
    """Read `catalog.json`.

    Raises:
        ValueError: the file is damaged: an item is null, a semantic id is not a list of tokens, a token has no token
            id or shares its token id with another token. The message names the file.
    """
    content = read_json(file)
    if not isinstance(content, dict) or not {"items", "semantic_ids", "token_ids"} <= content.keys():
        if isinstance(content, dict) and "format" in content:
            raise ValueError(f"{file} is of an export to another engine. Give the folder of the recommender itself.")
        raise ValueError(f"{file} must hold items, semantic_ids and token_ids. {RESTORE}")
    items, semantic_ids, token_ids = (content[name] for name in ("items", "semantic_ids", "token_ids"))
    if not (isinstance(items, list) and isinstance(semantic_ids, list) and isinstance(token_ids, dict)):
        raise ValueError(f"{file}: items and semantic_ids must be lists, and token_ids a mapping. {RESTORE}")
    if len(items) != len(semantic_ids) or not items:
        raise ValueError(f"{file} has {len(items)} items and {len(semantic_ids)} semantic ids. {RESTORE}")
    retired, ids_of_retired = _read_retired(file, content.get("retired", {"items": [], "semantic_ids": []}))
    items, semantic_ids = items + retired, semantic_ids + ids_of_retired
    _check_items(file, items, semantic_ids)
    _check_token_ids(file, semantic_ids, token_ids)
    version = content.get("version", 1)
    if type(version) is not int or version < 1:
        raise ValueError(f"{file}: version is {version!r}; it must be a whole number of at least 1. {RESTORE}")
    return SavedCatalog(items, semantic_ids, token_ids, retired, version)


def _read_retired(file: Path, content: Any) -> tuple[list[Any], list[Any]]:
    """Return the retired items and their semantic ids."""
    lists = [content.get(name) for name in ("items", "semantic_ids")] if isinstance(content, dict) else [None]
    if not all(isinstance(part, list) for part in lists) or len({len(part) for part in lists}) != 1:
        raise ValueError(f"{file}: retired must hold items and semantic_ids, two lists of the same length. {RESTORE}")
    return lists[0], lists[1]


def _check_items(file: Path, items: list[Any], semantic_ids: list[Any]) -> None:
    for row, item in enumerate(items):
        if type(item) not in (int, str):
            raise ValueError(f"{file}: item {row} is {item!r}; it must be a whole number or a string. {RESTORE}")
    item, count = Counter(items).most_common(1)[0]
    if count > 1:
        raise ValueError(f"{file} lists item {item!r} {count} times. {RESTORE}")
    for item, tokens in zip(items, semantic_ids, strict=True):
        if not (isinstance(tokens, list) and tokens and all(isinstance(token, str) and token for token in tokens)):
            raise ValueError(
                f"{file}: the semantic id of item {item!r} is {tokens!r}; it must be a list of tokens. {RESTORE}"
            )


def _check_token_ids(file: Path, semantic_ids: Sequence[Sequence[str]], token_ids: Mapping[str, Any]) -> None:
    tokens: dict[int, str] = {}
    for token, token_id in token_ids.items():
        if type(token_id) is not int or token_id < 0:
            raise ValueError(
                f"{file}: the token id of {token!r} is {token_id!r}; it must be a whole number >= 0. {RESTORE}"
            )
        if (other := tokens.setdefault(token_id, token)) != token:
            raise ValueError(
                f"{file} gives the tokens {other!r} and {token!r} the same token id, {token_id}. {RESTORE}"
            )
    if missing := set(chain.from_iterable(semantic_ids)) - token_ids.keys():
        raise ValueError(f"{file} gives no token id for {min(missing)!r}, which its semantic ids use. {RESTORE}")
