"""What the losses share: the residual's penalty, the mask of real steps and the check of shapes."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def penalty(residual: Tensor, huber_delta: float | None = None, name: str = "huber_delta") -> Tensor:
    """Squared residual; with `huber_delta` only up to that size and linear beyond, with the same slope at the joint.

    Scaled so that a large `huber_delta` is the squared residual: `r^2` where `|r| <= delta`, else
    `delta * (2 |r| - delta)`.

    Raises:
        ValueError: `huber_delta`, which the caller calls `name`, is not a positive number.
    """
    if huber_delta is None:
        return residual.square()
    check_number(name, huber_delta)
    size = residual.abs()
    return torch.where(size <= huber_delta, residual.square(), huber_delta * (2 * size - huber_delta))


def real_steps(lengths: Tensor, num_steps: int) -> Tensor:
    """Which of the padded steps belong to each id: `(B, K) -> bool (B, K, num_steps)`."""
    return torch.arange(num_steps, device=lengths.device) < lengths[..., None]


def expect_shape(name: str, tensor: Tensor, shape: tuple[int, ...], meaning: str) -> None:
    """Refuse a tensor that would broadcast into a wrong loss without a word."""
    if tensor.shape != shape:
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}, but this loss needs {meaning} = {tuple(shape)}.")


def check_number(name: str, value: float, zero: bool = False) -> None:
    """Refuse an option that is not a finite number above 0 (or, with `zero`, of at least 0).

    Raises:
        ValueError: names the option.
    """
    number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if not number or value < 0 or (value == 0 and not zero):
        raise ValueError(f"{name} is {value!r}; it must be a finite number {'of at least' if zero else 'above'} 0.")
