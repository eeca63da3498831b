"""Read a saved catalog, and refuse a damaged one."""

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
    """Items, their semantic ids, and the number of each token, from `catalog.json`.

    Raises:
        ValueError: the file is damaged: an item is null, an id is not a list of tokens, a token has no number or
            shares its number with another; the message names the file.
    """
    content = read_json(file)
    if not isinstance(content, dict) or not {"items", "semantic_ids", "token_ids"} <= content.keys():
        raise ValueError(f"{file} must hold items, semantic_ids and token_ids. {RESTORE}")
    items, ids, numbers = (content[name] for name in ("items", "semantic_ids", "token_ids"))
    if not (isinstance(items, list) and isinstance(ids, list) and isinstance(numbers, dict)):
        raise ValueError(f"{file}: items and semantic_ids must be lists, and token_ids a mapping. {RESTORE}")
    if len(items) != len(ids) or not items:
        raise ValueError(f"{file} has {len(items)} items and {len(ids)} semantic ids. {RESTORE}")
    _check_items(file, items, ids)
    _check_numbers(file, ids, numbers)
    return items, ids, numbers


def _check_items(file: Path, items: list[Any], ids: list[Any]) -> None:
    for row, item in enumerate(items):
        if type(item) not in (int, str):
            raise ValueError(f"{file}: item {row} is {item!r}; it must be a whole number or a text. {RESTORE}")
    if len(twice := set(items)) < len(items):
        item = next(item for item, count in Counter(items).items() if count > 1)
        raise ValueError(f"{file} lists item {item!r} twice ({len(items)} rows, {len(twice)} items). {RESTORE}")
    for item, tokens in zip(items, ids, strict=True):
        if not (isinstance(tokens, list) and tokens and all(isinstance(token, str) and token for token in tokens)):
            raise ValueError(
                f"{file}: the semantic id of item {item!r} is {tokens!r}; it must be a list of tokens. {RESTORE}"
            )


def _check_numbers(file: Path, ids: Sequence[Sequence[str]], numbers: Mapping[str, Any]) -> None:
    owners: dict[int, str] = {}
    for token, number in numbers.items():
        if type(number) is not int or number < 0:
            raise ValueError(f"{file} gives token {token!r} the number {number!r}, which is not one. {RESTORE}")
        if (other := owners.setdefault(number, token)) != token:
            raise ValueError(f"{file} gives the tokens {other!r} and {token!r} one number, {number}. {RESTORE}")
    if strangers := set(chain.from_iterable(ids)) - numbers.keys():
        raise ValueError(f"{file} gives no number to token {min(strangers)!r} of its semantic ids. {RESTORE}")
