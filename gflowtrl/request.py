"""What is asked of a recommender or an ensemble."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

from gflowtrl.catalog import Item, ItemCatalog
from gflowtrl.checks import COUNT, POSITIVE, check_choice, check_number


STRATEGIES = ("beam", "sample")


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
        check_choice("strategy", self.strategy, STRATEGIES)
        check_number("temperature", self.temperature, POSITIVE)
        if self.num_beams is not None and self.num_beams < self.k:
            raise ValueError(f"num_beams is {self.num_beams}, less than k; it must be at least {self.k}.")
        if self.strategy == "beam" and self.temperature != 1.0:
            raise ValueError(
                f"temperature is {self.temperature}, but strategy 'beam' does not sample. Use strategy='sample', or "
                f"leave temperature out."
            )

    def excluded(self, rows: Sequence[int], histories: Sequence[Sequence[Item]]) -> list[Sequence[Item]] | None:
        """Return the items that some users must not get; None if there are none.

        Args:
            rows: which users, as indices in `exclude`.
            histories: their histories, which count with `exclude_seen`.
        """
        if self.exclude is None:
            return list(histories) if self.exclude_seen else None
        own = histories if self.exclude_seen else [()] * len(rows)
        return [[*history, *self.exclude[row]] for row, history in zip(rows, own, strict=True)]


def allowed_in(catalog: ItemCatalog, items: Iterable[Item] | None) -> frozenset[Item] | None:
    """Return the `allowed_items` of `recommend`; check that there are some, and that all are in the catalog."""
    if items is None:
        return None
    allowed = frozenset(items)
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
    if len(exclude) != users:
        raise ValueError(f"exclude has {len(exclude)} entries for {users} histories; give one per history.")
    return catalog.known_items([list(items) for items in exclude])[0]
