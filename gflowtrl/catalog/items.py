"""The type of items, and an index from items to positions."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from numbers import Integral
from typing import Any

import numpy as np

from gflowtrl.checks import check_text, check_type, short_repr


Item = int | str


def as_items(items: Iterable[Any]) -> list[Item]:
    """Return items as integers of Python and strings; numpy's integers are converted.

    Raises:
        TypeError: an item is neither; the error names it.
        ValueError: a string has half of a surrogate pair, which no file and no answer can hold.
    """
    check_type("items", items, Iterable, "a list of integers or strings")
    listed = list(items)
    if not set(map(type, listed)) <= {int, str}:
        listed = [item if isinstance(item, str) else _as_integer(item) for item in listed]
    for item in listed:
        if isinstance(item, str) and not item.isascii():
            check_text("An item", item)
    return listed


def _as_integer(item: Any) -> int:
    if not isinstance(item, Integral) or isinstance(item, bool):
        raise TypeError(f"{short_repr(item)} of type {type(item).__name__} is not an item; give integers or strings.")
    return int(item)


def check_tokens(item: object, tokens: object) -> None:
    """Check that the semantic id of an item is a list of strings, and not one string.

    Raises:
        TypeError: it is something else; the error names the item.
    """
    listed = isinstance(tokens, Sequence | np.ndarray) and not isinstance(tokens, str)
    if not listed or not all(isinstance(token, str) for token in tokens):
        raise TypeError(
            f"The semantic id of item {short_repr(item)} is {short_repr(tokens)}; give a list of its tokens as text."
        )


class ItemIndex(dict[Item, int]):
    """Position of each item (or user). Looking up an unknown item raises a ValueError that names it.

    Args:
        items: the items, without duplicates.
        what: the word for one entry in the error about duplicates.

    Raises:
        ValueError: names an item that is given twice.
    """

    def __init__(self, items: Sequence[Item], what: str = "Item"):
        super().__init__({item: position for position, item in enumerate(items)})
        if len(self) < len(items):
            duplicate = next(item for position, item in enumerate(items) if self[item] != position)
            raise ValueError(f"{what} {duplicate!r} is given twice. Give each one once.")

    def __missing__(self, item: Item) -> int:
        known = f"{len(self)} items (the first is {next(iter(self), None)!r})"
        raise ValueError(f"Item {item!r} is not in the catalog of {known}. Remove it, or add it to the catalog.")
