"""What the losses share: the residual's penalty, the mask of real steps and the check of shapes."""

from __future__ import annotations

import torch
from torch import Tensor


def penalty(residual: Tensor, huber_delta: float | None = None) -> Tensor:
    """Squared residual; with `huber_delta` only up to that size and linear beyond, with the same slope at the joint.

    Scaled so that a large `huber_delta` is the squared residual: `r^2` where `|r| <= delta`, else
    `delta * (2 |r| - delta)`.

    Raises:
        ValueError: `huber_delta` is not positive.
    """
    if huber_delta is None:
        return residual.square()
    if huber_delta <= 0:
        raise ValueError(f"huber_delta is {huber_delta}; give a positive size, or None for the squared residual.")
    size = residual.abs()
    return torch.where(size <= huber_delta, residual.square(), huber_delta * (2 * size - huber_delta))


def real_steps(lengths: Tensor, num_steps: int) -> Tensor:
    """Which of the padded steps belong to each id: `(B, K) -> bool (B, K, num_steps)`."""
    return torch.arange(num_steps, device=lengths.device) < lengths[..., None]


def expect_shape(name: str, tensor: Tensor, shape: tuple[int, ...], meaning: str) -> None:
    """Refuse a tensor that would broadcast into a wrong loss without a word."""
    if tensor.shape != shape:
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}, but this loss needs {meaning} = {tuple(shape)}.")
