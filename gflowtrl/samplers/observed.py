"""Samplers that know what was observed: other items of the same log, or items that were never seen."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from gflowtrl.data import Step
from gflowtrl.policy import Noise, TreePolicy
from gflowtrl.rewards import StepReward

from .sampler import Sampler, Trajectories


if TYPE_CHECKING:
    from gflowtrl.catalog import Item, ItemCatalog


class InteractionLogSampler(Sampler):
    """Other items of the same session: exposed, clicked, bought (GFlowGR's first strategy).

    The target and repeated leaves are left out. A row's trajectories are its log in random order, cut at K; a log of
    fewer than K leaves starts over, so that no leaf comes twice before all came once. A row whose log holds nothing
    but the target gets the target.

    `log_q` is the probability of each trajectory by itself, uniform over the log's leaves (their draws depend on each
    other), and 0 for the target.

    Args:
        column: dataset column with a list of items for each row; the default is what `gflowtrl.data.leave_one_out`
            makes where there is an event log.
    """

    source_names = ("interaction_log",)

    def __init__(self, column: str = "session_items"):
        if not isinstance(column, str):
            raise TypeError(f"column of InteractionLogSampler is the name of a dataset column, got {column!r}.")
        self.column = column

    def sample(
        self, step: Step, policy: TreePolicy, reward: StepReward | None, num_generations: int, noise: Noise
    ) -> Trajectories:
        rows = step.column(self.column, "InteractionLogSampler")
        log = distinct_sorted(leaf_rows(policy.catalog, rows).to(step.device), step.target_leaves)
        counts = (log >= 0).sum(1, keepdim=True)
        log = torch.cat([log, log.new_full((len(log), 1), -1)], 1)
        log[:, 0] = torch.where(counts[:, 0] == 0, step.target_leaves, log[:, 0])
        # Distinct leaves stand at the left, so a row's numbers do not depend on the longest log of the batch.
        keys = noise.uniform("interaction_log", log.shape[1]).to(log.device).masked_fill(log < 0, 2.0)
        shuffled = log.gather(1, keys.argsort(1))
        place = torch.arange(num_generations, device=log.device) % counts.clamp(min=1)
        log_q = -counts.clamp(min=1).float().log().expand(-1, num_generations)
        return Trajectories.of_one_source(shuffled.gather(1, place), log_q.contiguous())


class UnobservedSampler(Sampler):
    """All leaves alike that are neither the target's nor any history item's, with replacement (GFlowGR's "random").

    A draw is a rank among the allowed leaves, moved past the forbidden ones below it: no rejection, no table of all
    leaves. Reads the column `history`.
    """

    source_names = ("unobserved",)

    def sample(
        self, step: Step, policy: TreePolicy, reward: StepReward | None, num_generations: int, noise: Noise
    ) -> Trajectories:
        forbidden = observed_leaves(step, policy.catalog, "UnobservedSampler")
        allowed = count_allowed(forbidden, policy.catalog.tree.num_leaves, "UnobservedSampler")
        uniforms = noise.uniform("unobserved", num_generations).to(forbidden.device)
        ranks = torch.minimum((uniforms * allowed[:, None]).long(), allowed[:, None] - 1)
        log_q = -allowed.float().log()[:, None].expand(-1, num_generations)
        return Trajectories.of_one_source(skip_forbidden(ranks, forbidden), log_q.contiguous())


# ---------------------------------------------------------------------------------------------------- sets of leaves
def leaf_rows(catalog: ItemCatalog, rows: Sequence[Sequence[Item]]) -> Tensor:
    """Lists of items as leaves: `(B, W)`, padded with -1 at the right to the longest list."""
    index = pad_sequence([catalog.index_of(row) for row in rows], True, -1).to(catalog.device)
    return catalog.item_leaf[index.clamp(min=0)].masked_fill(index < 0, -1)


def distinct_sorted(leaves: Tensor, without: Tensor | None = None) -> Tensor:
    """Each row's leaves once, ascending, then -1: `(B, W) -> (B, W)`; `without` `(B,)` leaves out one leaf a row."""
    nothing = torch.iinfo(leaves.dtype).max  # sorts behind all leaves
    leaves = leaves.masked_fill(leaves < 0, nothing)
    if without is not None:
        leaves = leaves.masked_fill(leaves == without[:, None], nothing)
    leaves = leaves.sort(1).values
    repeated = torch.zeros_like(leaves, dtype=torch.bool)
    repeated[:, 1:] = leaves[:, 1:] == leaves[:, :-1]
    leaves = leaves.masked_fill(repeated, nothing).sort(1).values
    return leaves.masked_fill(leaves == nothing, -1)


def observed_leaves(step: Step, catalog: ItemCatalog, sampler: str) -> Tensor:
    """Leaves of what the prompt holds and of the target: `(B, W)` distinct, ascending, padded with -1."""
    leaves = leaf_rows(catalog, step.histories(sampler)).to(step.device)
    return distinct_sorted(torch.cat([leaves, step.target_leaves[:, None]], 1))


def count_allowed(forbidden: Tensor, num_leaves: int, sampler: str) -> Tensor:
    """Number of leaves that are not forbidden: `(B,)`, an error where there is none."""
    allowed = num_leaves - (forbidden >= 0).sum(1)
    if (allowed <= 0).any():
        row = int((allowed <= 0).nonzero()[0])
        raise ValueError(
            f"History and target of row {row} hold all {num_leaves} leaves of the catalog, so {sampler} has nothing "
            f"to draw from. Choose the sampler 'uniform' for a catalog this small."
        )
    return allowed


def skip_forbidden(ranks: Tensor, forbidden: Tensor) -> Tensor:
    """The leaves that have these ranks (from 0) among the allowed ones.

    Args:
        ranks: `(B, K)`.
        forbidden: `(B, W)` distinct, ascending, padded with -1.
    """
    # Below the i-th forbidden leaf f lie f - i allowed ones: whoever has at least that rank comes behind it.
    before = forbidden - torch.arange(forbidden.shape[1], device=forbidden.device)
    before = before.masked_fill(forbidden < 0, torch.iinfo(torch.long).max)
    return ranks + torch.searchsorted(before, ranks.contiguous(), right=True)


def distinct_ranks(sizes: Tensor, uniforms: Tensor) -> Tensor:
    """Uniformly drawn subsets of 0 ... sizes - 1: `(B, M)` distinct numbers in no particular order.

    Floyd's algorithm (Bentley and Floyd, 1987): M steps, whatever the size. Where a size is less than M, all numbers
    come and the rest is -1.

    Args:
        sizes: `(B,)`.
        uniforms: `(B, M)` in (0, 1).
    """
    wanted = sizes.clamp(max=uniforms.shape[1])
    chosen = torch.full(uniforms.shape, -1, dtype=torch.long, device=sizes.device)
    for step, uniform in enumerate(uniforms.to(sizes.device).unbind(1)):
        highest = sizes - wanted + step
        drawn = torch.minimum((uniform * (highest + 1)).long(), highest)
        taken = (chosen[:, :step] == drawn[:, None]).any(1)
        chosen[:, step] = torch.where(step < wanted, torch.where(taken, highest, drawn), -1)
    return chosen
