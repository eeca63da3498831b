"""Stateless random numbers: a function of (seed, step, row, trajectory, depth, purpose).

The next number of an ordinary generator depends on all numbers drawn before, so trajectories would change with the
number of processes, the order of rows and every interruption. Here each number is a hash of its purpose (a
counter-based generator as in Salmon et al., SC 2011, with SplitMix64 as the mixing function).
"""

from __future__ import annotations

import hashlib
from numbers import Integral

import torch
from torch import Tensor

from gflowtrl.checks import check_type


_GAMMA = -7046029254386353131  # 0x9E3779B97F4A7C15 as a signed 64-bit integer
_MIX_1 = -4658895280553007687  # 0xBF58476D1CE4E5B9
_MIX_2 = -7723592293110705685  # 0x94D049BB133111EB


def _shift_right(x: Tensor, bits: int) -> Tensor:
    """Shift right and fill with zeros; torch's shift of a signed integer fills with the sign bit."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _mix(x: Tensor) -> Tensor:
    """Apply the finalizer of SplitMix64, which needs multiplication modulo 2^64, as int64 tensors multiply."""
    x = (x ^ _shift_right(x, 30)) * _MIX_1
    x = (x ^ _shift_right(x, 27)) * _MIX_2
    return x ^ _shift_right(x, 31)


def _combine(state: Tensor, value: Tensor | int) -> Tensor:
    return _mix((state ^ value) + _GAMMA)


def _wrap(value: int) -> int:
    """Reduce any Python integer to a signed 64-bit integer."""
    return (value + 2**63) % 2**64 - 2**63


class StatelessNoise:
    """The source of all random numbers of a run.

    Args:
        seed: any integer.

    Example:
        ```python
        noise = StatelessNoise(42).at(step=7, row_ids=torch.tensor([3, 8]))
        noise.uniform("on_policy", num=4, depth=0)  # (2, 4), the same in every call and every process
        ```
    """

    def __init__(self, seed: int):
        check_type("seed", seed, Integral, "a whole number")
        self.seed = int(seed)

    def at(self, step: int, row_ids: Tensor) -> Noise:
        """Return the noise of one training step for the rows with these ids, `(B,)` integers."""
        state = _combine(torch.zeros_like(row_ids, dtype=torch.long), _wrap(self.seed))
        return Noise(_combine(_combine(state, _wrap(int(step))), row_ids.long()))


class Noise:
    """The noise of some rows at one step, created by `StatelessNoise.at`."""

    def __init__(self, row_state: Tensor, prefix: str = ""):
        self._row_state, self._prefix = row_state, prefix

    def __len__(self) -> int:
        return len(self._row_state)

    def named(self, name: str) -> Noise:
        """Return noise of the same rows that is independent of the noise under other names, for every purpose."""
        return Noise(self._row_state, f"{self._prefix}{name}/")

    def uniform(self, purpose: str, num: int, depth: int = 0) -> Tensor:
        """Return uniform numbers in the open interval (0, 1): float64 `(B, num)`, one per row and trajectory."""
        index = torch.arange(num, device=self._row_state.device).expand(len(self), -1)
        return self.uniform_at(purpose, index, depth)

    def uniform_at(self, purpose: str, index: Tensor, depth: int = 0) -> Tensor:
        """Return uniform numbers in (0, 1) for indices, for example of nodes.

        Args:
            purpose: what the numbers are used for. Different purposes give independent numbers.
            index: integers `(B, ...)`, one row per row id.
            depth: a further integer. Different depths give independent numbers.

        Returns:
            float64, in the shape of `index`: a function of the row, the purpose, the depth and the index only.
        """
        purpose = f"{self._prefix}{purpose}"
        tag = int.from_bytes(hashlib.blake2b(purpose.encode(), digest_size=8).digest(), "big", signed=True)
        state = _combine(_combine(self._row_state, tag), _wrap(depth))
        state = _combine(state.view(-1, *[1] * (index.ndim - 1)), index)
        return (_shift_right(state, 11).double() + 0.5) * 2.0**-53

    def gumbel_at(self, purpose: str, index: Tensor) -> Tensor:
        """Return standard Gumbel numbers, float64, in the shape of `index`; otherwise like `uniform_at`."""
        return -(-self.uniform_at(purpose, index).clamp(max=1 - 2.0**-53).log()).log()


def inverse_cdf(weights: Tensor, uniforms: Tensor) -> Tensor:
    """Draw from categorical distributions by inverting their cumulative sums.

    Args:
        weights: `(.., C)`, >= 0; they need not sum to one.
        uniforms: `(.., K)` in (0, 1).

    Returns:
        Indices `(.., K)`, never of an entry with weight 0 (unless all weights are 0).
    """
    # 64 bits: in 32, cumulative sums of a million small numbers stop growing, and the last entries are never drawn.
    sums = weights.double().cumsum(-1)
    total = sums[..., -1:]
    # The product must not round up to the total, which would be after the last entry.
    target = torch.minimum(uniforms.to(sums.device) * total, torch.nextafter(total, torch.zeros_like(total)))
    return torch.searchsorted(sums, target, right=True).clamp(max=weights.shape[-1] - 1)
