"""What is asked of a recommender or an ensemble."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral

import numpy as np

from gflowtrl.catalog import Item, ItemCatalog
from gflowtrl.checks import COUNT, POSITIVE, check_choice, check_number, check_type, short_repr


STRATEGIES = ("beam", "sample")
MANY_EXCLUDED = 256


@dataclass(frozen=True)
class Request:
    """Checked arguments of `recommend`."""

    k: int
    num_beams: int | None
    exclude_seen: bool = False
    allowed: frozenset[Item] | None = None
    strategy: str = "beam"
    temperature: float = 1.0
    seed: int = 0
    exclude: Sequence[Collection[Item]] | None = None

    def __post_init__(self):
        check_number("k", self.k, COUNT)
        check_number("num_beams", self.num_beams, COUNT, optional=True)
        check_type("exclude_seen", self.exclude_seen, bool | np.bool_, "True or False")
        check_type("seed", self.seed, Integral, "a whole number")
        check_choice("strategy", self.strategy, STRATEGIES)
        check_number("temperature", self.temperature, POSITIVE)
        if self.num_beams is not None and self.num_beams < self.k:
            raise ValueError(f"num_beams is {self.num_beams}, less than k; it must be at least {self.k}.")
        if self.strategy == "beam" and self.temperature != 1.0:
            raise ValueError(
                f"temperature is {self.temperature}, but strategy 'beam' does not sample. Use strategy='sample', or "
                f"leave temperature out."
            )

    def batches(self, histories: Sequence[Sequence[Item]], batch_size: int) -> Iterator[list[int]]:
        """Yield the indices of the histories that are decoded together; those of empty histories are left out.

        Longer histories come first, so that prompts of similar lengths are together. For a sampled list, as many
        further items are drawn as its user must not get, so a user with many such items is alone.
        """
        warm = sorted((row for row, history in enumerate(histories) if history), key=lambda row: -len(histories[row]))
        if self.strategy == "sample" and self.exclude is not None:
            alone = {row for row in warm if len(self.exclude[row]) > MANY_EXCLUDED}
            yield from ([row] for row in alone)
            warm = [row for row in warm if row not in alone]
        for start in range(0, len(warm), batch_size):
            yield warm[start : start + batch_size]

    def lengths(self, left_out: Sequence[Sequence[Item]]) -> list[int]:
        """Return how long lists among the allowed items can be, given the items that each user must not get; 0 if all
        items are allowed."""
        if self.allowed is None:
            return [0] * len(left_out)
        return [min(self.k, len(self.allowed - set(items))) for items in left_out]

    def excluded(self, rows: Sequence[int], histories: Sequence[Sequence[Item]]) -> list[Sequence[Item]] | None:
        """Return the items that some users must not get; None if no user has such items.

        Args:
            rows: which users, as indices in `exclude`.
            histories: their histories, which count with `exclude_seen`.
        """
        if self.exclude is None:
            return list(histories) if self.exclude_seen else None
        own = histories if self.exclude_seen else [()] * len(rows)
        return [[*history, *self.exclude[row]] for row, history in zip(rows, own, strict=True)]


def histories_in(
    histories: Iterable[Sequence[Item]], names: Sequence[str] | None
) -> tuple[list[Sequence[Item]], list[str]]:
    """Return the `histories` of `recommend` and their names; check that each one is a list."""
    if isinstance(histories, str | Mapping) or not isinstance(histories, Iterable):
        raise TypeError(f"histories is {short_repr(histories)}; it must be a list of lists of items.")
    rows = list(histories)
    check_type("names", names, list | tuple, "a list of names", optional=True)
    names = [f"row {row}" for row in range(len(rows))] if names is None else list(names)
    if len(names) != len(rows):
        raise ValueError(f"names has {len(names)} entries for {len(rows)} histories; give one per history.")
    for name, history in zip(names, rows, strict=True):
        if isinstance(history, str | bytes) or not isinstance(history, Sequence):
            raise TypeError(f"The history in {name} is {short_repr(history)}; it must be a list of items.")
    return rows, names


def allowed_in(catalog: ItemCatalog, items: Iterable[Item] | None) -> frozenset[Item] | None:
    """Return the `allowed_items` of `recommend`; check that there are some, and that all are in the catalog."""
    if items is None:
        return None
    if isinstance(items, str) or not isinstance(items, Iterable):
        raise TypeError(f"allowed_items is {short_repr(items)}; it must be a list of items.")
    try:
        allowed = frozenset(items)
    except TypeError:
        raise TypeError("allowed_items holds a list or a dictionary; items are integers or strings.") from None
    if not allowed:
        raise ValueError("allowed_items is empty; give at least one item, or leave it out to allow all items.")
    if unknown := catalog.known_items([allowed])[1]:
        raise ValueError(f"allowed_items holds {unknown[0][1]!r}, which is not in the catalog. Remove it.")
    return allowed


def exclusions_in(
    catalog: ItemCatalog, exclude: Sequence[Collection[Item]] | None, users: int
) -> list[list[Item]] | None:
    """Return the `exclude` of `recommend` without items that are not in the catalog; check that each user has one."""
    if exclude is None:
        return None
    if isinstance(exclude, str) or not isinstance(exclude, Sequence):
        raise TypeError(f"exclude is {short_repr(exclude)}; it must be a list with a collection of items per history.")
    if len(exclude) != users:
        raise ValueError(f"exclude has {len(exclude)} entries for {users} histories; give one per history.")
    for row, items in enumerate(exclude):
        if isinstance(items, str) or not isinstance(items, Collection):
            raise TypeError(f"exclude[{row}] is {short_repr(items)}; it must be a collection of items.")
    return catalog.known_items([list(items) for items in exclude])[0]
