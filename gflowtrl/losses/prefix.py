"""APAO's prefix losses: beam search keeps an item only while each of its prefixes is among the best.

`s_t = log P(y_t | y_<t, x)` and `S_m = s_1 + ... + s_m`. The losses here are those of single prefixes, `(B, L)`; the
trainer weighs them by depth (`PrefixWeights`) and adds them up.

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
    """`L_m = -S_m / m` of the observed target: the prefix's own mean negative log-likelihood.

    Args:
        log_probs: `(B, 1, L)` log-probabilities of the target's tokens, over the whole vocabulary as in the paper or
            over the children in the tree.
        lengths: `(B, 1)` number of tokens; there are no prefixes beyond.

    Returns:
        `(B, L)`, in nats; 0 beyond the target's length.
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
    """`L_m = -log(exp S_m(+) / (exp S_m(+) + sum_j exp S_m(j)))`: the target's prefix against the group's others.

    A negative that shares the target's m-prefix, or repeats another negative's, is left out at that m; so is one that
    has ended before. Where none is left the loss is 0. With all competing prefixes as negatives and probabilities over
    the tree, L_m is -S_m.

    Args:
        log_probs: `(B, K, L)` log-probabilities of the tokens taken; trajectory 0 is the observed target.
        lengths: `(B, K)`.
        prefix_nodes: `(B, K, L)` the node reached by each token, -1 beyond an id's end (`PrefixTree.walk` without the
            root).
        nodes_per_depth: `(L,)` number of prefixes that the catalog has at each depth.
        variant: with `"2025"`, the authors' first release, the negatives' probabilities are multiplied by (prefixes of
            m tokens - 1) / (valid negatives + 1), where that code counts the target as valid too, and L_m is divided
            by m; the others (see `PrefixWeights`) change the weights only.

    Returns:
        `(B, L)`, in nats; 0 beyond the target's length.
    """
    batch, num_generations, num_steps = log_probs.shape
    expect_shape("lengths", lengths, (batch, num_generations), "(prompts, trajectories)")
    check_choice("variant", variant, VARIANTS)
    expect_shape("prefix_nodes", prefix_nodes, log_probs.shape, "log_probs.shape")
    expect_shape("nodes_per_depth", nodes_per_depth, (num_steps,), "(tokens,)")
    real = real_steps(lengths, num_steps)
    sums = log_probs.masked_fill(~real, 0.0).cumsum(-1)
    against = _first_of_each(prefix_nodes) & real
    against[:, 0] = False
    positive = sums[:, 0]
    negatives = sums.masked_fill(~against, torch.finfo(sums.dtype).min).logsumexp(1)
    count = against.sum(1)
    if variant == "2025":
        competing = (nodes_per_depth - 1).clamp(min=1).to(sums.dtype)
        negatives = negatives + (competing / (count + 1)).log()
    losses = torch.nn.functional.softplus(negatives - positive)
    if variant == "2025":
        losses = losses / torch.arange(1, num_steps + 1, device=losses.device)
    return losses.masked_fill(~real[:, 0] | (count == 0), 0.0)


def _first_of_each(nodes: Tensor) -> Tensor:
    """Which entries along dimension 1 are the first with their value."""
    ordered, order = nodes.sort(dim=1, stable=True)
    first = torch.ones_like(ordered, dtype=torch.bool)
    first[:, 1:] = ordered[:, 1:] != ordered[:, :-1]
    return torch.zeros_like(first).scatter(1, order, first)
