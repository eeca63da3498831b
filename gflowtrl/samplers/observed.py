"""Samplers that draw observed items of the same session, or unobserved items."""

from __future__ import annotations

import torch

from gflowtrl.data import Step
from gflowtrl.policy import Noise, TreePolicy
from gflowtrl.rewards import StepReward

from .leaf_sets import distinct_sorted, draw_allowed, is_member, leaf_rows, observed_leaves
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
        excluded = None if reward is None else reward.excluded_leaves
        log = distinct_sorted(log.masked_fill(is_member(log, excluded), -1), step.target_leaves)
        counts = (log >= 0).sum(1, keepdim=True).clamp(min=1)
        log = torch.cat([log, log.new_full((len(log), 1), -1)], 1)
        log[:, 0] = torch.where(log[:, 0] < 0, step.target_leaves, log[:, 0])
        # Distinct leaves are on the left, so the noise of a row does not depend on the longest session of the batch.
        keys = noise.uniform("interaction_log", log.shape[1]).to(log.device).masked_fill(log < 0, 2.0)
        shuffled = log.gather(1, keys.argsort(1))
        position = torch.arange(num_generations, device=log.device) % counts
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
