"""Helpers shared by the losses: the residual of a trajectory, its penalty, the mask of real steps, shape checks."""

from __future__ import annotations

import torch
from torch import Tensor

from gflowtrl.checks import POSITIVE, Bound, check_choice, check_number


PENALTIES = ("squared", "shifted_cosh", "linex")
MOST_EXPONENT = 80.0  # larger exponents overflow in float32; as in torchgfn
_SLOPE = Bound("a finite number other than 0", lambda value: value != 0)


def penalize(
    residual: Tensor,
    huber_delta: float | None = None,
    penalty: str = "squared",
    linex_alpha: float | None = None,
    delta_name: str = "huber_delta",
) -> Tensor:
    """Return the penalty of residuals `r = log Z + log pi - log R` (or the like), 0 at 0 and positive elsewhere.

    Args:
        residual: r, any shape.
        huber_delta: with `"squared"`, residuals beyond this size count linearly, with a continuous slope:
            `delta * (2 |r| - delta)`.
        penalty: `"squared"`: r^2. `"shifted_cosh"`: e^r + e^-r - 2, of the same scale near 0. `"linex"`:
            (e^(a t) - a t - 1) / a^2 with t = -r, half of that scale. On policy, the expected gradient with the true
            log Z is that of KL(R/Z || pi) for a = 1, twice that of KL(pi || R/Z) for `"squared"`. torchgfn applies
            linex to r, which gives half of the chi-squared divergence of pi from R/Z and avoids what has little
            reward; for that, use a = -1.
        linex_alpha: a, not 0; only for `"linex"`, by default 1.
        delta_name: what the messages call `huber_delta`.

    Raises:
        ValueError: an option is out of range, or belongs to another penalty.

    References:
        Hu et al., Beyond squared error: exploring loss design for enhanced training of generative flow networks, ICLR
        2025. torchgfn 2.4.1 (`LinexLoss`, `ShiftedCoshLoss`).
    """
    check_choice("penalty", penalty, PENALTIES)
    for name, value, wanted in ((delta_name, huber_delta, "squared"), ("linex_alpha", linex_alpha, "linex")):
        if value is not None and penalty != wanted:
            raise ValueError(f"{name} is {value}, but penalty is {penalty!r}; use penalty={wanted!r}, or {name}=None.")
    if penalty == "shifted_cosh":
        limited = residual.clamp(-MOST_EXPONENT, MOST_EXPONENT)
        return limited.exp() + (-limited).exp() - 2
    if penalty == "linex":
        alpha = 1.0 if linex_alpha is None else linex_alpha
        check_number("linex_alpha", alpha, _SLOPE)
        # Both terms are limited: with the exponential alone, the slope of a larger exponent would have the wrong sign.
        limited = (-alpha * residual).clamp(max=MOST_EXPONENT)
        return (limited.exp() - limited - 1) / alpha**2
    if huber_delta is None:
        return residual.square()
    check_number(delta_name, huber_delta, POSITIVE)
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
