"""Survival of prefixes in beam search (the motivation of APAO), computed from the exact distribution over leaves."""

from __future__ import annotations

import torch
from torch import Tensor

from gflowtrl.catalog import PrefixTree
from gflowtrl.checks import COUNT, check_number


@torch.no_grad()
def prefix_metrics(
    leaf_log_probs: Tensor, target_leaves: Tensor, tree: PrefixTree, num_beams: int = 20
) -> dict[str, Tensor]:
    """Compute survival and rank of the target's prefixes for each prompt.

    Args:
        leaf_log_probs: `(B, N)` log-probabilities of all leaves, as returned by `TreePolicy.leaf_log_probs`.
        target_leaves: `(B,)`.
        tree: the prefix tree, on the same device.
        num_beams: width K of the beam search, which keeps the K most probable prefixes at each depth.

    Returns:
        Float tensors `(B,)`. For each depth m = 1 ... `tree.max_depth`:

        - `survival@m`: 1 if the target's prefix of m tokens is still in the beam; `survival@max_depth` is the hit;
        - `prefix_auc@m`: probability that it is more probable than another prefix of this depth (ties count half);
        - `prefix_mrr@m`: 1 / rank among all prefixes of this depth.

        In addition, `top_survival` is the share of the K most probable leaves that the beam finds. `survival_bound` is
        a lower bound of the hit: `1 - (1 / K) sum_m (1 / P(prefix) - 1)`, at least 0. (If a prefix is not in the beam,
        K other prefixes are at least as probable, so K P <= 1 - P.) An id that has ended stays in the beam.

    Raises:
        ValueError: `num_beams` is below 1, or the number of columns is not the number of leaves.

    References:
        Adaptive Prefix-Aware Optimization for Generative Recommendation, KDD 2026, arXiv 2603.02730. The bound of the
        paper, with exp(L_m) instead of exp(L_m) - 1 and without 1 / K, is vacuous.
    """
    check_number("num_beams", num_beams, COUNT)
    log_probs = tree.log_flows(leaf_log_probs)
    paths = tree.walk(target_leaves)
    leaf_nodes, lengths = tree.leaf_nodes(), tree.leaf_lengths
    in_beam = torch.zeros_like(log_probs, dtype=torch.bool)
    in_beam[:, 0] = True
    target, metrics, gap = paths[:, :1], {}, 0.0  # the target's node at each depth, and K (1 - bound)
    for depth in range(1, tree.max_depth + 1):
        level = torch.arange(tree.level_start[depth], tree.level_start[depth + 1], device=log_probs.device)
        ended = leaf_nodes[lengths < depth]
        pool = torch.cat([level, ended])
        reached = torch.cat([in_beam[:, tree.parent[level].long()], in_beam[:, ended]], 1)
        values = log_probs[:, pool]
        best = values.masked_fill(~reached, -torch.inf).topk(min(num_beams, len(pool)))
        in_beam = torch.zeros_like(in_beam).scatter_(1, pool[best.indices], best.values > -torch.inf)
        target = torch.where(paths[:, depth : depth + 1] >= 0, paths[:, depth : depth + 1], target)
        target_value = log_probs.gather(1, target)
        above = (values > target_value).sum(1)
        ties = (values == target_value).sum(1) - 1
        metrics[f"survival@{depth}"] = in_beam.gather(1, target).squeeze(1).float()
        metrics[f"prefix_auc@{depth}"] = 1 - (above + ties / 2) / max(len(pool) - 1, 1)
        metrics[f"prefix_mrr@{depth}"] = 1 / (1.0 + above)
        gap = gap + (1 / target_value.double().exp() - 1).squeeze(1)
    best = leaf_log_probs.topk(min(num_beams, tree.num_leaves)).indices
    metrics["top_survival"] = in_beam.gather(1, leaf_nodes[best]).float().mean(1)
    metrics["survival_bound"] = (1 - gap / num_beams).clamp(min=0).float()
    return metrics
