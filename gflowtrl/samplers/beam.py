"""Samplers that use beam search with the policy in training."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Self

from gflowtrl.checks import POSITIVE, check_number
from gflowtrl.data import Step
from gflowtrl.policy import Noise, TreePolicy
from gflowtrl.rewards import StepReward

from .sampler import Sampler, Trajectories, fill_missing


class BeamSampler(Sampler):
    """The K most probable leaves of the policy by beam search, best first. The search is deterministic: `log_q` is 0.

    On its own, this sampler trains only on leaves that the policy already prefers, so combine it with a source that
    reaches all leaves. If the catalog has fewer than K leaves, they are repeated.
    """

    source_names = ("beam",)

    def sample(
        self, step: Step, policy: TreePolicy, reward: StepReward | None, num_generations: int, noise: Noise
    ) -> Trajectories:
        leaves, log_probs = policy.beam_search(step.prompts, num_generations)
        return Trajectories.of_one_source(fill_missing(leaves)[0], log_probs.new_zeros(log_probs.shape))


class StochasticBeamSampler(Sampler):
    """K *distinct* leaves drawn from the policy without replacement, by stochastic beam search (Kool et al., 2019).

    Probable leaves are almost always in the sample, but every leaf can be drawn. No draws are spent on repetitions of
    the most probable leaf, as in K draws with replacement.

    `log_q` is the log-probability that a leaf is *in the sample*, given the threshold of the search. It is the weight
    of a Horvitz-Thompson estimate (sum of f(leaf) pi(leaf) / exp(log_q)). It is not the probability of a single draw:
    the sum over all leaves is about K, not 1. If the catalog has fewer than K leaves, they are repeated.

    Args:
        temperature: > 0; divides the logits, so values above 1 explore.
    """

    source_names = ("stochastic_beam",)

    def __init__(self, temperature: float = 1.0):
        check_number("The temperature of StochasticBeamSampler", temperature, POSITIVE)
        self.temperature = temperature

    @classmethod
    def from_spec(cls, spec: Mapping[str, Any], context: Mapping[str, Any]) -> Self:
        return cls(**{"temperature": context["temperature"], **spec})

    def sample(
        self, step: Step, policy: TreePolicy, reward: StepReward | None, num_generations: int, noise: Noise
    ) -> Trajectories:
        beams = policy.stochastic_beam_search(step.prompts, num_generations, noise, temperature=self.temperature)
        return Trajectories.of_one_source(*fill_missing(beams.leaves, beams.log_inclusion))
