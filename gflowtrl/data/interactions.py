"""Interaction data: the item sequences of users, the catalog, item features, and k-core filtering."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import chain, pairwise
from typing import Any, NamedTuple

import numpy as np

from gflowtrl.catalog import Item
from gflowtrl.catalog.items import ItemIndex
from gflowtrl.checks import COUNT, check_number, check_text, short_repr

from .sequences import Sequences


#: Levels of an `Event`, from the weakest to the strongest sign of preference.
SHOWN, CLICKED, PURCHASED = 0, 1, 2


class Exposed(NamedTuple):
    """The items that were shown to one user at random, and whether the user liked each one (0 or 1)."""

    items: list[Item]
    liked: list[int]


class Event(NamedTuple):
    """One item shown to one user: session number, item, and level (`SHOWN`, `CLICKED` or `PURCHASED`)."""

    session: int
    item: Item
    level: int


@dataclass
class InteractionData:
    """Interactions of users with the items of one catalog.

    Args:
        name: name of the data in tables and reports.
        users: unique user ids, all `int` or all `str`.
        sequences: item sequence of each user, oldest first; a list of lists, or `Sequences`.
        items: the whole catalog, sorted, including items without interactions.
        item_features: item -> features (`{"title": ...}`); may be empty.
        semantic_ids: item -> tokens, or `None` if the items have no semantic ids yet. Reordered like `items`, so that
            an `ItemCatalog` built from it has its item axis in that order.
        synthetic: whether the interactions are simulated.
        events: event log of each user with impressions, oldest first, or `None`. The events of level `CLICKED` and
            above are the user's sequence, in the same order.
        license: terms of use as free text, or `None` if unknown.
        source: origin of the data as free text, or `None` if unknown.
        exposed: items that were shown at random, and likes, by user; also of users without a sequence. `None` if
            unknown. Evaluation alone reads them.
        times: time of each interaction, in the order of `sequences` and never decreasing for a user, in any unit; or
            `None`.
        impressions: item -> how often the log has shown it, to anybody (items that are missing: never); or `None`.

    Raises:
        ValueError: if these parts contradict each other; the message names the first user or item concerned.
    """

    name: str
    users: list[Item]
    sequences: Sequence[list[Item]]
    items: list[Item]
    item_features: dict[Item, dict[str, Any]] = field(default_factory=dict)
    semantic_ids: dict[Item, tuple[str, ...]] | None = None
    synthetic: bool = False
    events: list[list[Event]] | None = None
    license: str | None = None
    source: str | None = None
    times: Sequence[list[float]] | None = None
    exposed: dict[Item, Exposed] | None = None
    impressions: dict[Item, int] | None = None

    def __post_init__(self):
        if len(self.users) != len(self.sequences):
            raise ValueError(f"{self.name}: {len(self.users)} users but {len(self.sequences)} sequences were given.")
        _check_unique(self.users, f"{self.name}: user")
        _check_unique(self.items, f"{self.name}: item")
        known = set(self.items)
        if not (isinstance(self.sequences, Sequences) and self.sequences.names is self.items):
            for user, sequence in zip(self.users, self.sequences, strict=True):
                self._check_known(user, "sequence", sequence, known)
        for item, row in self.item_features.items():
            check_text(f"{self.name}: the title of item {item!r}", row.get("title"), optional=True)
        if self.semantic_ids is not None:
            self.semantic_ids = _in_item_order(self.semantic_ids, self.items, self.name)
        if self.events is not None:
            self._check_events(known)
        if self.times is not None:
            self._check_times()
        if self.exposed and self.users and type(next(iter(self.exposed))) is not type(self.users[0]):
            raise ValueError(
                f"{self.name}: exposed users are like {next(iter(self.exposed))!r}, but users are like "
                f"{self.users[0]!r}. Write both as whole numbers, or both as strings."
            )
        for user, (shown, _) in (self.exposed or {}).items():
            self._check_known(user, "exposed items", shown, known)
        if unknown := (self.impressions or {}).keys() - known:
            raise ValueError(
                f"{self.name}: there are impressions of item {short_repr(min(unknown))}, which is not in the catalog. "
                f"Describe it in items.jsonl, or remove it there."
            )

    def _check_events(self, known: set[Item]) -> None:
        if len(self.events) != len(self.users):
            raise ValueError(f"{self.name}: {len(self.users)} users but {len(self.events)} event lists were given.")
        for user, sequence, events in zip(self.users, self.sequences, self.events, strict=True):
            self._check_known(user, "events", [event.item for event in events], known)
            if [event.item for event in events if event.level >= CLICKED] != list(sequence):
                raise ValueError(
                    f"{self.name}: the clicks and purchases in the events of user {user!r} are not the user's "
                    "sequence, in order. Make the sequence from the events, or leave the events out."
                )

    def _check_times(self) -> None:
        if len(self.times) != len(self.users):
            raise ValueError(f"{self.name}: {len(self.users)} users but {len(self.times)} lists of times were given.")
        if isinstance(self.times, Sequences) and isinstance(self.sequences, Sequences):
            backwards = np.append(False, self.times.values[1:] < self.times.values[:-1])
            backwards[self.times.offsets[:-1][self.times.lengths > 0]] = False
            if np.array_equal(self.times.offsets, self.sequences.offsets) and not backwards.any():
                return
        for user, sequence, times in zip(self.users, self.sequences, self.times, strict=True):
            if len(times) != len(sequence):
                raise ValueError(f"{self.name}: user {user!r} has {len(sequence)} items but {len(times)} times.")
            if any(later < time for time, later in pairwise(times)):
                raise ValueError(f"{self.name}: the times of user {user!r} decrease. Sort items and times by time.")

    def _check_known(self, user: Item, what: str, items: list[Item], known: set[Item]) -> None:
        if not known.issuperset(items):
            item = next(item for item in items if item not in known)
            raise ValueError(
                f"{self.name}: item {short_repr(item)} in the {what} of user {short_repr(user)} is not in the "
                f"catalog. Describe it in items.jsonl, or remove it there."
            )

    @property
    def num_interactions(self) -> int:
        return int(lengths_of(self.sequences).sum())

    def summary(self) -> str:
        """Return one line for a log: sizes, sequence lengths, and whether the data is synthetic."""
        lengths = lengths_of(self.sequences) if len(self.sequences) else np.zeros(1, np.int64)
        kind = " (SYNTHETIC)" if self.synthetic else ""
        return (
            f"{self.name}{kind}: {len(self.users):,} users, {len(self.items):,} items, {self.num_interactions:,} "
            f"interactions; {lengths.min()} to {lengths.max()} per user, median {np.median(lengths):.0f}"
        )


def k_core(data: InteractionData, k: int = 5) -> InteractionData:
    """Return the largest part of `data` in which every user and every item has at least `k` interactions.

    Users and items are dropped in turn until nothing changes. Items without interactions are dropped as well.

    Raises:
        ValueError: if nothing is left, or `k` is below 1.
    """
    check_number("k", k, COUNT)
    flat, offsets = flatten(data.sequences, data.items)
    user_of = np.repeat(np.arange(len(data.users)), np.diff(offsets))
    keep = core_members(user_of, flat, k)
    if not keep.any():
        raise ValueError(f"{data.name} has no {k}-core: no user or item is left. Choose a smaller k.")

    chosen, codes = np.unique(flat[keep], return_inverse=True)
    items = [data.items[index] for index in chosen.tolist()]
    kept = set(items)
    lengths = np.bincount(user_of[keep], minlength=len(data.users))
    rows = np.flatnonzero(lengths).tolist()
    offsets = np.concatenate([[0], np.cumsum(lengths[rows])])
    return replace(
        data,
        users=[data.users[row] for row in rows],
        sequences=Sequences(codes.astype(np.int32), offsets, items),
        times=data.times and Sequences(flat_times(data.times)[keep], offsets),
        items=items,
        item_features={item: features for item, features in data.item_features.items() if item in kept},
        semantic_ids=None if data.semantic_ids is None else {item: data.semantic_ids[item] for item in items},
        events=data.events and [[event for event in data.events[row] if event.item in kept] for row in rows],
        exposed=data.exposed and exposed_among(data.exposed, kept),
        impressions=data.impressions and impressions_among(data.impressions, kept),
    )


def flat_times(times: Sequence[Sequence[float]]) -> np.ndarray:
    """Concatenate the times of all users, `(T,)`."""
    return times.values if isinstance(times, Sequences) else np.array(list(chain.from_iterable(times)))


def exposed_among(exposed: dict[Item, Exposed], items: set[Item]) -> dict[Item, Exposed] | None:
    """Return the exposed items that are in a catalog, without users who have none of them; None if nobody has any."""
    found = {}
    for user, shown in exposed.items():
        pairs = [pair for pair in zip(*shown, strict=True) if pair[0] in items]
        if pairs:
            found[user] = Exposed(*map(list, zip(*pairs, strict=True)))
    return found or None


def impressions_among(impressions: dict[Item, int], items: set[Item]) -> dict[Item, int] | None:
    """Return the impressions of the items in a catalog; None if they were never shown."""
    found = {item: count for item, count in impressions.items() if item in items}
    return found if any(found.values()) else None


def core_members(user_of: np.ndarray, item_of: np.ndarray, k: int) -> np.ndarray:
    """Return which interactions are in the k-core, bool (T,), given their user and item indices, both (T,)."""
    keep = np.ones(len(user_of), dtype=bool)
    while True:
        users, items = user_of[keep], item_of[keep]
        enough = (np.bincount(users)[users] >= k) & (np.bincount(items)[items] >= k)
        if enough.all():
            return keep
        keep[np.flatnonzero(keep)] = enough


def flatten(sequences: Sequence[Sequence[Item]], items: Sequence[Item]) -> tuple[np.ndarray, np.ndarray]:
    """Concatenate sequences into item indices, int64 (T,), with the offset of each, int64 (len(sequences) + 1,)."""
    if isinstance(sequences, Sequences) and sequences.names is not None:
        codes = sequences.values
        if sequences.names is not items:
            index, used = ItemIndex(items), np.unique(codes)
            places = np.zeros(len(sequences.names), np.int64)
            places[used] = [index[sequences.names[code]] for code in used.tolist()]
            codes = places[codes]
        return codes.astype(np.int64), sequences.offsets
    index = ItemIndex(items)
    try:
        offsets = np.cumsum([0, *map(len, sequences)], dtype=np.int64)
        flat = np.fromiter((index[item] for item in chain.from_iterable(sequences)), np.int64, count=offsets[-1])
    except TypeError:
        raise TypeError("sequences must be a list with a list of items, integers or strings, per user.") from None
    return flat, offsets


def lengths_of(sequences: Sequence[Sequence[Any]]) -> np.ndarray:
    """Return the length of each sequence, int64 `(len(sequences),)`."""
    if isinstance(sequences, Sequences):
        return sequences.lengths
    return np.fromiter(map(len, sequences), np.int64, count=len(sequences))


def _check_unique(values: Sequence[Item], what: str) -> None:
    types = {type(value) for value in values}
    if not (types <= {int} or types <= {str}):
        names = ", ".join(sorted(kind.__name__ for kind in types))
        raise ValueError(f"{what} ids must be all whole numbers or all strings, but their types are {names}.")
    ItemIndex(values, what)


def _in_item_order(semantic_ids, items: list[Item], name: str) -> dict[Item, tuple[str, ...]]:
    missing = [item for item in items if item not in semantic_ids]
    if missing:
        raise ValueError(
            f"{name}: {len(missing)} of {len(items)} items have no semantic id, the first is item {missing[0]!r}. "
            "Give each item of the catalog an id, or drop these items."
        )
    if len(semantic_ids) != len(items):
        known = set(items)
        item = next(item for item in semantic_ids if item not in known)
        raise ValueError(f"{name}: there is a semantic id for item {short_repr(item)}, which is not in the catalog.")
    return {item: tuple(semantic_ids[item]) for item in items}
