"""Reading a saved catalog, with checks for damage."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

from gflowtrl.files import read_json

from .items import Item


RESTORE = "Restore the file as it was saved, or build the catalog again with ItemCatalog.from_semantic_ids."


def read_catalog(file: Path) -> tuple[list[Item], list[list[str]], dict[str, int]]:
    """Read the items, their semantic ids and the id of each token from `catalog.json`.

    Raises:
        ValueError: the file is damaged: an item is null, a semantic id is not a list of tokens, a token has no token
            id or shares its token id with another token. The message names the file.
    """
    content = read_json(file)
    if not isinstance(content, dict) or not {"items", "semantic_ids", "token_ids"} <= content.keys():
        raise ValueError(f"{file} must hold items, semantic_ids and token_ids. {RESTORE}")
    items, semantic_ids, token_ids = (content[name] for name in ("items", "semantic_ids", "token_ids"))
    if not (isinstance(items, list) and isinstance(semantic_ids, list) and isinstance(token_ids, dict)):
        raise ValueError(f"{file}: items and semantic_ids must be lists, and token_ids a mapping. {RESTORE}")
    if len(items) != len(semantic_ids) or not items:
        raise ValueError(f"{file} has {len(items)} items and {len(semantic_ids)} semantic ids. {RESTORE}")
    _check_items(file, items, semantic_ids)
    _check_token_ids(file, semantic_ids, token_ids)
    return items, semantic_ids, token_ids


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
