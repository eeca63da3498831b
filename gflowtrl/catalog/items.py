"""The type of items, and an index from items to positions."""

from __future__ import annotations

from collections.abc import Sequence


Item = int | str


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
