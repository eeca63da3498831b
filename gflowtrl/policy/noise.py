"""Randomness as a function: the same (seed, step, row, trajectory, depth, purpose) always gives the same number.

A generator's next number depends on everything drawn before, so trajectories would change with the number of
processes, the order of rows and every interruption. Here each number is a hash of what it is for (the counter-based
generators of Salmon et al., SC 2011, with SplitMix64 as the mixing function).
"""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor


_GAMMA = -7046029254386353131  # 0x9E3779B97F4A7C15 as a signed 64-bit integer
_MIX_1 = -4658895280553007687  # 0xBF58476D1CE4E5B9
_MIX_2 = -7723592293110705685  # 0x94D049BB133111EB


def _shift_right(x: Tensor, bits: int) -> Tensor:
    """Logical shift: torch's shift of a signed integer fills with the sign bit."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _mix(x: Tensor) -> Tensor:
    """SplitMix64's finaliser; int64 multiplication wraps around, which is what it needs."""
    x = (x ^ _shift_right(x, 30)) * _MIX_1
    x = (x ^ _shift_right(x, 27)) * _MIX_2
    return x ^ _shift_right(x, 31)


def _combine(state: Tensor, value: Tensor | int) -> Tensor:
    return _mix((state ^ value) + _GAMMA)


def _wrap(value: int) -> int:
    """Any Python integer as a signed 64-bit one."""
    return (value + 2**63) % 2**64 - 2**63


class StatelessNoise:
    """Source of all randomness of a run.

    Args:
        seed: any integer.

    Example:
        ```python
        noise = StatelessNoise(42).at(step=7, row_ids=torch.tensor([3, 8]))
        noise.uniform("on_policy", num=4, depth=0)  # (2, 4), the same whenever and wherever it is asked for
        ```
    """

    def __init__(self, seed: int):
        self.seed = int(seed)

    def at(self, step: int, row_ids: Tensor) -> Noise:
        """The noise of one training step for rows with these ids, `(B,)` integers."""
        state = _combine(torch.zeros_like(row_ids, dtype=torch.long), _wrap(self.seed))
        return Noise(_combine(_combine(state, _wrap(int(step))), row_ids.long()))


class Noise:
    """The noise of some rows at one step. Made by `StatelessNoise.at`."""

    def __init__(self, row_state: Tensor, prefix: str = ""):
        self._row_state, self._prefix = row_state, prefix

    def __len__(self) -> int:
        return len(self._row_state)

    def named(self, name: str) -> Noise:
        """The same rows' noise for someone called `name`: independent of what others draw for the same purposes."""
        return Noise(self._row_state, f"{self._prefix}{name}/")

    def uniform(self, purpose: str, num: int, depth: int = 0) -> Tensor:
        """Uniform numbers in the open interval (0, 1): float64 `(B, num)`, one for each row and trajectory."""
        index = torch.arange(num, device=self._row_state.device).expand(len(self), -1)
        return self.uniform_at(purpose, index, depth)

    def uniform_at(self, purpose: str, index: Tensor, depth: int = 0) -> Tensor:
        """Uniform numbers of anything that has a number of its own, for example nodes.

        Args:
            purpose: what for; different purposes are independent.
            index: integers `(B, ...)`, the rows first.
            depth: one more number that tells apart.

        Returns:
            float64, in the shape of `index`: a function of the row, the purpose, the depth and the index only.
        """
        purpose = f"{self._prefix}{purpose}"
        tag = int.from_bytes(hashlib.blake2b(purpose.encode(), digest_size=8).digest(), "big", signed=True)
        state = _combine(_combine(self._row_state, tag), _wrap(depth))
        state = _combine(state.view(-1, *[1] * (index.ndim - 1)), index)
        return (_shift_right(state, 11).double() + 0.5) * 2.0**-53

    def gumbel_at(self, purpose: str, index: Tensor) -> Tensor:
        """Standard Gumbel numbers, float64, in the shape of `index`: a function of what `uniform_at` is one of."""
        return -(-self.uniform_at(purpose, index).clamp(max=1 - 2.0**-53).log()).log()


def inverse_cdf(weights: Tensor, uniforms: Tensor) -> Tensor:
    """Draw from categorical distributions by inverting their cumulative sums.

    Args:
        weights: `(.., C)`, >= 0; they need not sum to one.
        uniforms: `(.., K)` in (0, 1).

    Returns:
        indices `(.., K)`, never of an entry of weight 0 (unless all are).
    """
    # 64 bits: in 32 the sums of a million small numbers stand still, and entries at the end are never drawn.
    sums = weights.double().cumsum(-1)
    total = sums[..., -1:]
    # Rounding must not reach the total itself, beyond which there is no entry.
    place = torch.minimum(uniforms.to(sums.device) * total, torch.nextafter(total, torch.zeros_like(total)))
    return torch.searchsorted(sums, place, right=True).clamp(max=weights.shape[-1] - 1)
