"""What becomes of prefixes in beam search: APAO's point, measured on the exact distribution over leaves."""

from __future__ import annotations

import torch
from torch import Tensor

from gflowtrl.catalog import PrefixTree
from gflowtrl.checks import COUNT, check_number


@torch.no_grad()
def prefix_metrics(
    leaf_log_probs: Tensor, target_leaves: Tensor, tree: PrefixTree, num_beams: int = 20
) -> dict[str, Tensor]:
    """Survival and rank of the target's prefixes, for each prompt.

    Args:
        leaf_log_probs: `(B, N)` log-probabilities of all leaves, as `TreePolicy.leaf_log_probs` gives them.
        target_leaves: `(B,)`.
        tree: on the same device.
        num_beams: width K of the beam search, which keeps the K most probable prefixes at each depth.

    Returns:
        float tensors `(B,)`, for each depth m = 1 ... `tree.max_depth`

        - `survival@m`: 1 where the target's prefix of m tokens is still in the beam; `survival@max_depth` is the hit;
        - `prefix_auc@m`: probability that it is more probable than another prefix of that depth (ties count half);
        - `prefix_mrr@m`: 1 / its rank among all prefixes of that depth;

        and `top_survival`, the share of the K most probable leaves that the beam finds, and `survival_bound`, a bound
        from below on the hit: `1 - (1 / K) sum_m (1 / P(prefix) - 1)`, at least 0. (Were a prefix out of the beam, K
        others would be as probable at least, and K P <= 1 - P.) An id that has ended stays in the beam as it is.

    Raises:
        ValueError: `num_beams` is below 1, or there is not one column a leaf.

    References:
        Adaptive Prefix-Aware Optimization for Generative Recommendation, KDD 2026, arXiv 2603.02730, whose own bound
        with exp(L_m) in the place of exp(L_m) - 1 and without 1 / K is empty.
    """
    check_number("num_beams", num_beams, COUNT)
    log_probs = tree.log_flows(leaf_log_probs)
    paths = tree.walk(target_leaves)
    leaf_nodes, lengths = tree.leaf_nodes(), tree.leaf_lengths
    alive = torch.zeros_like(log_probs, dtype=torch.bool)
    alive[:, 0] = True
    own, metrics, doubt = paths[:, :1], {}, 0.0
    for depth in range(1, tree.max_depth + 1):
        level = torch.arange(tree.level_start[depth], tree.level_start[depth + 1], device=log_probs.device)
        ended = leaf_nodes[lengths < depth]
        pool = torch.cat([level, ended])
        reached = torch.cat([alive[:, tree.parent[level].long()], alive[:, ended]], 1)
        values = log_probs[:, pool]
        best = values.masked_fill(~reached, -torch.inf).topk(min(num_beams, len(pool)))
        alive = torch.zeros_like(alive).scatter_(1, pool[best.indices], best.values > -torch.inf)
        own = torch.where(paths[:, depth : depth + 1] >= 0, paths[:, depth : depth + 1], own)
        mine = log_probs.gather(1, own)
        above = (values > mine).sum(1)
        ties = (values == mine).sum(1) - 1
        metrics[f"survival@{depth}"] = alive.gather(1, own).squeeze(1).float()
        metrics[f"prefix_auc@{depth}"] = 1 - (above + ties / 2) / max(len(pool) - 1, 1)
        metrics[f"prefix_mrr@{depth}"] = 1 / (1.0 + above)
        doubt = doubt + (1 / mine.double().exp() - 1).squeeze(1)
    best = leaf_log_probs.topk(min(num_beams, tree.num_leaves)).indices
    metrics["top_survival"] = alive.gather(1, leaf_nodes[best]).float().mean(1)
    metrics["survival_bound"] = (1 - doubt / num_beams).clamp(min=0).float()
    return metrics
