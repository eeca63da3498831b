"""Average the item probabilities of several recommenders, or of one recommender for several views of a history."""

from __future__ import annotations

import math
import os
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from datasets import Dataset
from torch import Tensor
from tqdm.auto import tqdm

from gflowtrl.catalog import Item
from gflowtrl.checks import COUNT, POSITIVE, check_number, check_type
from gflowtrl.data import history_lengths
from gflowtrl.finite import check_ranked

from .recommendation import Recommendation
from .recommender import LEAVES_PER_FORWARD, Recommender
from .request import Request, allowed_in, exclusions_in, histories_in


TRAJECTORIES_PER_FORWARD = 2**11  # their scores take L * C numbers each; smaller parts were faster on a CPU too


@dataclass(frozen=True)
class View:
    """What a model sees of a history: by default all of the last `max_history_items` items.

    Args:
        last: only so many of the most recent items. None: all.

    Raises:
        ValueError: the number is not a whole one of at least 1.
    """

    last: int | None = None

    def __post_init__(self):
        check_number("last", self.last, COUNT, optional=True)

    @classmethod
    def parse(cls, text: str) -> View:
        """Read a view from text: `full`, or for example `last=10`.

        Raises:
            ValueError: the text is neither.
        """
        if text == "full":
            return cls()
        name, _, value = text.partition("=")
        if name != "last" or not value.isdecimal():
            raise ValueError(f"The view {text!r} is unknown. Write full, or last=10 for the ten most recent items.")
        return cls(int(value))

    def __str__(self) -> str:
        return "full" if self.last is None else f"last={self.last}"

    def __call__(self, history: Sequence[Item]) -> Sequence[Item]:
        """Return the view of a history."""
        return history if self.last is None else history[-self.last :]


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
        for name, given, kind in (("members", members, Recommender), ("views", views, View)):
            check_type(name, given, list | tuple, f"a list of {kind.__name__} objects")
            for number, one in enumerate(given):
                check_type(f"{name}[{number}]", one, kind, f"a {kind.__name__}")
        if not members or not views:
            raise ValueError(f"The ensemble has no {'views' if members else 'members'}. Give at least one.")
        self.members, self.views, self.catalog = list(members), list(views), members[0].catalog
        for number, member in enumerate(members[1:], 2):
            for one, other, place in ((self, member, number), (member, self, 1)):
                missing = [item for item in one.catalog.items if item not in other.catalog]
                missing += [item for _, item in other.catalog.readable_items([one.catalog.retired])[1]]
                if missing:
                    raise ValueError(
                        f"Member {place} of the ensemble does not have {len(missing)} items of member "
                        f"{number + 1 - place}, for example {missing[0]!r}. Give recommenders of the same items."
                    )
        self.weights = normalized_weights(weights, len(self.members))
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
        weights = normalized_weights(weights, len(directories))  # wrong ones are reported before the models are loaded
        return cls([Recommender.from_pretrained(place, **model_kwargs) for place in directories], weights, views)

    def recommend(
        self,
        histories: Iterable[Sequence[Item]],
        k: int = 10,
        num_beams: int | None = None,
        exclude_seen: bool = False,
        batch_size: int = 256,
        allowed_items: Iterable[Item] | None = None,
        exclude: Sequence[Collection[Item]] | None = None,
        names: Sequence[str] | None = None,
    ) -> list[list[Recommendation]]:
        """Recommend the `k` most probable items for each history, best first.

        `Recommendation.log_prob` is the logarithm of the average probability of the item. Items with the same
        probability have the order of the first member's catalog. There is no sampling.

        Args:
            histories: as in `Recommender.recommend`.
            k: length of the lists.
            num_beams: beam width of every member for every view, by default `max(20, k)`.
            exclude_seen, allowed_items, exclude, names: as in `Recommender.recommend`.
            batch_size: number of histories that are merged together, and of prompts that are decoded together.

        Raises:
            ValueError, TypeError: as in `Recommender.recommend`.
        """
        (histories, names), allowed = histories_in(histories, names), allowed_in(self.catalog, allowed_items)
        excluded = exclusions_in(self.catalog, exclude, len(histories))
        request = Request(k, num_beams, exclude_seen, allowed, exclude=excluded)
        return self.members[0].answer(histories, names, request, batch_size, self._decode)

    def rank_both(
        self,
        rows: Dataset,
        earlier: Sequence[Sequence[Item]],
        k: int = 10,
        num_beams: int | None = None,
        batch_size: int = 256,
    ) -> tuple[Tensor, Tensor]:
        """Rank all items and, with the same computation of the prompts, those that the user has not had.

        Args:
            rows: U rows with a `history` and a `target`, which stays a candidate if the user has had it before.
            earlier: all items before the target of each row, also those that its history lacks.
            k, num_beams, batch_size: as in `recommend`.

        Returns:
            Positions `(U, k)` in `catalog.items`, best first, padded with -1: nothing removed, seen items removed.

        Raises:
            ValueError: k or batch_size is below 1, or num_beams below k; an item is not in the catalog.
        """
        check_number("batch_size", batch_size, COUNT)
        request = Request(k, num_beams)
        order = history_lengths(rows).argsort(descending=True, stable=True)
        ordered = rows.select(order.tolist())
        histories, targets = ordered["history"], ordered["target"]
        ranked = torch.full((2, len(rows), k), -1)
        for start in tqdm(range(0, len(rows), batch_size), desc="Ranking"):
            part = slice(start, start + batch_size)
            places = order[part]
            seen = [
                [item for item in earlier[row] if item != target]
                for row, target in zip(places.tolist(), targets[part], strict=True)
            ]
            for column, (items, _) in enumerate(self._rank(histories[part], request, [None, seen])):
                ranked[column, places, : items.shape[1]] = items
        return ranked[0], ranked[1]

    @property
    def max_history_items(self) -> int:
        """Number of items of a history that the member with the longest prompts uses."""
        return max(member.max_history_items for member in self.members)

    def _decode(self, rows: list[int], histories: list[list[Item]], request: Request) -> list[list[Recommendation]]:
        """Return the lists of non-empty histories (`Recommender.answer`)."""
        ((ranked, log_probs),) = self._rank(histories, request, [request.excluded(rows, histories)])
        items, titles = self.catalog.items, self.members[0].titles
        return [
            [
                Recommendation(items[place], value, titles.get(items[place]))
                for place, value in zip(places, values, strict=True)
                if place >= 0
            ]
            for places, values in zip(ranked.tolist(), log_probs.tolist(), strict=True)
        ]

    @torch.no_grad()
    def log_probs(self, histories: Sequence[Sequence[Item]], items: Tensor) -> Tensor:
        """Return the logarithms of the average probabilities of given items.

        Args:
            histories: B non-empty histories.
            items: `(B, C)` positions in the catalog; -1 is padding.

        Returns:
            `(B, C)`, -inf for padding.
        """
        rows = [list(history) for history in histories]
        members = [
            _Member(member, self.views, shared, rows)
            for member, shared in zip(self.members, self._shared, strict=True)
        ]
        return self._average(members, items.masked_fill(items < 0, len(self.catalog)))

    def _average(self, members: Sequence[_Member], items: Tensor) -> Tensor:
        """Return the logarithms of the average probabilities of items `(B, n)`, padded with the catalog's size."""
        scores = [
            member.score(items).double() + math.log(weight / len(self.views))
            for member, weight in zip(members, self.weights, strict=True)
        ]
        return torch.cat(scores, 1).logsumexp(1)

    @torch.no_grad()
    def _rank(
        self, histories: list[list[Item]], request: Request, columns: Sequence[Sequence[Sequence[Item]] | None]
    ) -> list[tuple[Tensor, Tensor]]:
        """Rank the items for B histories, once for each column: the items of each user that are left out, or None.

        Returns positions `(B, n)` in the catalog, with n at most `request.k` and -1 as padding, and their logarithms
        of average probabilities.
        """
        members = [
            _Member(member, self.views, shared, histories)
            for member, shared in zip(self.members, self._shared, strict=True)
        ]
        beams, padding = request.num_beams or max(20, request.k), len(self.catalog)
        beams = min(beams, max(member.catalog.tree.num_leaves for member in self.members))  # no more can be found
        found = [member.search(beams, request.allowed, columns) for member in members]
        candidates = [
            self._candidates(torch.cat(items, 1), request.allowed, seen)
            for seen, items in zip(columns, zip(*found, strict=True), strict=True)
        ]
        together = _distinct(torch.cat(candidates, 1), padding)
        average, ranked = self._average(members, together), []
        for items in candidates:
            is_padding = items == padding
            places = torch.searchsorted(together, items).masked_fill(is_padding, 0)
            log_probs = average.gather(1, places).masked_fill(is_padding, -torch.inf)
            log_probs, order = log_probs.sort(dim=1, descending=True, stable=True)
            best = items.masked_fill(is_padding, -1).gather(1, order)
            ranked.append((best[:, : request.k], log_probs[:, : request.k]))
        return ranked

    def _candidates(
        self, items: Tensor, allowed: frozenset[Item] | None, seen: Sequence[Sequence[Item]] | None
    ) -> Tensor:
        """Return the `_distinct` items of each row without seen ones and those not allowed.

        A search returns such items if they share a leaf with others.
        """
        padding = len(self.catalog)
        if seen is not None:
            items = items.masked_fill(self.catalog.seen_items(seen).contains(items), padding)
        if allowed is not None:
            items = items.masked_fill(~torch.isin(items, self.catalog.index_of(list(allowed))), padding)
        return _distinct(items, padding)


