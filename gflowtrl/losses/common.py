"""Helpers shared by the losses: the residual of a trajectory, its penalty, the mask of real steps, shape checks."""

from __future__ import annotations

import torch
from torch import Tensor

from gflowtrl.checks import POSITIVE, check_number


def penalty(residual: Tensor, huber_delta: float | None = None, name: str = "huber_delta") -> Tensor:
    """Return the squared residual; with `huber_delta`, linear beyond that size, with a continuous slope.

    The scale is that of the squared residual: `r^2` where `|r| <= delta`, else `delta * (2 |r| - delta)`.

    Raises:
        ValueError: `huber_delta` is not a positive number. The message calls it `name`.
    """
    if huber_delta is None:
        return residual.square()
    check_number(name, huber_delta, POSITIVE)
    size = residual.abs()
    return torch.where(size <= huber_delta, residual.square(), huber_delta * (2 * size - huber_delta))


def surplus(log_probs: Tensor, log_rewards: Tensor, compared_by: str | None = None) -> Tensor:
    """Return `sum_l log pi(t_l | s_l) - log R` of each trajectory: `(B, K, L), (B, K) -> (B, K)`.

    Args:
        log_probs, log_rewards: as for the losses.
        compared_by: name of a loss that compares the trajectories of a prompt with each other.

    Raises:
        ValueError: the shapes do not match, or `compared_by` is set and a prompt has fewer than two trajectories.
    """
    expect_shape("log_rewards", log_rewards, log_probs.shape[:2], "(prompts, trajectories)")
    if compared_by is not None and log_probs.shape[1] < 2:
        raise ValueError(
            f"{compared_by} compares the trajectories of a prompt and needs at least 2 of them, got "
            f"num_generations={log_probs.shape[1]}. Raise num_generations, or use trajectory_balance or exact_flow."
        )
    return log_probs.sum(-1) - log_rewards


def real_steps(lengths: Tensor, num_steps: int) -> Tensor:
    """Return the mask of the steps that belong to each id, without padding: `(B, K) -> bool (B, K, num_steps)`."""
    return torch.arange(num_steps, device=lengths.device) < lengths[..., None]


def expect_shape(name: str, tensor: Tensor, shape: tuple[int, ...], meaning: str) -> None:
    """Raise an error for a tensor of the wrong shape, which could silently broadcast into a wrong loss."""
    if tensor.shape != shape:
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}, but this loss needs {meaning} = {tuple(shape)}.")
