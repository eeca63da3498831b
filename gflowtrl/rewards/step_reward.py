"""The rewards of one step, behind one protocol: of every leaf, of the best leaves, or of drawn leaves only."""

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
    """Rewards of some leaves, `n` per row: K trajectories, or all N leaves.

    Attributes:
        log_rewards: `(B, n)` float32, log R; with a prior, its share is included.
        rewards: `(B, n)`, the weighted sum before the transform.
        parts: each reward's own values, `(B, n)`, unweighted; NaN where a reward returned None.
        floored_mass: scalar tensor, the share of R that lies on leaves lifted to the floor, mean over the prompts;
            of all leaves where all are scored (then at most `floor` for beta = 1), else of the group's distinct ones.
        metrics: means of what reward functions reported with `log_metric`.
        extra: columns, B * K values each, reported with `log_extra`.
        log_prior: `(B, n)` the prior's share of log R, where there is a prior.
    """

    log_rewards: Tensor
    rewards: Tensor
    parts: dict[str, Tensor]
    floored_mass: Tensor
    metrics: dict[str, float] = field(default_factory=dict)
    extra: dict[str, list] = field(default_factory=dict)
    log_prior: Tensor | None = None

    def gather(self, leaves: Tensor) -> RewardResult:
        """The columns of `leaves (B, K)` of a result over all leaves."""
        return replace(
            self,
            log_rewards=self.log_rewards.gather(1, leaves),
            rewards=self.rewards.gather(1, leaves),
            parts={name: values.gather(1, leaves) for name, values in self.parts.items()},
            log_prior=None if self.log_prior is None else self.log_prior.gather(1, leaves),
        )

    def with_prior(self, log_prior: Tensor) -> RewardResult:
        """The same with `log_prior (B, n)` added to log R."""
        return replace(self, log_rewards=self.log_rewards + log_prior, log_prior=log_prior)


