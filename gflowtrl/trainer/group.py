"""The prompts of a step with their trajectories, scores and rewards, and the metrics that are logged."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from torch import Tensor

from gflowtrl.catalog import Item, ItemCatalog
from gflowtrl.data import Step
from gflowtrl.policy import StepScores
from gflowtrl.rewards import RewardResult, StepReward
from gflowtrl.samplers import Trajectories

from .weighting import effective_number


@dataclass
class Group:
    """The prompts of one step with their trajectories.

    Attributes:
        step: prompts and dataset columns.
        drawn: the sampler's K trajectories.
        leaves: `(B, K)` scored leaves, or `(B, 1 + K)` with the observed target first.
        all_scores: the policy's scores of `leaves`.
        reward: R of the step's prompts including the prior; None without rewards.
        rewards: R of the drawn trajectories.
        log_z: `(B,)` the true log Z(x); None unless a loss uses every flow.
        weights: `(B, K)` weights of the trajectories, with mean 1 within a prompt; None if they are not weighted.
        prior_weight: exponent of the reference model in the target.
        losses: the unweighted mean of each loss computed so far.
    """

    step: Step
    drawn: Trajectories
    leaves: Tensor
    all_scores: StepScores
    reward: StepReward | None = None
    rewards: RewardResult | None = None
    log_z: Tensor | None = None
    weights: Tensor | None = None
    prior_weight: float = 0.0
    losses: dict[str, Tensor] = field(default_factory=dict)

    @cached_property
    def scores(self) -> StepScores:
        """Scores of the drawn trajectories."""
        first = self.leaves.shape[1] - self.drawn.leaves.shape[1]
        return self.all_scores.of_trajectories(slice(first, None))

    @cached_property
    def target(self) -> StepScores:
        """Scores of the observed target, for losses that use it."""
        return self.all_scores.of_trajectories(slice(0, 1))

    def residuals(self, log_rewards: Tensor) -> tuple[Tensor, Tensor]:
        """Return the best known log Z (true, learned or VarGrad's), `(B,)`, and |log Z + log pi - log R|, `(B, K)`."""
        balance = log_rewards - self.scores.trajectory_log_probs
        log_z = self.log_z if self.log_z is not None else self.scores.log_z
        if log_z is None:
            log_z = balance.mean(1)
        return log_z, (log_z[:, None] - balance).abs()


@torch.no_grad()
def group_metrics(group: Group, sources: Sequence[str]) -> dict[str, Tensor | float]:
    """Return the metrics of a group to log; `sources` are the names of the sampler's sources."""
    scores, leaves, source = group.scores, group.drawn.leaves, group.drawn.source
    log_pi = scores.trajectory_log_probs
    entropy = torch.special.entr(scores.child_log_probs.exp()).sum((-2, -1))
    ordered = leaves.sort(1).values
    metrics: dict[str, Tensor | float] = {
        "policy_entropy": entropy.mean(),
        "unique_items": 1.0 + (ordered[:, 1:] != ordered[:, :-1]).sum(1).float().mean(),
        "log_pi": log_pi.mean(),
    }
    if group.rewards is None:
        return metrics
    metrics |= {f"rewards/{name}": values.nanmean() for name, values in group.rewards.parts.items()}
    metrics |= {f"rewards/{name}": value for name, value in group.rewards.metrics.items()}
    metrics |= {"reward": group.rewards.rewards.mean(), "reward_floored_mass": group.rewards.floored_mass}
    metrics["reward_std"] = group.rewards.rewards.std(1, correction=0).mean()
    if len(sources) > 1:
        for index, name in enumerate(sources):
            drawn_by = source == index
            metrics[f"sampler/{name}/share"] = drawn_by.float().mean()
            metrics[f"sampler/{name}/reward"] = group.rewards.rewards[drawn_by].mean()
    if group.rewards.excluded is not None:
        metrics["drawn_from_history"] = group.rewards.excluded.float().mean()
    if group.rewards.log_prior is not None:
        metrics["log_pi_ref"] = group.rewards.log_prior.mean() / group.prior_weight
    if group.weights is not None:
        metrics["effective_generations"] = effective_number(group.weights).mean()
    log_z, residual = group.residuals(group.rewards.log_rewards)
    return metrics | {"log_z": log_z.mean(), "residual": residual.mean()}


def print_group(
    group: Group, catalog: ItemCatalog, sources: Sequence[str], step: int, titles: Mapping[Item, str] | None = None
) -> None:
    """Print a table of the first prompt's trajectories, highest reward first, with the rewards' `log_extra` columns.

    Args:
        group: the group of the step.
        catalog, sources: the items, and the names of the sampler's sources.
        step: number of steps done.
        titles: titles of items, if known.
    """
    titles = titles or {}

    def named(item: Item) -> str:
        return escape(f"{item} ({titles[item]})" if item in titles else str(item))

    history, target = group.step.histories("log_completions")[0], group.step.columns["target"][0]
    table = Table(title=f"Step {step}", caption=f"history: {', '.join(map(named, history))}\ntarget: {named(target)}")
    table.add_column("items", overflow="fold", min_width=16)
    table.add_column("semantic id", no_wrap=True)
    for heading in ("probability", "log pi", "log R", "reward"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("source", no_wrap=True)
    extra = {} if group.rewards is None else group.rewards.extra
    for heading in extra:
        table.add_column(escape(heading), overflow="fold")
    leaves, log_pi = group.drawn.leaves[0], group.scores.trajectory_log_probs[0]
    order = (log_pi if group.rewards is None else group.rewards.log_rewards[0]).argsort(descending=True, stable=True)
    for k in order.tolist():
        leaf, rewards = int(leaves[k]), ["", ""]
        if group.rewards is not None:
            rewards = [f"{group.rewards.log_rewards[0, k]:.3f}", f"{group.rewards.rewards[0, k]:.4g}"]
        table.add_row(
            ", ".join(map(named, catalog.items_of(leaf))), catalog.leaf_text(leaf), f"{log_pi[k].exp():.3g}",
            f"{log_pi[k]:.3f}", *rewards, sources[int(group.drawn.source[0, k])],
            *(escape(str(values[k])) if k < len(values) else "" for values in extra.values()),
        )  # fmt: skip
    Console(width=None if sys.stdout.isatty() else 160).print(table)
