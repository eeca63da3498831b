"""The history that a visitor builds: search for items, and add, remove and move them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain, islice

from gflowtrl.catalog import Item
from gflowtrl.recommender import Recommender


MOST_FOUND = 20


@dataclass(frozen=True)
class Found:
    """The answer to a search.

    Attributes:
        items: the first matches, best first.
        total: number of all matches.
    """

    items: list[Item]
    total: int


class ItemSearch:
    """Search among the items of a recommender. One search reads the texts of all items once.

    Args:
        recommender: its titles are searched, and its items themselves. More frequent items come first if it has
            `item_counts`.
    """

    def __init__(self, recommender: Recommender):
        items, counts = recommender.catalog.items, recommender.item_counts
        if counts is not None:
            counts = counts[: len(items)]  # without those of retired items
        order = range(len(items)) if counts is None else counts.argsort(descending=True, stable=True).tolist()
        self._items = [items[index] for index in order]
        # Words hold no line breaks, so each is found in the title or in the name.
        self._texts = [f"{recommender.titles.get(item, '')}\n{item}".casefold() for item in self._items]

    def find(self, query: str, limit: int = MOST_FOUND) -> Found:
        """Return the items whose title or name contains every word of the query, in any case.

        The item with exactly this name comes first, then titles that begin with the query. An empty query finds all
        items.
        """
        whole, texts = " ".join(query.casefold().split()), self._texts
        matches: Sequence[int] = range(len(texts))
        for word in whole.split():
            matches = [index for index in matches if word in texts[index]]
        exact = (index for index in matches if texts[index].endswith(f"\n{whole}"))
        begins = (index for index in matches if texts[index].startswith(whole))
        best = dict.fromkeys(chain(exact, islice(begins, limit), islice(matches, limit)))
        return Found([self._items[index] for index in islice(best, limit)], len(matches))


def label(item: Item, title: str | None) -> str:
    """Return the text that stands for an item: its title and the item itself, which is unique."""
    return str(item) if title is None else f"{title} [{item}]"


def without(history: Sequence[Item], position: int) -> list[Item]:
    """Return the history without the item at `position`, counted from 0.

    Raises:
        ValueError: the history has no such position.
    """
    _check_position(history, position)
    return [*history[:position], *history[position + 1 :]]


def moved(history: Sequence[Item], position: int, by: int) -> list[Item]:
    """Return the history with the item at `position` moved by `by` places, at most to an end.

    Raises:
        ValueError: the history has no such position.
    """
    rest = without(history, position)
    rest.insert(max(0, position + by), history[position])
    return rest


def _check_position(history: Sequence[Item], position: int) -> None:
    if not 0 <= position < len(history):
        raise ValueError(f"The history has {len(history)} items and no position {position + 1}. Select one of them.")