class StepReward(ABC):
    """R of one step's prompts."""

    why_drawn_only: str = "this object knows drawn leaves only"  # for errors, with the remedy

    @abstractmethod
    def score(self, leaves: Tensor, policy_log_probs: Tensor | None = None) -> RewardResult:
        """All that is known about the rewards of `leaves (B, K)`.

        Args:
            leaves: of each prompt.
            policy_log_probs: `(B, K)` log pi of these leaves under the policy in training, where it is known already:
                rewards that are the policy's own likelihood then cost nothing.
        """

    def log(self, leaves: Tensor, policy_log_probs: Tensor | None = None) -> Tensor:
        """log R of `leaves (B, K)`: `(B, K)` float32. Arguments as for `score`."""
        return self.score(leaves, policy_log_probs).log_rewards

    def log_flows(self, nodes: Tensor) -> Tensor:
        """log F of any nodes, the log of the sum of R over the leaves below: `(B, ...) -> (B, ...)`.

        -inf for node -1. The root's is log Z.

        Raises:
            ValueError: only drawn leaves are scored, so that no flow is known.
        """
        raise ValueError(f"The flows of nodes need the reward of every leaf, but {self.why_drawn_only}.")

    def sample(self, num_generations: int, noise: Noise, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
        """Draw in proportion to `R ** (1 / temperature)`, with replacement.

        Args:
            num_generations: K, draws per prompt.
            noise: of these rows.
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
        result: over all leaves, `(B, N)` each.
        tree: the leaves.
    """

    result: RewardResult
    tree: PrefixTree

    def with_prior(self, log_prior: Tensor) -> DenseReward:
        """R times a prior, `log_prior (B, N)`, in flows and draws too."""
        return DenseReward(self.result.with_prior(log_prior), self.tree)

    def score(self, leaves: Tensor, policy_log_probs: Tensor | None = None) -> RewardResult:
        return self.result.gather(leaves)

    @cached_property
    def _all_log_flows(self) -> Tensor:
        return self.tree.log_flows(self.result.log_rewards)

    def log_flows(self, nodes: Tensor) -> Tensor:
        flows = self._all_log_flows.gather(1, nodes.clamp(min=0).flatten(1)).view(nodes.shape)
        return flows.masked_fill(nodes < 0, -math.inf)

    def sample(self, num_generations: int, noise: Noise, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
        probabilities = torch.softmax(self.result.log_rewards / temperature, 1)
        return draw_leaves(probabilities, noise.uniform("reward", num_generations))


@dataclass(eq=False)
class TopKReward(StepReward):
    """R of every leaf where a table of all is too large: the k best leaves one by one, the rest alike.

    Z is that of the full reward, and so are R on the best leaves and whatever `score` says; only for flows and draws
    is the order among the other leaves lost.

    Attributes:
        leaves: `(B, k)` long, ascending.
        log_rewards: `(B, k)` log R of them.
        log_rest: `(B,)` log of the mean R of a leaf that is not among them; -inf where there is none.
        tree: the leaves.
        exact: gives the rewards of drawn leaves `(B, K)`.
    """

    leaves: Tensor
    log_rewards: Tensor
    log_rest: Tensor
    tree: PrefixTree
    exact: Callable[[Tensor], RewardResult]

    @classmethod
    def best_of(
        cls, tables: Iterable[Tensor], k: int, tree: PrefixTree, exact: Callable[[Tensor], RewardResult]
    ) -> TopKReward:
        """The k best leaves of each prompt by R.

        Args:
            tables: log R of all leaves, `(b, N)` for some of the prompts at a time, so that none is large.
            k: >= 1; at most N are kept.
            tree, exact: as for the class.
        """
        check_number("The number of top leaves", k, COUNT)
        leaves, log_rewards, log_rest = zip(*(_top_of(table, k) for table in tables), strict=True)
        return cls(torch.cat(leaves), torch.cat(log_rewards), torch.cat(log_rest), tree, exact)

    def score(self, leaves: Tensor, policy_log_probs: Tensor | None = None) -> RewardResult:
        return self.exact(leaves)

    def log_flows(self, nodes: Tensor) -> Tensor:
        # The leaves below a node are consecutive, so that their mass is a difference of two running sums.
        safe = nodes.clamp(min=0).flatten(1)
        start, count = self.tree.first_leaf[safe].long(), self.tree.leaf_count[safe].long()
        low, high = (torch.searchsorted(self.leaves, bound.contiguous()) for bound in (start, start + count))
        peak = self.log_rewards.amax(1, keepdim=True)
        # 64 bits: a small subtree is a small difference of large sums.
        sums = torch.nn.functional.pad((self.log_rewards - peak).double().exp().cumsum(1), (1, 0))
        best = (sums.gather(1, high) - sums.gather(1, low)).clamp(min=0)
        rest = (self.log_rest[:, None] - peak).double().exp() * (count - (high - low))
        flows = (best + rest).log().to(self.log_rewards.dtype) + peak
        return flows.view(nodes.shape).masked_fill(nodes < 0, -math.inf)

    def sample(self, num_generations: int, noise: Noise, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
        # The mass of the other leaves is one more entry after the best ones; a draw inside it says which of them.
        log_best, log_rest = self.log_rewards / temperature, self.log_rest[:, None] / temperature
        peak = log_best.amax(1, keepdim=True)
        best, each = (log_best - peak).double().exp(), (log_rest - peak).double().exp()
        size, others = best.shape[1], self.tree.num_leaves - best.shape[1]
        weights = torch.cat([best, each * others], 1)
        uniforms = noise.uniform("reward", num_generations).to(weights.device)
        choice = inverse_cdf(weights, uniforms)
        total = weights.sum(1, keepdim=True)
        number = ((uniforms * total - best.sum(1, keepdim=True)) / each).long().clamp(0, max(others - 1, 0))
        # The n-th leaf that is not among the best: n, and one more for every best leaf before it.
        gaps = self.leaves - torch.arange(size, device=self.leaves.device)
        other = number + torch.searchsorted(gaps, number, right=True)
        chosen = choice.clamp(max=size - 1)
        leaves = torch.where(choice < size, self.leaves.gather(1, chosen), other)
        log_r = torch.where(choice < size, log_best.gather(1, chosen), log_rest)
        return leaves, (log_r - peak).double().sub(total.log()).float()


@dataclass(eq=False)
class SampledReward(StepReward):
    """R of drawn leaves only: some reward cannot score all items, or a table of all would be too large.

    Attributes:
        score_drawn: gives the rewards of leaves `(B, K)`, from their log pi `(B, K)` too where a reward reads it.
        ask_policy: gives log pi of leaves `(B, K)`, where a reward reads it and nobody knows it yet.
        why_drawn_only: for errors, with the remedy.
    """

    score_drawn: Callable[[Tensor, Tensor | None], RewardResult]
    ask_policy: Callable[[Tensor], Tensor] | None = None
    why_drawn_only: str = "some reward scores drawn leaves only"

    def score(self, leaves: Tensor, policy_log_probs: Tensor | None = None) -> RewardResult:
        if policy_log_probs is None and self.ask_policy is not None:
            policy_log_probs = self.ask_policy(leaves)
        return self.score_drawn(leaves, policy_log_probs)


@dataclass(eq=False)
class PosteriorReward(StepReward):
    """Another reward times a prior, `log R + log prior`, where the prior is known of drawn leaves only.

    Draws leave the prior out. Each `score` of leaves computes their prior anew.

    Attributes:
        reward: R.
        log_prior: `(B, K)` leaves to the prior's share of log R, weighted already.
    """

    why_drawn_only = "with ref_weight the reference model scores drawn leaves only: add exact_flow to loss_type"
    reward: StepReward
    log_prior: Callable[[Tensor], Tensor]

    def score(self, leaves: Tensor, policy_log_probs: Tensor | None = None) -> RewardResult:
        return self.reward.score(leaves, policy_log_probs).with_prior(self.log_prior(leaves))

    def sample(self, num_generations: int, noise: Noise, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
        return self.reward.sample(num_generations, noise, temperature)


def draw_leaves(probabilities: Tensor, uniforms: Tensor) -> tuple[Tensor, Tensor]:
    """Draw leaves with replacement.

    Args:
        probabilities: `(B, N)`, >= 0, need not sum to one.
        uniforms: `(B, K)` in (0, 1).

    Returns:
        leaves `(B, K)` and their log-probabilities `(B, K)` float32.
    """
    leaves = inverse_cdf(probabilities, uniforms)
    total = probabilities.double().sum(1, keepdim=True)
    return leaves, (probabilities.double().gather(1, leaves) / total).log().float()


def _top_of(log_rewards: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    k = min(k, log_rewards.shape[1])
    leaves = log_rewards.topk(k, 1).indices.sort(1).values
    others = log_rewards.scatter(1, leaves, -math.inf).logsumexp(1) - math.log(max(log_rewards.shape[1] - k, 1))
    return leaves, log_rewards.gather(1, leaves), others
