"""APAO's prefix losses: beam search keeps an item only while each of its prefixes is among the best.

Notation: `s_t = log P(y_t | y_<t, x)` and `S_m = s_1 + ... + s_m`. The functions return one loss per prefix, `(B, L)`;
the trainer weights them by depth (`PrefixWeights`) and sums them.

References:
    Adaptive Prefix-Aware Optimization for Generative Recommendation, KDD 2026, arXiv 2603.02730.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gflowtrl.checks import check_choice

from .common import expect_shape, real_steps
from .prefix_weights import VARIANTS


def prefix_pointwise(log_probs: Tensor, lengths: Tensor) -> Tensor:
    """`L_m = -S_m / m` of the observed target: the mean negative log-likelihood of the prefix.

    Args:
        log_probs: `(B, 1, L)` log-probabilities of the target's tokens, over the whole vocabulary as in the paper or
            over the children in the tree.
        lengths: `(B, 1)` number of tokens of the target.

    Returns:
        `(B, L)`, in nats; 0 after the target's length.
    """
    batch, _, num_steps = log_probs.shape
    expect_shape("log_probs", log_probs, (batch, 1, num_steps), "(prompts, the target, tokens)")
    expect_shape("lengths", lengths, (batch, 1), "(prompts, the target)")
    real = real_steps(lengths, num_steps)[:, 0]
    sums = log_probs[:, 0].masked_fill(~real, 0.0).cumsum(-1)
    depth = torch.arange(1, num_steps + 1, device=log_probs.device)
    return (-sums / depth).masked_fill(~real, 0.0)


def prefix_pairwise(
    log_probs: Tensor, lengths: Tensor, prefix_nodes: Tensor, nodes_per_depth: Tensor, variant: str = "paper"
) -> Tensor:
    """`L_m = -log(exp S_m(+) / (exp S_m(+) + sum_j exp S_m(j)))`: the target's prefix against the negatives' prefixes.

    At depth m, a negative is ignored if it shares the target's m-prefix, repeats the m-prefix of another negative, or
    has fewer than m tokens. The loss is 0 if no negative remains. With all competing prefixes as negatives and
    probabilities over the tree, L_m is -S_m.

    Args:
        log_probs: `(B, K, L)` log-probabilities of the tokens taken; trajectory 0 is the observed target.
        lengths: `(B, K)` number of tokens of each id.
        prefix_nodes: `(B, K, L)` node reached by each token, -1 after the end of an id (`PrefixTree.walk` without the
            root).
        nodes_per_depth: `(L,)` number of the catalog's prefixes at each depth.
        variant: `"2025"` (the authors' first release) multiplies the negatives' probabilities by (prefixes of m
            tokens - 1) / (valid negatives + 1), because that code also counts the target as valid, and divides L_m by
            m. The other variants (see `PrefixWeights`) change only the weights.

    Returns:
        `(B, L)`, in nats; 0 after the target's length.
    """
    num_steps = log_probs.shape[2]
    expect_shape("lengths", lengths, log_probs.shape[:2], "(prompts, trajectories)")
    check_choice("variant", variant, VARIANTS)
    expect_shape("prefix_nodes", prefix_nodes, log_probs.shape, "log_probs.shape")
    expect_shape("nodes_per_depth", nodes_per_depth, (num_steps,), "(tokens,)")
    real = real_steps(lengths, num_steps)
    sums = log_probs.masked_fill(~real, 0.0).cumsum(-1)
    is_negative = _first_occurrences(prefix_nodes) & real
    is_negative[:, 0] = False
    positive = sums[:, 0]
    negatives = sums.masked_fill(~is_negative, torch.finfo(sums.dtype).min).logsumexp(1)
    count = is_negative.sum(1)
    if variant == "2025":
        competing = (nodes_per_depth - 1).clamp(min=1).to(sums.dtype)
        negatives = negatives + (competing / (count + 1)).log()
    losses = torch.nn.functional.softplus(negatives - positive)
    if variant == "2025":
        losses = losses / torch.arange(1, num_steps + 1, device=losses.device)
    return losses.masked_fill(~real[:, 0] | (count == 0), 0.0)


def _first_occurrences(nodes: Tensor) -> Tensor:
    """Return a mask of the entries that are the first with their value along dimension 1."""
    ordered, order = nodes.sort(dim=1, stable=True)
    first = torch.ones_like(ordered, dtype=torch.bool)
    first[:, 1:] = ordered[:, 1:] != ordered[:, :-1]
    return torch.zeros_like(first).scatter(1, order, first)
