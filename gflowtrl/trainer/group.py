"""What a step knows about its prompts and their trajectories, and what is logged of it."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from torch import Tensor

from gflowtrl.catalog import Item, ItemCatalog
from gflowtrl.policy import StepScores
from gflowtrl.rewards import RewardResult
from gflowtrl.samplers import TrajectoryBatch

from .weighting import effective_number


@dataclass
class Group:
    """What one step knows about its prompts and their trajectories.

    Attributes:
        batch: prompts and dataset columns.
        trajectories, scores: what was drawn, and what the policy says about it.
        rewards: where there are rewards; `log_rewards` is log R of the target, the prior included.
        log_prior, prior_weight: `(B, K)` the prior's part of it and the exponent of pi_ref, where there is a reference
            model.
        flows: log F of any nodes `(B, ...) -> (B, ...)`, under `exact_flow`.
        weights: `(B, K)` of mean 1 within a prompt, where trajectories are weighted.
    """

    batch: dict[str, Any]
    trajectories: TrajectoryBatch
    scores: StepScores
    rewards: RewardResult | None = None
    log_prior: Tensor | None = None
    prior_weight: float = 0.0
    flows: Callable[[Tensor], Tensor] | None = None
    weights: Tensor | None = None

    def residuals(self) -> tuple[Tensor, Tensor]:
        """`(B,)` the best known log Z (true, learned or VarGrad's), `(B, K)` sizes of log Z + log pi - log R."""
        balance = self.rewards.log_rewards - self.scores.trajectory_log_probs
        log_z = balance.mean(1)
        if self.flows is not None:
            log_z = self.flows(torch.zeros_like(self.trajectories.leaves[:, :1]))[:, 0]  # of the root
        elif self.scores.log_z is not None:
            log_z = self.scores.log_z
        return log_z, (log_z[:, None] - balance).abs()


@torch.no_grad()
def group_metrics(group: Group, sources: Sequence[str]) -> dict[str, Tensor]:
    """What the log says of a group; `sources` are the sampler's."""
    scores, leaves, source = group.scores, group.trajectories.leaves, group.trajectories.source
    log_pi = scores.trajectory_log_probs
    child = scores.child_log_probs
    entropy = -(child.exp() * child.masked_fill(child == -torch.inf, 0.0)).sum((-2, -1))
    ordered = leaves.sort(1).values
    metrics = {
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
            own = source == index
            metrics[f"sampler/{name}/share"] = own.float().mean()
            metrics[f"sampler/{name}/reward"] = group.rewards.rewards[own].mean()
    if group.log_prior is not None:
        metrics["log_pi_ref"] = group.log_prior.mean() / group.prior_weight
    if group.weights is not None:
        metrics["effective_generations"] = effective_number(group.weights).mean()
    log_z, residual = group.residuals()
    return metrics | {"log_z": log_z.mean(), "residual": residual.mean()}


def print_group(
    group: Group, catalog: ItemCatalog, sources: Sequence[str], step: int, titles: Mapping[Item, str] | None = None
) -> None:
    """The first prompt's trajectories as a table, the best rewarded first.

    Args:
        group: of the step.
        catalog, sources: the items, and the names of the sampler's sources.
        step: the number of steps that are done.
        titles: of items, where they are known.
    """
    titles = titles or {}

    def named(item: Item) -> str:
        return escape(f"{item} ({titles[item]})" if item in titles else str(item))

    history, target = group.batch["history"][0], group.batch["target"][0]
    table = Table(title=f"Step {step}", caption=f"history: {', '.join(map(named, history))}\ntarget: {named(target)}")
    table.add_column("items", overflow="fold", min_width=16)
    table.add_column("semantic id", no_wrap=True)
    for heading in ("probability", "log pi", "log R", "reward"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("source", no_wrap=True)
    leaves, log_pi = group.trajectories.leaves[0], group.scores.trajectory_log_probs[0]
    order = (log_pi if group.rewards is None else group.rewards.log_rewards[0]).argsort(descending=True, stable=True)
    for place in order.tolist():
        leaf, rewarded = int(leaves[place]), ["", ""]
        if group.rewards is not None:
            rewarded = [f"{group.rewards.log_rewards[0, place]:.3f}", f"{group.rewards.rewards[0, place]:.4g}"]
        table.add_row(
            ", ".join(map(named, catalog.items_of(leaf))), catalog.leaf_text(leaf),
            f"{log_pi[place].exp():.3g}", f"{log_pi[place]:.3f}", *rewarded,
            sources[int(group.trajectories.source[0, place])],
        )  # fmt: skip
    Console(width=None if sys.stdout.isatty() else 160).print(table)
