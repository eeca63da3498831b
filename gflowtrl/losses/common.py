"""What the losses share: the surplus of trajectories, its penalty, the mask of real steps, the check of shapes."""

from __future__ import annotations

import torch
from torch import Tensor

from gflowtrl.checks import POSITIVE, check_number


def penalty(residual: Tensor, huber_delta: float | None = None, name: str = "huber_delta") -> Tensor:
    """Squared residual; with `huber_delta` only up to that size and linear beyond, with the same slope at the joint.

    Scaled so that a large `huber_delta` is the squared residual: `r^2` where `|r| <= delta`, else
    `delta * (2 |r| - delta)`.

    Raises:
        ValueError: `huber_delta`, which the caller calls `name`, is not a positive number.
    """
    if huber_delta is None:
        return residual.square()
    check_number(name, huber_delta, POSITIVE)
    size = residual.abs()
    return torch.where(size <= huber_delta, residual.square(), huber_delta * (2 * size - huber_delta))


def surplus(log_probs: Tensor, log_rewards: Tensor, compared_by: str | None = None) -> Tensor:
    """`sum_l log pi(t_l | s_l) - log R` of each trajectory: `(B, K, L), (B, K) -> (B, K)`.

    Raises:
        ValueError: the shapes do not belong together, or fewer than two trajectories per prompt where a loss
            (`compared_by`, its name) compares them with each other.
    """
    batch, num_generations, _ = log_probs.shape
    expect_shape("log_rewards", log_rewards, (batch, num_generations), "(prompts, trajectories)")
    if compared_by is not None and num_generations < 2:
        raise ValueError(
            f"{compared_by} compares the trajectories of a prompt and needs at least 2 of them, got "
            f"num_generations={num_generations}. Raise num_generations, or use trajectory_balance or exact_flow."
        )
    return log_probs.sum(-1) - log_rewards


def real_steps(lengths: Tensor, num_steps: int) -> Tensor:
    """Which of the padded steps belong to each id: `(B, K) -> bool (B, K, num_steps)`."""
    return torch.arange(num_steps, device=lengths.device) < lengths[..., None]


def expect_shape(name: str, tensor: Tensor, shape: tuple[int, ...], meaning: str) -> None:
    """Refuse a tensor that would broadcast into a wrong loss without a word."""
    if tensor.shape != shape:
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}, but this loss needs {meaning} = {tuple(shape)}.")
