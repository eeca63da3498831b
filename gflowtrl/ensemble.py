"""Average the item probabilities of several recommenders, or of one recommender for several views of a history."""

from __future__ import annotations

import math
import os
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gflowtrl.catalog import Item, ItemCatalog
from gflowtrl.checks import COUNT, POSITIVE, SEED, SHARE_BELOW_ONE, check_number
from gflowtrl.finite import check_ranked

from .recommender import LEAVES_PER_FORWARD, Recommendation, Recommender, _Request


TRAJECTORIES_PER_FORWARD = 2**11  # their scores take L * C numbers each; smaller parts were faster on a CPU too


@dataclass(frozen=True)
class View:
    """What a model sees of a history: by default all of the last `max_history_items` items.

    A view depends on its seed and on the length of the history only, so the same history has the same view in every
    batch.

    Args:
        last: only so many of the most recent items. None: all.
        drop: share of the items that are left out at random. The most recent item stays.
        shuffle: put the items into random order.
        seed: of `drop` and `shuffle`.

    Raises:
        ValueError: a number is out of range, or there is a seed and nothing random.
    """

    last: int | None = None
    drop: float = 0.0
    shuffle: bool = False
    seed: int = 0

    def __post_init__(self):
        check_number("last", self.last, COUNT, optional=True)
        check_number("drop", self.drop, SHARE_BELOW_ONE)
        check_number("seed", self.seed, SEED)
        if self.seed and not (self.drop or self.shuffle):
            raise ValueError(f"seed is {self.seed}, but the view is not random. Set drop or shuffle, or no seed.")

    @classmethod
    def parse(cls, text: str) -> View:
        """Read a view from text: `full`, or settings with commas between them, as in `last=10,drop=0.2,seed=1`.

        `shuffle` has no value.

        Raises:
            ValueError: a setting is unknown, occurs twice, or its value is not a number or out of range.
        """
        settings: dict[str, Any] = {}
        kinds = {"last": int, "drop": float, "seed": int}
        for part in text.split(",") if text != "full" else ():
            name, _, value = part.partition("=")
            try:
                if name in settings:
                    raise ValueError
                settings[name] = True if part == "shuffle" else kinds[name](value)
            except (KeyError, ValueError):
                raise ValueError(
                    f"The view {text!r} has the setting {part!r}, which is unknown, repeated or without a number. "
                    f"Write full, or settings such as last=10, drop=0.2, shuffle and seed=1, with commas between them."
                ) from None
        return cls(**settings)

    def __str__(self) -> str:
        given = [(entry.name, getattr(self, entry.name)) for entry in fields(self)]
        given = [(name, value) for name, value in given if value != getattr(type(self), name)]
        return ",".join(name if value is True else f"{name}={value}" for name, value in given) or "full"

    def __call__(self, history: Sequence[Item]) -> list[Item]:
        """Return the view of a non-empty history: a non-empty list of its items."""
        items = list(history if self.last is None else history[-self.last :])
        chance = random.Random(self.seed)
        others = len(items) - 1
        kept = sorted(chance.sample(range(others), round((1 - self.drop) * others)))
        items = [items[place] for place in (*kept, others)]
        if self.shuffle:
            chance.shuffle(items)
        return items


class _SharedItems(NamedTuple):
    """The items of a member in the ensemble's catalog.

    Attributes:
        position: `(items,)` the position in the ensemble's catalog, for each item of the member's.
        leaf: `(items,)` the member's leaf, for each item of the ensemble's catalog.
    """

    position: Tensor
    leaf: Tensor


