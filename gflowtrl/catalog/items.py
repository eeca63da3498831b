"""What an item is called, and the numbers of items."""

from __future__ import annotations

from collections.abc import Sequence


Item = int | str


def index_items(items: Sequence[Item], what: str = "Item") -> dict[Item, int]:
    """The position of each item, or user. Raises a ValueError that names one which is given twice."""
    index = {item: position for position, item in enumerate(items)}
    if len(index) < len(items):
        twice = next(item for position, item in enumerate(items) if index[item] != position)
        raise ValueError(f"{what} {twice!r} is given twice. Give every one once.")
    return index
