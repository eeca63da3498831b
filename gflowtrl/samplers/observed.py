"""Samplers that draw observed items of the session or of the history, or unobserved items."""

from __future__ import annotations

import torch
from torch import Tensor

from gflowtrl.data import Step
from gflowtrl.policy import Noise, TreePolicy
from gflowtrl.rewards import StepReward
from gflowtrl.rewards.exclusion import contains

from .leaf_sets import distinct_sorted, draw_allowed, leaf_rows, observed_leaves
from .sampler import Sampler, Trajectories


class InteractionLogSampler(Sampler):
    """Other items of the same session: exposed, clicked, or purchased (GFlowGR's first strategy).

    The target and repeated leaves are left out, and those that `exclude_history` excludes. The trajectories of a row
    are the leaves of its session in random order, truncated at K. If there are fewer than K leaves, the sequence
    starts again, so that no leaf occurs twice before all have occurred once. A row without such leaves gets the
    target.

    `log_q` is the marginal log-probability of each trajectory, uniform over the leaves of the session (the draws of a
    row are not independent), and 0 for the target.

    Args:
        column: dataset column with a list of items per row. The default is the column that
            `gflowtrl.data.leave_one_out` makes from an event log.
    """

    source_names = ("interaction_log",)

    def __init__(self, column: str = "session_items"):
        if not isinstance(column, str):
            raise TypeError(f"The column of InteractionLogSampler is {column!r}; it must be the name of a column.")
        self.column = column

    def sample(
        self, step: Step, policy: TreePolicy, reward: StepReward | None, num_generations: int, noise: Noise
    ) -> Trajectories:
        rows = step.column(self.column, "InteractionLogSampler")
        log = leaf_rows(policy.catalog, rows).to(step.device)
        if reward is not None and reward.excluded_leaves is not None:
            log = log.masked_fill(contains(reward.excluded_leaves, log), -1)
        log = distinct_sorted(log, step.target_leaves)
        return _in_random_order(
            log, step.target_leaves, noise.uniform("interaction_log", log.shape[1] + 1), num_generations
        )


class HistorySampler(Sampler):
    """Items of the prompt, for `exclude_history`: the policy learns where to stop before one of them.

    These items have no reward, so draws from the reward never visit the last states on their paths, and a policy that
    has got there by a common prefix would not know better. Each row gets the leaves of its prompt, without the
    target's, in random order; if there are fewer than K, the sequence starts again. A row without such leaves gets the
    target. `log_q` is the marginal log-probability of each trajectory.

    Without `exclude_history`, this is a source of trajectories like any other.
    """

    source_names = ("history",)

    def sample(
        self, step: Step, policy: TreePolicy, reward: StepReward | None, num_generations: int, noise: Noise
    ) -> Trajectories:
        leaves = leaf_rows(policy.catalog, step.histories("HistorySampler")).to(step.device)
        leaves = distinct_sorted(leaves, step.target_leaves)
        return _in_random_order(
            leaves, step.target_leaves, noise.uniform("history", leaves.shape[1] + 1), num_generations
        )


def _in_random_order(leaves: Tensor, target_leaves: Tensor, uniforms: Tensor, num_generations: int) -> Trajectories:
    """Return the leaves of each row in random order, cut or repeated to K; the target for rows without leaves.

    Args:
        leaves: `(B, W)` distinct leaves, padded with -1 on the right.
        target_leaves: `(B,)`.
        uniforms: `(B, W + 1)` in (0, 1).
        num_generations: K.
    """
    counts = (leaves >= 0).sum(1, keepdim=True).clamp(min=1)
    leaves = torch.nn.functional.pad(leaves, (0, 1), value=-1)
    leaves[:, 0] = torch.where(leaves[:, 0] < 0, target_leaves, leaves[:, 0])
    # Distinct leaves are on the left, so the noise of a row does not depend on the longest row of the batch.
    keys = uniforms.to(leaves.device).masked_fill(leaves < 0, 2.0)
    shuffled = leaves.gather(1, keys.argsort(1))
    position = torch.arange(num_generations, device=leaves.device) % counts
    log_q = -counts.float().log().expand(-1, num_generations)
    return Trajectories.of_one_source(shuffled.gather(1, position), log_q.contiguous())


class UnobservedSampler(Sampler):
    """Draws uniformly from the leaves of neither the target nor the history, with replacement (GFlowGR's "random").

    Reads the column `history`.
    """

    source_names = ("unobserved",)

    def sample(
        self, step: Step, policy: TreePolicy, reward: StepReward | None, num_generations: int, noise: Noise
    ) -> Trajectories:
        forbidden = observed_leaves(step, policy.catalog, reward, "UnobservedSampler")
        uniforms, leaves = noise.uniform("unobserved", num_generations), policy.catalog.tree.num_leaves
        return Trajectories.of_one_source(*draw_allowed(uniforms, forbidden, leaves, "UnobservedSampler"))
