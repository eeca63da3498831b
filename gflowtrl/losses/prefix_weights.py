"""APAO's adaptive prefix weights: prefixes that are harder to keep in the beam get more weight."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from gflowtrl.checks import NOT_NEGATIVE, check_choice, check_number

from .common import real_steps


VARIANTS = ("paper", "2025", "kdd")


class PrefixWeights:
    """Weights w_m of the prefixes of 1 ... L tokens. They sum to one and carry no gradient.

    - `"paper"`: uniform at first; after each step w_m is multiplied by exp(eta L_m) and the weights are renormalized
      (mirror ascent on the simplex with a KL penalty of 1 / eta).
    - `"2025"` (the authors' first release): w_m is L_m / sum L times exp(eta L_m), both of the current batch.
    - `"kdd"` (their 2026 release): L_m / sum L of the first batch, multiplied by exp(eta L_m / sum L) after each step.

    L_m is the mean over the step's prompts whose targets have at least m tokens, over all processes and accumulated
    micro-batches.

    Args:
        depth: L.
        reduce_sum: sums a tensor over all processes.
        eta: rate of adaptation; 0 keeps the first weights.
        variant: `"paper"`, `"2025"` or `"kdd"`.

    Raises:
        ValueError: a negative rate, or an unknown variant.

    References:
        Adaptive Prefix-Aware Optimization for Generative Recommendation, KDD 2026, arXiv 2603.02730.
    """

    def __init__(self, depth: int, reduce_sum: Callable[[Tensor], Tensor], eta: float = 1e-4, variant: str = "paper"):
        check_number("eta", eta, NOT_NEGATIVE)
        check_choice("variant", variant, VARIANTS)
        self.eta, self.variant, self._reduce_sum = eta, variant, reduce_sum
        self._log_weights: Tensor | None = torch.zeros(depth).log_softmax(0) if variant == "paper" else None
        self._pending = torch.zeros(2, depth)

    @torch.no_grad()
    def weigh(self, losses: Tensor, lengths: Tensor) -> Tensor:
        """Return the weights for a micro-batch, `(L,)`, and collect its losses for the update at the end of the step.

        Args:
            losses: `(B, L)` L_m.
            lengths: `(B,)` number of tokens of the targets.
        """
        real = real_steps(lengths, losses.shape[1])
        sums = torch.stack([losses.detach().float().masked_fill(~real, 0.0).sum(0), real.float().sum(0)])
        sums = self._reduce_sum(sums)
        self._pending = self._pending.to(sums) + sums
        means = sums[0] / sums[1].clamp(min=1)
        if self.variant == "2025":
            return (means.clamp(min=1e-12).log() + self.eta * means).softmax(0)
        if self._log_weights is None:
            self._log_weights = means.clamp(min=1e-12).log().log_softmax(0)
        self._log_weights = self._log_weights.to(sums)
        return self._log_weights.exp()

    @torch.no_grad()
    def step(self) -> None:
        """Update the weights at the end of an optimizer step."""
        means = self._pending[0] / self._pending[1].clamp(min=1)
        self._pending = torch.zeros_like(self._pending)
        if self.variant == "2025" or self._log_weights is None:
            return
        if self.variant == "kdd":
            means = means / means.sum().clamp(min=1e-12)
        self._log_weights = (self._log_weights + self.eta * means).log_softmax(0)

    def state_dict(self) -> dict[str, Tensor]:
        """Return the state for a checkpoint; empty for `"2025"`, and for `"kdd"` before the first step."""
        return {} if self._log_weights is None else {"log_weights": self._log_weights.cpu()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Restore the result of `state_dict`.

        Raises:
            ValueError: the weights are for another number of tokens.
        """
        weights = state["log_weights"]
        if weights.shape != self._pending.shape[1:]:
            raise ValueError(
                f"The checkpoint's prefix weights are for ids of {len(weights)} tokens, but the catalog's ids have up "
                f"to {self._pending.shape[1]}. Resume with the catalog that the checkpoint was trained on."
            )
        self._log_weights = weights