class Ensemble:
    """Several recommenders as one: an item's probability is the average of what the members give it.

    Members may differ in everything but the items: other weights, architectures, lengths of histories, tokenizers and
    semantic ids. An item's probability under a member is that of its leaf, divided by the number of items at the
    leaf, which the member cannot distinguish. So a member's probabilities of all items sum to one, and so do their
    averages.

    Candidates are the items that any member finds by beam search for any view. Each candidate is scored under every
    member and view, so its probability is exact. Only the choice of candidates is approximate: an item that no beam
    search finds is missing, even if its average probability is high enough. With as many beams as leaves, every item
    is a candidate.

    Args:
        members: recommenders of the same items. The first one has the titles, and the counts for users with no known
            item.
        weights: one weight per member, relative to each other. Default: equal.
        views: what members see of a history; the views of one member are averaged with equal weights. Default: the
            history as it is.

    Raises:
        ValueError: there are no members or no views; members have different items; the weights are not positive, or
            not one per member.

    Example:
        ```python
        ensemble = Ensemble.from_pretrained(["outputs/seed1", "outputs/seed2"])
        ensemble.recommend([[17, 4, 2205]], k=10)
        Ensemble.from_pretrained(["outputs/seed1"], views=[View(), View(last=5)])
        ```
    """

    def __init__(
        self,
        members: Sequence[Recommender],
        weights: Sequence[float] | None = None,
        views: Sequence[View] = (View(),),
    ):
        if not members or not views:
            raise ValueError(f"The ensemble has no {'views' if members else 'members'}. Give at least one.")
        self.members, self.views, self.catalog = list(members), list(views), members[0].catalog
        for number, member in enumerate(members[1:], 2):
            for one, other, place in ((self, member, number), (member, self, 1)):
                if missing := [item for item in one.catalog.items if item not in other.catalog]:
                    raise ValueError(
                        f"Member {place} of the ensemble does not have {len(missing)} items of member "
                        f"{number + 1 - place}, for example {missing[0]!r}. Give recommenders of the same items."
                    )
        self.weights = _normalized(weights, len(self.members))
        self._shared = [
            _SharedItems(self.catalog.index_of(member.catalog.items), member.catalog.leaf_of(self.catalog.items).cpu())
            for member in self.members
        ]

    @classmethod
    def from_pretrained(
        cls,
        directories: Sequence[str | os.PathLike],
        weights: Sequence[float] | None = None,
        views: Sequence[View] = (View(),),
        **model_kwargs,
    ) -> Ensemble:
        """Load every member as `Recommender.from_pretrained` does, which has the arguments and errors."""
        if isinstance(directories, str | os.PathLike):
            raise TypeError(f"directories is {directories!r}; it must be a list of folders.")
        weights = _normalized(weights, len(directories))  # wrong ones are reported before the models are loaded
        return cls([Recommender.from_pretrained(place, **model_kwargs) for place in directories], weights, views)

    def recommend(
        self,
        histories: Iterable[Sequence[Item]],
        k: int = 10,
        num_beams: int | None = None,
        exclude_seen: bool = False,
        batch_size: int = 256,
        allowed_items: Iterable[Item] | None = None,
        names: Sequence[str] | None = None,
    ) -> list[list[Recommendation]]:
        """Recommend the `k` most probable items for each history, best first.

        `Recommendation.log_prob` is the logarithm of the average probability of the item. Items with the same
        probability have the order of the first member's catalog. There is no sampling.

        Args:
            histories: as in `Recommender.recommend`.
            k: length of the lists.
            num_beams: beam width of every member for every view, by default `max(20, k)`. With `exclude_seen` the
                longest history is added to it.
            exclude_seen, allowed_items, names: as in `Recommender.recommend`.
            batch_size: number of histories that are merged together, and of prompts that are decoded together.

        Raises:
            ValueError, TypeError: as in `Recommender.recommend`.
        """
        check_number("batch_size", batch_size, COUNT)
        first = self.members[0]
        request = _Request(k, num_beams, exclude_seen, "beam", 1.0, 0, first._allowed(allowed_items))
        histories = list(histories)
        names = [f"row {row}" for row in range(len(histories))] if names is None else names
        known = first._known(histories, names)
        results = {row: first._popular(row, names[row], request) for row, history in enumerate(known) if not history}
        warm = sorted((row for row, history in enumerate(known) if history), key=lambda row: -len(known[row]))
        for start in range(0, len(warm), batch_size):
            rows = warm[start : start + batch_size]
            results.update(zip(rows, self._decode([known[row] for row in rows], request, batch_size), strict=True))
        return [results[row] for row in range(len(known))]

    @property
    def max_history_items(self) -> int:
        """Number of items of a history that the member with the longest prompts uses."""
        return max(member.encoder.max_history_items for member in self.members)

    @torch.no_grad()
    def _decode(self, histories: list[list[Item]], request: _Request, batch_size: int) -> list[list[Recommendation]]:
        """Return the lists of non-empty histories."""
        beams = request.num_beams or max(20, request.k)
        if request.exclude_seen:
            beams += max(len(set(history)) for history in histories)
        parts = [
            _Member(member, self.views, shared, histories, batch_size)
            for member, shared in zip(self.members, self._shared, strict=True)
        ]
        candidates = _distinct(
            torch.cat([part.search(beams, request.allowed) for part in parts], 1), len(self.catalog)
        )
        scores = [
            part.score(candidates).double() + math.log(weight / len(self.views))
            for part, weight in zip(parts, self.weights, strict=True)
        ]
        log_probs = torch.cat(scores, 1).logsumexp(1)
        log_probs, order = log_probs.sort(dim=1, descending=True, stable=True)
        ranked = zip(histories, candidates.gather(1, order).tolist(), log_probs.tolist(), strict=True)
        lists = []
        for history, places, values in ranked:
            pairs = zip(places, values, strict=True)
            items = ((self.catalog.items[place], value) for place, value in pairs if place < len(self.catalog))
            lists.append(self.members[0]._list(items, request, set(history) if request.exclude_seen else set()))
        return lists


def positions_of(lists: Sequence[Sequence[Recommendation]], catalog: ItemCatalog, k: int) -> Tensor:
    """Return the positions `(U, k)` in `catalog.items` of recommended items, padded with -1 (`summarize_items`)."""
    positions = torch.full((len(lists), k), -1)
    for row, recommendations in enumerate(lists):
        positions[row, : len(recommendations)] = catalog.index_of([one.item for one in recommendations])
    return positions