class _Member:
    """One member and its prompts for B histories.

    Items are positions in the ensemble's catalog, `len(catalog)` is padding, and all results are on the CPU.

    Attributes:
        leaves, log_probs: `(U, n)` what `search` has found for each prompt; -2 before the first search.
        prompts: the U distinct views of the histories, the longest first.
        rows: `(U,)` the history of each prompt.
        slots: `(B, views)` the prompt of each view of each history.
    """

    def __init__(self, member: Recommender, views: Sequence[View], shared: _SharedItems, histories: list[list[Item]]):
        self.member, self.shared, self.size = member, shared, len(histories)
        longest = member.max_history_items
        seen = [[tuple(view(history[-longest:])) for view in views] for history in histories]
        distinct = dict.fromkeys((row, view) for row, views_of_row in enumerate(seen) for view in views_of_row)
        ordered = sorted(distinct, key=lambda entry: -len(entry[1]))
        number = {entry: index for index, entry in enumerate(ordered)}
        self.prompts = [list(view) for _, view in ordered]
        self.rows = torch.tensor([row for row, _ in ordered])
        self.slots = torch.tensor([[number[row, view] for view in found] for row, found in enumerate(seen)])
        # Before a search, no leaf is known.
        self.leaves, self.log_probs = torch.full((len(ordered), 1), -2), torch.zeros(len(ordered), 1)

    def search(
        self, beams: int, allowed: frozenset[Item] | None, columns: Sequence[Sequence[Sequence[Item]] | None]
    ) -> list[Tensor]:
        """Return the items `(B, n)` that beam search finds for any view, once for each column (`Ensemble._rank`).

        A list may hold items that are seen or not allowed, if they share a leaf with others.
        """
        policy, catalog, device = self.member.policy, self.member.catalog, self.member.model.device
        nodes = None if allowed is None else catalog.to(device).tree.path_mask(catalog.leaf_of(list(allowed)))
        excluded = [None if seen is None else catalog.seen_items(seen, among=allowed).leaves for seen in columns]
        found = [[] for _ in columns]
        for start in range(0, len(self.prompts), self.size):
            rows = slice(start, start + self.size)
            prompts = self.member.prompts(self.prompts[rows])
            with policy.computed_once(prompts):
                for column, leaves in zip(found, excluded, strict=True):
                    left_out = None if leaves is None else leaves[self.rows[rows]].to(device)
                    column.append(policy.beam_search(prompts, beams, nodes, left_out))
                    check_ranked(*column[-1], self.member.model)
        ranked = [[torch.cat(parts).cpu() for parts in zip(*column, strict=True)] for column in found]
        self.leaves, self.log_probs = (torch.cat(parts, 1) for parts in zip(*ranked, strict=True))
        return [self._items(leaves)[self.slots].flatten(1) for leaves, _ in ranked]

    def _items(self, leaves: Tensor) -> Tensor:
        """Return all items at the member's leaves: `(U, beams) -> (U, n)`."""
        sizes = torch.where(leaves >= 0, self.shared.leaf.bincount()[leaves], 0).sum(1)
        own = self.member.catalog.expand_leaves(leaves, int(sizes.max())).cpu()
        return torch.where(own >= 0, self.shared.position[own], len(self.shared.position))

    def score(self, candidates: Tensor) -> Tensor:
        """Return the log-probabilities of items `(B, n)` for every view, `(B, views, n)`, -inf on padding."""
        is_padding = candidates == len(self.shared.position)
        leaves = self.shared.leaf[candidates.masked_fill(is_padding, 0)].masked_fill(is_padding, -1)
        columns = max(1, min(leaves.shape[1], LEAVES_PER_FORWARD))
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
        prompts, parts = self.member.prompts(self.prompts[rows]), wanted.split(LEAVES_PER_FORWARD, 1)
        scores = [self.member.policy.score(prompts, part).trajectory_log_probs for part in parts]
        check_ranked(wanted, scored := torch.cat(scores, 1), self.member.model)
        return log_probs.scatter(1, order, scored.cpu())


def normalized_weights(weights: Sequence[float] | None, count: int) -> list[float]:
    """Return one positive weight per member; their sum is 1.

    Raises:
        ValueError: another number of weights, or a weight is not positive.
    """
    check_type("weights", weights, list | tuple, "a list with one weight per member", optional=True)
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
    return items[:, : int((items < padding).sum(1).max())].contiguous()
