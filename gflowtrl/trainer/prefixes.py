"""APAO's adaptive worst-prefix weights: what is hardest to keep in the beam counts more."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from gflowtrl.losses.common import real_steps


VARIANTS = ("paper", "2025", "kdd")
FILE = "prefix_weights.safetensors"


class PrefixWeights:
    """Weights w_m of the prefixes of 1 ... L tokens; they sum to one and carry no gradient.

    - `"paper"`: uniform at first; after each step w_m is multiplied by exp(eta L_m), and all are renormalised (mirror
      ascent on the simplex with a KL penalty of 1 / eta).
    - `"2025"`, the authors' first release: w_m is L_m / sum L times exp(eta L_m) of the batch at hand.
    - `"kdd"`, their release of 2026: L_m / sum L of the first batch; after each step times exp(eta L_m / sum L).

    L_m is the mean over the prompts of the step, over all processes and accumulated micro-batches, that have m tokens.

    Args:
        depth: L.
        eta: rate of adaptation; 0 keeps the first weights.
        variant: one of the three.
        total: adds up a tensor over all processes.

    References:
        Adaptive Prefix-Aware Optimization for Generative Recommendation, KDD 2026, arXiv 2603.02730.
    """

    def __init__(
        self, depth: int, eta: float, variant: str, total: Callable[[Tensor], Tensor] = lambda tensor: tensor
    ):
        if variant not in VARIANTS:
            raise ValueError(f"prefix_variant is {variant!r}; choose one of {', '.join(map(repr, VARIANTS))}.")
        self.eta, self.variant, self._total = eta, variant, total
        uniform = torch.zeros(depth) if variant == "paper" else None
        self._log_weights: Tensor | None = uniform if uniform is None else uniform.log_softmax(0)
        self._pending = torch.zeros(2, depth)

    @torch.no_grad()
    def weigh(self, losses: Tensor, lengths: Tensor) -> Tensor:
        """The weights for a micro-batch, `(L,)`; what it says counts at the end of the step.

        Args:
            losses: `(B, L)` L_m.
            lengths: `(B,)` tokens of the targets.
        """
        real = real_steps(lengths, losses.shape[1])
        sums = torch.stack([losses.detach().float().masked_fill(~real, 0.0).sum(0), real.float().sum(0)])
        sums = self._total(sums)
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
        """The end of a step: adapt."""
        means = self._pending[0] / self._pending[1].clamp(min=1)
        self._pending = torch.zeros_like(self._pending)
        if self.variant == "2025" or self._log_weights is None:
            return
        if self.variant == "kdd":
            means = means / means.sum().clamp(min=1e-12)
        self._log_weights = (self._log_weights + self.eta * means).log_softmax(0)

    def state_dict(self) -> dict[str, Tensor]:
        """What a checkpoint must hold; nothing before the first step of `"kdd"`, and nothing of `"2025"`."""
        return {} if self._log_weights is None else {"log_weights": self._log_weights.cpu()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """What `state_dict` gave.

        Raises:
            ValueError: weights of another number of tokens.
        """
        weights = state["log_weights"]
        if weights.shape != self._pending.shape[1:]:
            raise ValueError(
                f"The checkpoint's prefix weights are of ids of {len(weights)} tokens, but the catalogue's ids have "
                f"up to {self._pending.shape[1]}."
            )
        self._log_weights = weights


def save_prefix_weights(weights: Mapping[str, PrefixWeights], directory: str | os.PathLike) -> None:
    """Into a checkpoint, those of every loss; no file where there are none."""
    state = {f"{name}.{key}": value for name, own in weights.items() for key, value in own.state_dict().items()}
    if state:
        Path(directory).mkdir(parents=True, exist_ok=True)
        save_file(state, Path(directory, FILE))


def load_prefix_weights(weights: Mapping[str, PrefixWeights], directory: str | os.PathLike) -> None:
    """What `save_prefix_weights` wrote; without a file they stay as new."""
    file = Path(directory, FILE)
    state = load_file(file) if file.is_file() else {}
    for name, own in weights.items():
        if f"{name}.log_weights" in state:
            own.load_state_dict({"log_weights": state[f"{name}.log_weights"]})