class _Member:
    """One member and its prompts for B histories.

    Items are positions in the ensemble's catalog, `len(catalog)` is padding, and all results are on the CPU.

    Attributes:
        leaves, log_probs: `(U, beams)` the result of `search`.
        prompts: the U distinct views of the histories, the longest first.
        rows: `(U,)` the history of each prompt.
        slots: `(B, views)` the prompt of each view of each history.
    """

    def __init__(
        self, member: Recommender, views: Sequence[View], shared: _SharedItems, histories: list[list[Item]], size: int
    ):
        self.member, self.shared, self.size = member, shared, size
        member.catalog.to(member.model.device)
        longest = member.encoder.max_history_items
        seen = [[tuple(view(history[-longest:])) for view in views] for history in histories]
        distinct = dict.fromkeys((row, view) for row, views_of_row in enumerate(seen) for view in views_of_row)
        ordered = sorted(distinct, key=lambda entry: -len(entry[1]))
        number = {entry: index for index, entry in enumerate(ordered)}
        self.prompts = [list(view) for _, view in ordered]
        self.rows = torch.tensor([row for row, _ in ordered])
        self.slots = torch.tensor([[number[row, view] for view in found] for row, found in enumerate(seen)])

    def search(self, beams: int, allowed: frozenset[Item] | None) -> Tensor:
        """Return the items `(B, n)` that beam search finds for any view."""
        policy, catalog, padding = self.member.policy, self.member.catalog, len(self.shared.position)
        nodes = None if allowed is None else catalog.tree.path_mask(catalog.leaf_of(sorted(allowed)))
        found = []
        for start in range(0, len(self.prompts), self.size):
            prompts = self.member._prompts(self.prompts[start : start + self.size])
            found.append(policy.beam_search(prompts, beams, nodes))
            check_ranked(*found[-1], self.member.model)
        self.leaves, self.log_probs = (torch.cat(parts).cpu() for parts in zip(*found, strict=True))
        sizes = torch.where(self.leaves >= 0, self.shared.leaf.bincount()[self.leaves], 0).sum(1)
        own = catalog.expand_leaves(self.leaves, int(sizes.max())).cpu()
        return torch.where(own >= 0, self.shared.position[own], padding)[self.slots].flatten(1)

    def score(self, candidates: Tensor) -> Tensor:
        """Return the log-probabilities of items `(B, n)` for every view, `(B, views, n)`, -inf on padding."""
        is_padding = candidates == len(self.shared.position)
        leaves = self.shared.leaf[candidates.masked_fill(is_padding, 0)].masked_fill(is_padding, -1)
        columns = min(leaves.shape[1], LEAVES_PER_FORWARD)
        size = min(self.size, max(1, TRAJECTORIES_PER_FORWARD // columns))
        parts = []
        for start in range(0, len(self.prompts), size):
            rows = slice(start, start + size)
            parts.append(self._score_leaves(rows, leaves[self.rows[rows]]))
        log_probs = torch.cat(parts)[self.slots] - self.shared.leaf.bincount()[leaves].log()[:, None]
        return log_probs.masked_fill(is_padding[:, None], -torch.inf)

    def _score_leaves(self, rows: slice, leaves: Tensor) -> Tensor:
        """Return the log-probabilities of leaves `(n, c)` for some prompts, anything for leaf -1.

        Those of leaves that `search` found are known.
        """
        same = leaves[:, :, None] == self.leaves[rows, None]
        known, beam = same.max(2)
        known |= leaves < 0
        log_probs = self.log_probs[rows].gather(1, beam)
        if bool(known.all()):
            return log_probs
        # The unknown ones come first. Rows with fewer of them are filled up with others.
        order = known.long().argsort(dim=1, stable=True)[:, : int((~known).sum(1).max())]
        wanted = leaves.gather(1, order).clamp(min=0).to(self.member.model.device)
        prompts, parts = self.member._prompts(self.prompts[rows]), wanted.split(LEAVES_PER_FORWARD, 1)
        scores = [self.member.policy.score(prompts, part).trajectory_log_probs for part in parts]
        check_ranked(wanted, scored := torch.cat(scores, 1), self.member.model)
        return log_probs.scatter(1, order, scored.cpu())


def _normalized(weights: Sequence[float] | None, count: int) -> list[float]:
    """Return one positive weight per member; their sum is 1."""
    weights = [1.0] * count if weights is None else list(weights)
    if len(weights) != count:
        raise ValueError(f"{len(weights)} weights were given for {count} members. Give one per member.")
    for weight in weights:
        check_number("A weight", weight, POSITIVE)
    return [weight / sum(weights) for weight in weights]


def _distinct(items: Tensor, padding: int) -> Tensor:
    """Return each row's distinct items in increasing order, padded on the right with `padding`, the largest value."""
    items = items.sort(1).values
    items[:, 1:] = items[:, 1:].masked_fill(items[:, 1:] == items[:, :-1], padding)
    items = items.sort(1).values
    return items[:, : int((items < padding).sum(1).max())]
