"""Samplers that search with the policy in training."""

from __future__ import annotations

from gflowtrl.checks import POSITIVE, check_number
from gflowtrl.data import Step
from gflowtrl.policy import Noise, TreePolicy
from gflowtrl.rewards import StepReward

from .sampler import Sampler, Trajectories, fill_missing


class BeamSampler(Sampler):
    """The policy's K most probable leaves by beam search, best first: no chance in it, so `log_q` is 0.

    Nothing but the policy's favorites is ever learned from, so mix it with a source that reaches all leaves. Where
    the catalog has fewer than K leaves they are repeated.
    """

    source_names = ("beam",)

    def sample(
        self, step: Step, policy: TreePolicy, reward: StepReward | None, num_generations: int, noise: Noise
    ) -> Trajectories:
        leaves, log_probs = policy.beam_search(step.prompts, num_generations)
        return Trajectories.of_one_source(fill_missing(leaves)[0], log_probs.new_zeros(log_probs.shape))


class StochasticBeamSampler(Sampler):
    """K *distinct* leaves drawn from the policy without replacement, by stochastic beam search (Kool et al., 2019).

    Probable leaves are nearly always among them, and yet every leaf can come; what K draws with replacement waste on
    repetitions of the favorite goes to other leaves.

    `log_q` is the log-probability that a leaf is *in the sample*, given the search's threshold: the weight of a
    Horvitz-Thompson estimate (sum of f(leaf) pi(leaf) / exp(log_q)). It is not the probability of one draw: over all
    leaves it sums to about K, not to 1. Where the catalog has fewer than K leaves they are repeated.

    Args:
        temperature: > 0; divides the logits, so above 1 explores.
    """

    source_names = ("stochastic_beam",)

    def __init__(self, temperature: float = 1.0):
        check_number("The temperature of StochasticBeamSampler", temperature, POSITIVE)
        self.temperature = temperature

    def sample(
        self, step: Step, policy: TreePolicy, reward: StepReward | None, num_generations: int, noise: Noise
    ) -> Trajectories:
        beams = policy.stochastic_beam_search(step.prompts, num_generations, noise, temperature=self.temperature)
        return Trajectories.of_one_source(*fill_missing(beams.leaves, beams.log_inclusion))
