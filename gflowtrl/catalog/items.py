"""What an item is called, and the numbers of items."""

from __future__ import annotations

from collections.abc import Sequence


Item = int | str


class ItemIndex(dict[Item, int]):
    """The position of each item, or user. A ValueError names an item that is not there.

    Args:
        items: the items, without duplicates.
        what: what one that is given twice is called.

    Raises:
        ValueError: names an item that is given twice.
    """

    def __init__(self, items: Sequence[Item], what: str = "Item"):
        super().__init__({item: position for position, item in enumerate(items)})
        if len(self) < len(items):
            twice = next(item for position, item in enumerate(items) if self[item] != position)
            raise ValueError(f"{what} {twice!r} is given twice. Give every one once.")

    def __missing__(self, item: Item) -> int:
        some = f"{len(self)} items (they look like {next(iter(self), None)!r})"
        raise ValueError(f"Item {item!r} is not in the catalog of {some}. Take it out of the data, or add it there.")
