"""Samplers that draw observed items of the same session, or unobserved items."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from gflowtrl.catalog import Item, ItemCatalog
from gflowtrl.data import Step
from gflowtrl.policy import Noise, TreePolicy
from gflowtrl.rewards import StepReward

from .sampler import Sampler, Trajectories


class InteractionLogSampler(Sampler):
    """Other items of the same session: exposed, clicked, or purchased (GFlowGR's first strategy).

    The target and repeated leaves are excluded. The trajectories of a row are the leaves of its session in random
    order, truncated at K. If there are fewer than K leaves, the sequence starts again, so that no leaf occurs twice
    before all have occurred once. A row whose session contains only the target gets the target.

    `log_q` is the marginal log-probability of each trajectory, uniform over the leaves of the session (the draws of a
    row are not independent), and 0 for the target.

    Args:
        column: dataset column with a list of items per row. The default is the column that
            `gflowtrl.data.leave_one_out` makes from an event log.
    """

    source_names = ("interaction_log",)

    def __init__(self, column: str = "session_items"):
        if not isinstance(column, str):
            raise TypeError(f"The column of InteractionLogSampler is {column!r}; it must be the name of a column.")
        self.column = column

    def sample(
        self, step: Step, policy: TreePolicy, reward: StepReward | None, num_generations: int, noise: Noise
    ) -> Trajectories:
        rows = step.column(self.column, "InteractionLogSampler")
        log = distinct_sorted(leaf_rows(policy.catalog, rows).to(step.device), step.target_leaves)
        counts = (log >= 0).sum(1, keepdim=True).clamp(min=1)
        log = torch.cat([log, log.new_full((len(log), 1), -1)], 1)
        log[:, 0] = torch.where(log[:, 0] < 0, step.target_leaves, log[:, 0])
        # Distinct leaves are on the left, so the noise of a row does not depend on the longest session of the batch.
        keys = noise.uniform("interaction_log", log.shape[1]).to(log.device).masked_fill(log < 0, 2.0)
        shuffled = log.gather(1, keys.argsort(1))
        position = torch.arange(num_generations, device=log.device) % counts
        log_q = -counts.float().log().expand(-1, num_generations)
        return Trajectories.of_one_source(shuffled.gather(1, position), log_q.contiguous())


class UnobservedSampler(Sampler):
    """Draws uniformly from the leaves of neither the target nor the history, with replacement (GFlowGR's "random").

    A draw is a rank among the allowed leaves, shifted past the forbidden leaves below it. This needs no rejection and
    no table of all leaves. Reads the column `history`.
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
    """Map lists of items to leaves: `(B, W)`, padded with -1 on the right to the longest list."""
    index = pad_sequence([catalog.index_of(row) for row in rows], True, -1).to(catalog.device)
    return catalog.item_leaf[index.clamp(min=0)].masked_fill(index < 0, -1)


def distinct_sorted(leaves: Tensor, without: Tensor | None = None) -> Tensor:
    """Return the distinct leaves of each row in ascending order, padded with -1: `(B, W) -> (B, W)`.

    Args:
        leaves: `(B, W)`; -1 is ignored.
        without: `(B,)`, one leaf per row to exclude.
    """
    missing = torch.iinfo(leaves.dtype).max  # sorts after all leaves
    leaves = leaves.masked_fill(leaves < 0, missing)
    if without is not None:
        leaves = leaves.masked_fill(leaves == without[:, None], missing)
    leaves = leaves.sort(1).values
    repeated = torch.zeros_like(leaves, dtype=torch.bool)
    repeated[:, 1:] = leaves[:, 1:] == leaves[:, :-1]
    leaves = leaves.masked_fill(repeated, missing).sort(1).values
    return leaves.masked_fill(leaves == missing, -1)


def observed_leaves(step: Step, catalog: ItemCatalog, sampler: str) -> Tensor:
    """Return the leaves of each prompt's items and its target: `(B, W)`, distinct, ascending, padded with -1."""
    leaves = leaf_rows(catalog, step.histories(sampler)).to(step.device)
    return distinct_sorted(torch.cat([leaves, step.target_leaves[:, None]], 1))


def count_allowed(forbidden: Tensor, num_leaves: int, sampler: str) -> Tensor:
    """Return the number of leaves of each row that are not forbidden, `(B,)`.

    Raises:
        ValueError: all leaves of a row are forbidden.
    """
    allowed = num_leaves - (forbidden >= 0).sum(1)
    if (allowed <= 0).any():
        row = int((allowed <= 0).nonzero()[0])
        raise ValueError(
            f"The history and target of row {row} contain all {num_leaves} leaves of the catalog, so {sampler} has no "
            f"leaf to draw. Use the sampler 'uniform' for a catalog of this size."
        )
    return allowed


def skip_forbidden(ranks: Tensor, forbidden: Tensor) -> Tensor:
    """Return the leaves that have the given ranks (from 0) among the allowed leaves.

    Args:
        ranks: `(B, K)`.
        forbidden: `(B, W)`, distinct, ascending, padded with -1.
    """
    # f - i allowed leaves are below the i-th forbidden leaf f, so a rank of at least f - i belongs to a larger leaf.
    before = forbidden - torch.arange(forbidden.shape[1], device=forbidden.device)
    before = before.masked_fill(forbidden < 0, torch.iinfo(torch.long).max)
    return ranks + torch.searchsorted(before, ranks.contiguous(), right=True)


def distinct_ranks(sizes: Tensor, uniforms: Tensor) -> Tensor:
    """Draw uniform subsets of 0 ... sizes - 1: `(B, M)` distinct numbers in arbitrary order.

    Uses Floyd's algorithm (Bentley and Floyd, 1987), which takes M steps for any size. If a size is less than M, the
    result contains all numbers and -1 for the rest.

    Args:
        sizes: `(B,)`.
        uniforms: `(B, M)` in (0, 1).
    """
    num_chosen = sizes.clamp(max=uniforms.shape[1])
    chosen = torch.full(uniforms.shape, -1, dtype=torch.long, device=sizes.device)
    for step, uniform in enumerate(uniforms.to(sizes.device).unbind(1)):
        highest = sizes - num_chosen + step
        drawn = torch.minimum((uniform * (highest + 1)).long(), highest)
        taken = (chosen[:, :step] == drawn[:, None]).any(1)
        chosen[:, step] = torch.where(step < num_chosen, torch.where(taken, highest, drawn), -1)
    return chosen
