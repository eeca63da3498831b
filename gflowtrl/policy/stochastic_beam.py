"""Gumbel top-k on a tree: sampling distinct leaves without replacement.

W. Kool, H. van Hoof and M. Welling, "Stochastic Beams and Where to Find Them", ICML 2019 (arXiv 1903.06059).
Everything is computed in float64, since the values of deep nodes are differences of nearly equal numbers.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class StochasticBeams:
    """K distinct leaves per prompt, sampled without replacement. The first one is an ordinary sample of the policy.

    Attributes:
        leaves: `(B, K)`, by decreasing `perturbed`; -1 if the catalog has fewer leaves.
        log_probs: `(B, K)` log-probability of each leaf under the policy (at the sampling temperature); -inf on
            missing leaves.
        log_inclusion: `(B, K)` log-probability, given the threshold, that the leaf is in the sample:
            log(1 - exp(-exp(log_probs - threshold))). For any function f of leaves,
            `sum of exp(log_probs - log_inclusion) f(leaf)` is an unbiased estimate of its mean under the policy. 0
            if the whole catalog is in the sample, and on missing leaves (their weight is 0 because of `log_probs`).
        threshold: `(B,)` kappa, the (K + 1)-th largest perturbed log-probability; -inf if the catalog has at most K
            leaves.
        perturbed: `(B, K)` log-probability plus the leaf's Gumbel noise; -inf on missing leaves.
    """

    leaves: Tensor
    log_probs: Tensor
    log_inclusion: Tensor
    threshold: Tensor
    perturbed: Tensor


def log1mexp(x: Tensor) -> Tensor:
    """Compute log(1 - exp(x)) for x <= 0 without cancellation (Maechler 2012); -inf at 0."""
    near_zero = x > -0.6931471805599453
    return torch.where(near_zero, (-torch.expm1(x)).log(), torch.log1p(-x.exp()))


def conditional_gumbels(parents: Tensor, log_probs: Tensor, noise: Tensor) -> Tensor:
    """Return perturbed log-probabilities of children, given that their maximum is the parent's value.

    With G = log-probability + Gumbel noise and Z = max G over the children of one parent, the results are independent
    Gumbel variables conditioned on the maximum `parents` (appendix B.3 of the paper, in its stable form):
    v = parent - G + log(1 - exp(G - Z)), result = parent - max(0, v) - log(1 + exp(-|v|)).

    Args:
        parents: `(B, n)` perturbed log-probabilities of the parents; -inf marks a missing parent.
        log_probs: `(B, n, C)` log-probabilities of the children, summed from the root on; -inf marks a missing child.
        noise: `(B, n, C)` standard Gumbel noise.

    Returns:
        `(B, n, C)`; -inf for missing children.
    """
    present = (log_probs != -torch.inf) & (parents != -torch.inf)[..., None]  # NaN stays NaN
    perturbed = (log_probs + noise).masked_fill(~present, -torch.inf)
    peak = perturbed.amax(-1, keepdim=True)
    peak = peak.masked_fill(peak == -torch.inf, 0.0)
    parents = parents.masked_fill(parents == -torch.inf, 0.0)[..., None]
    v = parents - perturbed + log1mexp(perturbed - peak)
    result = parents - v.clamp(min=0) - torch.log1p((-v.abs()).exp())
    return result.masked_fill(~present, -torch.inf)


def log_inclusion(log_probs: Tensor, threshold: Tensor) -> Tensor:
    """Compute log P(log-probability + Gumbel > threshold): `(B, K), (B,) -> (B, K)`; 0 on missing leaves (-inf)."""
    surplus = (log_probs - threshold[:, None]).masked_fill(log_probs == -torch.inf, torch.inf)
    return log1mexp(-surplus.exp())
