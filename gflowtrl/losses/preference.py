"""Preference losses with a reference model: softmax DPO."""

from __future__ import annotations

import torch
from torch import Tensor

from gflowtrl.checks import POSITIVE, check_number

from .common import expect_shape, real_steps


def sdpo(log_probs: Tensor, ref_log_probs: Tensor, lengths: Tensor, leaves: Tensor, beta: float = 1.0) -> Tensor:
    """Softmax DPO: the target against several negatives, `-log sigmoid(-log sum_j exp(beta (D_j - D_+)))`, with
    `D = log pi - log pi_ref`.

    Negatives that equal the target are ignored. The loss is 0 if no negative remains.

    Args:
        log_probs: `(B, K, L)` log-probabilities of the tokens taken, over the tree or (as in TRL) over the whole
            vocabulary. Trajectory 0 is the observed target.
        ref_log_probs: `(B, K, L)` log-probabilities of the reference model, over the same tokens.
        lengths: `(B, K)` number of tokens of each id.
        leaves: `(B, K)` leaf of each trajectory.
        beta: scale of the differences, > 0.

    Returns:
        `(B, 1)`, in nats. With one negative this is DPO on the tokens of the ids. TRL's `DPOTrainer` appends an end
        token to both answers of a text dataset, which adds another term; an id has no end token.

    References:
        Chen et al., On Softmax Direct Preference Optimization for Recommendation, NeurIPS 2024.
    """
    check_number("beta", beta, POSITIVE)
    expect_shape("ref_log_probs", ref_log_probs, log_probs.shape, "log_probs.shape")
    expect_shape("leaves", leaves, log_probs.shape[:2], "(prompts, trajectories)")
    real = real_steps(lengths, log_probs.shape[-1])
    gain = (log_probs - ref_log_probs).masked_fill(~real, 0.0).sum(-1)
    others = leaves != leaves[:, :1]
    margins = (beta * (gain - gain[:, :1])).masked_fill(~others, torch.finfo(gain.dtype).min)
    return torch.nn.functional.softplus(margins.logsumexp(1, keepdim=True))


def ipa(log_probs: Tensor, ref_log_probs: Tensor, lengths: Tensor, rewards: Tensor, beta: float = 0.1) -> Tensor:
    """DPO on the best and the worst of K trajectories by reward, `-log sigmoid(beta (D_best - D_worst))`, with
    `D = log pi - log pi_ref` (OneRec's iterative preference alignment).

    The first trajectory wins a tie. If all rewards of a prompt are equal, its loss is 0.

    Args:
        log_probs: `(B, K, L)` log-probabilities of the tokens taken.
        ref_log_probs: `(B, K, L)` log-probabilities of the reference model, over the same tokens.
        lengths: `(B, K)` number of tokens of each id.
        rewards: `(B, K)` rewards before the transform to log R.
        beta: scale of the differences, > 0. OneRec's value is not published; the default is TRL's for DPO.

    Returns:
        `(B, 1)`, in nats.

    References:
        Deng et al., OneRec, arXiv 2502.18965.
    """
    check_number("beta", beta, POSITIVE)
    expect_shape("ref_log_probs", ref_log_probs, log_probs.shape, "log_probs.shape")
    expect_shape("rewards", rewards, log_probs.shape[:2], "(prompts, trajectories)")
    real = real_steps(lengths, log_probs.shape[-1])
    gain = (log_probs - ref_log_probs).masked_fill(~real, 0.0).sum(-1)
    best, worst = rewards.argmax(1, keepdim=True), rewards.argmin(1, keepdim=True)
    loss = torch.nn.functional.softplus(beta * (gain.gather(1, worst) - gain.gather(1, best)))
    return loss.masked_fill(rewards.gather(1, best) == rewards.gather(1, worst), 0.0)
