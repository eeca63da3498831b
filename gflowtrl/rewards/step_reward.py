"""The rewards of one step, with one interface for all leaves, the best leaves, or drawn leaves only."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch
from torch import Tensor

from gflowtrl.catalog import PrefixTree
from gflowtrl.checks import COUNT, check_number
from gflowtrl.policy import Noise, inverse_cdf


@dataclass(frozen=True)
class RewardResult:
    """Rewards of `n` leaves per row: K trajectories, or all N leaves.

    Attributes:
        log_rewards: `(B, n)` float32, log R, including the prior if there is one.
        rewards: `(B, n)`, the weighted sum before the transform. Excluded leaves have 0 with "power", and the least
            reward of the row's other leaves with "exp".
        parts: the unweighted values of each reward, `(B, n)`; NaN where a reward returned None.
        floored_mass: scalar tensor, the share of R on leaves that were raised to the floor, averaged over the prompts.
            It covers all leaves if all are scored (it is then at most `floor` for beta = 1), and otherwise the
            distinct leaves of the group.
        metrics: means of the values that reward functions reported with `log_metric`.
        extra: columns of B * K values that reward functions reported with `log_extra`.
        log_prior: `(B, n)`, the part of log R that comes from the prior; None without a prior.
        excluded: bool `(B, n)`, leaves without reward because of `exclude_history`; None if it is off.
    """

    log_rewards: Tensor
    rewards: Tensor
    parts: dict[str, Tensor]
    floored_mass: Tensor
    metrics: dict[str, float] = field(default_factory=dict)
    extra: dict[str, list] = field(default_factory=dict)
    log_prior: Tensor | None = None
    excluded: Tensor | None = None

    def gather(self, leaves: Tensor) -> RewardResult:
        """Select `leaves (B, K)` from a result for all leaves."""
        return replace(
            self,
            log_rewards=self.log_rewards.gather(1, leaves),
            rewards=self.rewards.gather(1, leaves),
            parts={name: values.gather(1, leaves) for name, values in self.parts.items()},
            log_prior=None if self.log_prior is None else self.log_prior.gather(1, leaves),
            excluded=None if self.excluded is None else self.excluded.gather(1, leaves),
        )

    def with_prior(self, log_prior: Tensor) -> RewardResult:
        """Return a copy with `log_prior (B, n)` added to log R."""
        return replace(self, log_rewards=self.log_rewards + log_prior, log_prior=log_prior)


class StepReward(ABC):
    """R of one step's prompts.

    Attributes:
        why_drawn_only: the reason why only drawn leaves are scored, and the remedy, for errors.
        excluded_leaves: `(B, W)` leaves without reward because of `exclude_history`, which samplers do not draw:
            distinct, ascending, padded with -1; None if it is off.
    """

    why_drawn_only: str = "only drawn leaves are scored"
    excluded_leaves: Tensor | None = None

    @abstractmethod
    def score(self, leaves: Tensor, policy_log_probs: Tensor | None = None) -> RewardResult:
        """Return the rewards of `leaves (B, K)`.

        Args:
            leaves: leaves of each prompt.
            policy_log_probs: `(B, K)` log pi of these leaves under the policy in training, if it is known already.
                Rewards that read the policy's likelihood then need no forward pass.
        """

    def log(self, leaves: Tensor, policy_log_probs: Tensor | None = None) -> Tensor:
        """Return log R of `leaves (B, K)`: `(B, K)` float32. The arguments are those of `score`."""
        return self.score(leaves, policy_log_probs).log_rewards

    def log_flows(self, nodes: Tensor) -> Tensor:
        """Return log F of nodes, the log of the sum of R over the leaves below each: `(B, ...) -> (B, ...)`.

        Node -1 gets -inf. The value of the root is log Z.

        Raises:
            ValueError: only drawn leaves are scored, so that flows are unknown.
        """
        raise ValueError(f"The flows of nodes need the reward of every leaf, but {self.why_drawn_only}.")

    def sample(self, num_generations: int, noise: Noise, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
        """Draw leaves in proportion to `R ** (1 / temperature)`, with replacement.

        Args:
            num_generations: K, draws per prompt.
            noise: noise of these rows.
            temperature: > 0.

        Returns:
            leaves `(B, K)` and their log-probabilities `(B, K)` float32.

        Raises:
            ValueError: only drawn leaves are scored.
        """
        raise ValueError(
            f"RewardSampler needs the rewards of all leaves, but {self.why_drawn_only}. Or choose another sampler."
        )


@dataclass(eq=False)
class DenseReward(StepReward):
    """R of every leaf.

    Attributes:
        result: rewards of all leaves, `(B, N)`.
        tree: the prefix tree.
        excluded_leaves: see `StepReward`.
    """

    result: RewardResult
    tree: PrefixTree
    excluded_leaves: Tensor | None = None

    def with_prior(self, log_prior: Tensor) -> DenseReward:
        """Return R times a prior, `log_prior (B, N)`. Flows and draws include the prior."""
        return replace(self, result=self.result.with_prior(log_prior))

    def score(self, leaves: Tensor, policy_log_probs: Tensor | None = None) -> RewardResult:
        return self.result.gather(leaves)

    @cached_property
    def _all_log_flows(self) -> Tensor:
        return self.tree.log_flows(self.result.log_rewards)

    def log_flows(self, nodes: Tensor) -> Tensor:
        flows = self._all_log_flows.gather(1, nodes.clamp(min=0).flatten(1)).view(nodes.shape)
        return flows.masked_fill(nodes < 0, -math.inf)

    def sample(self, num_generations: int, noise: Noise, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
        log_rewards = self.result.log_rewards
        if self.result.excluded is not None:  # they have the floor
            log_rewards = log_rewards.masked_fill(self.result.excluded, -math.inf)
        probabilities = torch.softmax(log_rewards if temperature == 1 else log_rewards / temperature, 1)
        return draw_leaves(probabilities, noise.uniform("reward", num_generations))


@dataclass(eq=False)
class TopKReward(StepReward):
    """R of every leaf if the full table is too large: exact for the k best leaves, the mean for all other leaves.

    Z, R of the best leaves and the results of `score` are exact. Only flows and draws lose the differences between
    the other leaves. With `exclude_history` a seen leaf is one of the others, so that a draw may find it.

    Attributes:
        leaves: `(B, k)` long, the best leaves in ascending order.
        log_rewards: `(B, k)`, log R of the best leaves.
        log_rest: `(B,)`, log of the mean R of the other leaves; -inf if there are no others.
        tree: the prefix tree.
        exact: function that returns the exact rewards of drawn leaves `(B, K)`.
        excluded_leaves: see `StepReward`.
    """

    leaves: Tensor
    log_rewards: Tensor
    log_rest: Tensor
    tree: PrefixTree
    exact: Callable[[Tensor], RewardResult]
    excluded_leaves: Tensor | None = None

    @classmethod
    def best_of(
        cls,
        tables: Iterable[Tensor],
        k: int,
        tree: PrefixTree,
        exact: Callable[[Tensor], RewardResult],
        excluded_leaves: Tensor | None = None,
    ) -> TopKReward:
        """Find the k leaves of each prompt with the largest R.

        Args:
            tables: log R of all leaves, `(b, N)` for b of the prompts at a time, so that no table is large.
            k: >= 1; at most N leaves are kept.
            tree, exact, excluded_leaves: as for the class.
        """
        check_number("The number of top leaves", k, COUNT)
        leaves, log_rewards, log_rest = zip(*(_top_of(table, k) for table in tables), strict=True)
        return cls(torch.cat(leaves), torch.cat(log_rewards), torch.cat(log_rest), tree, exact, excluded_leaves)

    def score(self, leaves: Tensor, policy_log_probs: Tensor | None = None) -> RewardResult:
        return self.exact(leaves)

    def log_flows(self, nodes: Tensor) -> Tensor:
        # The leaves below a node are consecutive, so their mass is the difference of two cumulative sums.
        flat = nodes.clamp(min=0).flatten(1)
        start, count = self.tree.first_leaf[flat].long(), self.tree.leaf_count[flat].long()
        low, high = (torch.searchsorted(self.leaves, bound.contiguous()) for bound in (start, start + count))
        peak = self.log_rewards.amax(1, keepdim=True)
        # In 64 bits, because the mass of a small subtree is a small difference of large sums.
        sums = torch.nn.functional.pad((self.log_rewards - peak).double().exp().cumsum(1), (1, 0))
        best = (sums.gather(1, high) - sums.gather(1, low)).clamp(min=0)
        rest = (self.log_rest[:, None] - peak).double().exp() * (count - (high - low))
        flows = (best + rest).log().to(self.log_rewards.dtype) + peak
        return flows.view(nodes.shape).masked_fill(nodes < 0, -math.inf)

    def sample(self, num_generations: int, noise: Noise, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
        # One more entry after the best leaves holds the mass of the others; the position inside it selects the leaf.
        log_best, log_rest = self.log_rewards / temperature, self.log_rest[:, None] / temperature
        peak = log_best.amax(1, keepdim=True)
        best, rest = (log_best - peak).double().exp(), (log_rest - peak).double().exp()
        size, num_rest = best.shape[1], self.tree.num_leaves - best.shape[1]
        weights = torch.cat([best, rest * num_rest], 1)
        uniforms = noise.uniform("reward", num_generations).to(weights.device)
        choice = inverse_cdf(weights, uniforms)
        total = weights.sum(1, keepdim=True)
        rank = ((uniforms * total - best.sum(1, keepdim=True)) / rest).long().clamp(0, max(num_rest - 1, 0))
        # The leaf of rank n among the others is n plus the number of best leaves before it.
        gaps = self.leaves - torch.arange(size, device=self.leaves.device)
        other = rank + torch.searchsorted(gaps, rank, right=True)
        chosen = choice.clamp(max=size - 1)
        leaves = torch.where(choice < size, self.leaves.gather(1, chosen), other)
        log_r = torch.where(choice < size, log_best.gather(1, chosen), log_rest)
        return leaves, (log_r - peak).double().sub(total.log()).float()


@dataclass(eq=False)
class SampledReward(StepReward):
    """R of drawn leaves only, because a reward cannot score all items or the table of all leaves would be too large.

    Attributes:
        score_drawn: returns the rewards of leaves `(B, K)`, given the leaves and their log pi `(B, K)` or None.
        ask_policy: returns log pi of leaves `(B, K)`. Called if a reward reads log pi and it is not known yet.
        why_drawn_only, excluded_leaves: see `StepReward`.
    """

    score_drawn: Callable[[Tensor, Tensor | None], RewardResult]
    ask_policy: Callable[[Tensor], Tensor] | None = None
    why_drawn_only: str = "a reward scores drawn leaves only"
    excluded_leaves: Tensor | None = None

    def score(self, leaves: Tensor, policy_log_probs: Tensor | None = None) -> RewardResult:
        if policy_log_probs is None and self.ask_policy is not None:
            policy_log_probs = self.ask_policy(leaves)
        return self.score_drawn(leaves, policy_log_probs)


@dataclass(eq=False)
class PosteriorReward(StepReward):
    """A reward times a prior, `log R + log prior`, if the prior is known for drawn leaves only.

    Draws ignore the prior. Each call of `score` computes the prior again.

    Attributes:
        reward: R.
        log_prior: function from leaves `(B, K)` to the weighted log prior `(B, K)`.
    """

    why_drawn_only = "with ref_weight the reference model scores drawn leaves only: add exact_flow to loss_type"
    reward: StepReward
    log_prior: Callable[[Tensor], Tensor]

    @property
    def excluded_leaves(self) -> Tensor | None:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.reward.excluded_leaves

    def score(self, leaves: Tensor, policy_log_probs: Tensor | None = None) -> RewardResult:
        return self.reward.score(leaves, policy_log_probs).with_prior(self.log_prior(leaves))

    def sample(self, num_generations: int, noise: Noise, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
        return self.reward.sample(num_generations, noise, temperature)


def draw_leaves(probabilities: Tensor, uniforms: Tensor) -> tuple[Tensor, Tensor]:
    """Draw leaves with replacement.

    Args:
        probabilities: `(B, N)`, >= 0; they do not have to sum to one.
        uniforms: `(B, K)` in (0, 1).

    Returns:
        leaves `(B, K)` and their log-probabilities `(B, K)` float32.
    """
    leaves = inverse_cdf(probabilities, uniforms)
    total = probabilities.sum(1, keepdim=True, dtype=torch.double)
    return leaves, (probabilities.gather(1, leaves).double() / total).log().float()


def _top_of(log_rewards: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return the k best leaves in ascending order, their log R, and the log of the mean R of the other leaves."""
    k = min(k, log_rewards.shape[1])
    leaves = log_rewards.topk(k, 1).indices.sort(1).values
    others = log_rewards.scatter(1, leaves, -math.inf).logsumexp(1) - math.log(max(log_rewards.shape[1] - k, 1))
    return leaves, log_rewards.gather(1, leaves), others
