"""Exact flows where a table of all leaves is too large: the best leaves one by one, the rest alike."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor


if TYPE_CHECKING:
    from gflowtrl.catalog import PrefixTree

    from .fusion import RewardFusion, RewardResult


@dataclass(frozen=True)
class TopRewards:
    """log R of the k best leaves of each prompt; all other leaves share the rest of the mass evenly.

    Z is that of the full reward, and so is R on the best leaves: only the order among the others is lost.

    Attributes:
        leaves: `(B, k)` long, ascending.
        log_rewards: `(B, k)` log R of them.
        log_rest: `(B,)` log of the mean R of a leaf that is not among them; -inf where there is none.
    """

    leaves: Tensor
    log_rewards: Tensor
    log_rest: Tensor

    def log_flows(self, tree: PrefixTree, nodes: Tensor) -> Tensor:
        """log F of any nodes, `(B, ...) -> (B, ...)`; -inf for node -1. The root's is log Z.

        The leaves below a node are consecutive, so that their mass is a difference of two running sums.
        """
        safe = nodes.clamp(min=0).flatten(1)
        start, count = tree.first_leaf[safe].long(), tree.leaf_count[safe].long()
        low, high = (torch.searchsorted(self.leaves, bound.contiguous()) for bound in (start, start + count))
        peak = self.log_rewards.amax(1, keepdim=True)
        # 64 bits: a small subtree is a small difference of large sums.
        sums = torch.nn.functional.pad((self.log_rewards - peak).double().exp().cumsum(1), (1, 0))
        best = (sums.gather(1, high) - sums.gather(1, low)).clamp(min=0)
        rest = (self.log_rest[:, None] - peak).double().exp() * (count - (high - low))
        flows = (best + rest).log().to(self.log_rewards.dtype) + peak
        return flows.view(nodes.shape).masked_fill(nodes < 0, -math.inf)

    def draw(self, uniforms: Tensor, num_leaves: int) -> tuple[Tensor, Tensor]:
        """Leaves in proportion to R: `uniforms (B, K)` in (0, 1) -> leaves and their log-probabilities, both `(B, K)`.

        The mass of the others lies behind that of the best leaves; a number that falls there says which of them.
        """
        best = self.leaves.shape[1]
        peak = self.log_rewards.amax(1, keepdim=True)
        sums = (self.log_rewards - peak).double().exp().cumsum(1)
        rest = (self.log_rest[:, None] - peak).double().exp()
        total = sums[:, -1:] + rest * (num_leaves - best)
        place = torch.minimum(uniforms.to(total.device) * total, torch.nextafter(total, torch.zeros_like(total)))
        choice = torch.searchsorted(sums, place, right=True)
        number = ((place - sums[:, -1:]) / rest).long().clamp(0, max(num_leaves - best - 1, 0))
        # The n-th leaf that is not among the best: n, and one more for every best leaf before it.
        gaps = self.leaves - torch.arange(best, device=self.leaves.device)
        others = number + torch.searchsorted(gaps, number, right=True)
        chosen = choice.clamp(max=best - 1)
        leaves = torch.where(choice < best, self.leaves.gather(1, chosen), others)
        log_r = torch.where(choice < best, self.log_rewards.gather(1, chosen), self.log_rest[:, None])
        return leaves, (log_r - peak).double().sub(total.log()).float()


@torch.no_grad()
def top_rewards(fusion: RewardFusion, batch: Mapping[str, Any], k: int) -> TopRewards:
    """The k best leaves of each prompt by R, without a table of all prompts times all leaves.

    Rows are scored in groups that keep the table of one group within `fusion.max_elements` (one row at least).

    Args:
        fusion: rewards that score all items.
        batch: as the trainer hands it to rewards, B rows.
        k: >= 1; at most N are returned.
    """
    if k < 1:
        raise ValueError(f"The number of top leaves must be at least 1, got {k}.")
    size = len(batch["prompts"]["input_ids"])
    groups = [_rows(batch, rows, size) for rows in _row_groups(fusion, size)]
    parts = [_top_of(fusion.leaf_log_rewards(group), k) for group in groups]
    return TopRewards(*(torch.cat(columns) for columns in zip(*parts, strict=True)))


@torch.no_grad()
def rewards_by_rows(fusion: RewardFusion, batch: Mapping[str, Any], leaves: Tensor) -> RewardResult:
    """Rewards of `leaves (B, K)` as `RewardFusion.log_rewards` gives them where the table of all leaves is allowed.

    The floor follows the mean over all leaves, and no table is larger than `fusion.max_elements` (one row at least).
    """
    results, weights = [], []
    for rows in _row_groups(fusion, len(leaves)):
        results.append(fusion.score_all(_rows(batch, rows, len(leaves))).gather(leaves[rows]))
        weights.append(len(leaves[rows]) / len(leaves))
    return replace(
        results[0],
        log_rewards=torch.cat([result.log_rewards for result in results]),
        rewards=torch.cat([result.rewards for result in results]),
        parts={name: torch.cat([result.parts[name] for result in results]) for name in results[0].parts},
        floored_mass=sum(w * result.floored_mass for w, result in zip(weights, results, strict=True)),
    )


def _row_groups(fusion: RewardFusion, size: int) -> list[slice]:
    """Slices of a batch whose table of all leaves is allowed."""
    leaves = fusion.catalog.tree.num_leaves
    rows = size if fusion.max_elements is None else max(fusion.max_elements // leaves, 1)
    return [slice(start, min(start + rows, size)) for start in range(0, size, rows)]


def _top_of(log_rewards: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    k = min(k, log_rewards.shape[1])
    leaves = log_rewards.topk(k, 1).indices.sort(1).values
    others = log_rewards.scatter(1, leaves, -math.inf).logsumexp(1) - math.log(max(log_rewards.shape[1] - k, 1))
    return leaves, log_rewards.gather(1, leaves), others


def _rows(batch: Mapping[str, Any], rows: slice, size: int) -> dict[str, Any]:
    """Some rows of a batch: of every column, and of the tensors in `prompts`; with a cache of their own."""
    part: dict[str, Any] = {}
    for name, values in batch.items():
        if isinstance(values, Mapping):
            # The cache is of the whole batch, and so are the members that share prompts.
            prompts = {key: value[rows] for key, value in values.items() if key != "members"}
            part[name] = prompts if name == "prompts" else {}
        else:
            per_row = isinstance(values, list | tuple | Tensor) and len(values) == size
            part[name] = values[rows] if per_row else values
    return part
