"""Gumbel top-k on a tree: sampling distinct leaves without replacement.

W. Kool, H. van Hoof and M. Welling, "Stochastic Beams and Where to Find Them", ICML 2019 (arXiv 1903.06059).
Everything is computed in float64: the numbers of deep nodes are differences of nearly equal ones.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class StochasticBeams:
    """K distinct leaves a prompt, drawn without replacement; the first one is an ordinary sample of the policy.

    Attributes:
        leaves: `(B, K)`, by falling `perturbed`; -1 where the catalog has fewer leaves.
        log_probs: `(B, K)` log-probability of each leaf under the policy (tempered, where a temperature was given);
            -inf on missing leaves.
        log_inclusion: `(B, K)` log-probability, given the threshold, that the leaf is in the sample:
            log(1 - exp(-exp(log_probs - threshold))). For any function f of leaves,
            `sum of exp(log_probs - log_inclusion) f(leaf)` is an unbiased estimate of its mean under the policy. 0
            where the whole catalog is in the sample, and on missing leaves (whose weight is 0 by `log_probs`).
        threshold: `(B,)` kappa, the (K + 1)-th largest perturbed log-probability; -inf where there is none.
        perturbed: `(B, K)` log-probability plus the leaf's Gumbel number; -inf on missing leaves.
    """

    leaves: Tensor
    log_probs: Tensor
    log_inclusion: Tensor
    threshold: Tensor
    perturbed: Tensor


def log1mexp(x: Tensor) -> Tensor:
    """log(1 - exp(x)) for x <= 0 without cancellation (Maechler 2012); -inf at 0."""
    near = x > -0.6931471805599453
    return torch.where(near, (-torch.expm1(x)).log(), torch.log1p(-x.exp()))


def conditional_gumbels(parents: Tensor, log_probs: Tensor, noise: Tensor) -> Tensor:
    """Perturbed log-probabilities of children, given that the largest of each family is their parent's.

    With G = log-probability + Gumbel and Z = max G of a family, the children's numbers are those of independent
    Gumbels conditioned on the maximum `parents` (appendix B.3 of the paper, in its stable form):
    v = parent - G + log(1 - exp(G - Z)), result = parent - max(0, v) - log(1 + exp(-|v|)).

    Args:
        parents: `(B, n)` perturbed log-probabilities of the parents, -inf for none.
        log_probs: `(B, n, C)` log-probabilities of the children from the root on, -inf for none.
        noise: `(B, n, C)` standard Gumbel numbers.

    Returns:
        `(B, n, C)`; -inf for none.
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
    """log P(log-probability + Gumbel > threshold): `(B, K), (B,) -> (B, K)`; 0 on missing leaves (-inf)."""
    surplus = (log_probs - threshold[:, None]).masked_fill(log_probs == -torch.inf, torch.inf)
    return log1mexp(-surplus.exp())
