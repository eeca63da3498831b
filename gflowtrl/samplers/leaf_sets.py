"""Sets of leaves, one per row: `(B, W)`, distinct, ascending, padded with -1 on the right."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from gflowtrl.catalog import Item, ItemCatalog
from gflowtrl.data import Step
from gflowtrl.rewards import StepReward


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


def observed_leaves(step: Step, catalog: ItemCatalog, reward: StepReward | None, sampler: str) -> Tensor:
    """Return the leaves of each prompt's items and its target, and those that `exclude_history` excludes."""
    leaves = leaf_rows(catalog, step.histories(sampler)).to(step.device)
    excluded = [] if reward is None or reward.excluded_leaves is None else [reward.excluded_leaves]
    return distinct_sorted(torch.cat([leaves, step.target_leaves[:, None], *excluded], 1))


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
            f"leaf to draw. Use the sampler 'on_policy' for a catalog of this size."
        )
    return allowed


def draw_allowed(uniforms: Tensor, forbidden: Tensor, num_leaves: int, sampler: str) -> tuple[Tensor, Tensor]:
    """Draw uniformly from the leaves that are not forbidden, with replacement.

    A draw is a rank among the allowed leaves, shifted past the forbidden leaves below it. This needs no rejection and
    no table of all leaves.

    Args:
        uniforms: `(B, K)` in (0, 1).
        forbidden: `(B, W)`.
        num_leaves, sampler: see `count_allowed`.

    Returns:
        leaves `(B, K)` and their log-probabilities `(B, K)`.
    """
    allowed = count_allowed(forbidden, num_leaves, sampler)[:, None]
    ranks = torch.minimum((uniforms.to(forbidden.device) * allowed).long(), allowed - 1)
    return skip_forbidden(ranks, forbidden), -allowed.float().log().expand(ranks.shape).contiguous()


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
