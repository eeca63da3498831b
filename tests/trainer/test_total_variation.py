"""A transformer trained with each objective reaches R / Z: the benchmark total_variation.py on a smaller tree.

The benchmark measures the policy's `leaf_log_probs`, which tests/policy compares with brute force.
"""

import pytest
import torch

from benchmarks.quality.total_variation import Problem, Setting, run
from gflowtrl.losses import LOSSES
from gflowtrl.metrics import total_variation


NUM_LEAVES, BOUND = 120, 0.03
# Contrastive balance is VarGrad except for Huber; subtrajectory balance is between the other two (tests/losses).
SETTINGS = [
    ("trajectory_balance", "llama", Setting(200, "mixture")),
    ("vargrad", "llama", Setting(200, "mixture")),
    ("detailed_balance", "llama", Setting(200, "mixture")),
    ("detailed_balance", "llama", Setting(200, "mixture", flows="known")),
    pytest.param("exact_flow", "llama", Setting(100, "reward"), marks=pytest.mark.slow),
    ("exact_flow", "t5", Setting(100, "reward")),
]


@pytest.mark.parametrize(("objective", "backbone", "setting"), SETTINGS)
def test_a_transformer_reaches_the_target_of_every_prompt(objective, backbone, setting):
    result = run(objective, seed=0, num_leaves=NUM_LEAVES, setting=setting, backbone=backbone)
    assert result["untrained"] >= 0.5
    assert result["trained"] <= BOUND
    if LOSSES[objective].needs_flow_heads and setting.flows == "learned":
        assert result["log_z_error"] <= 0.1


def test_the_bound_separates_the_target_from_similar_distributions():
    """A temperature that is 10% higher or lower, and a policy that ignores its prompt, are far above the bound."""
    log_rewards = Problem.draw(NUM_LEAVES, seed=0).reward.log_rewards.double()
    target = log_rewards.softmax(1)
    sharper, flatter = (1.1 * log_rewards).softmax(1), (0.9 * log_rewards).softmax(1)
    blind = target.mean(0).expand_as(target)
    distances = torch.stack([total_variation(wrong, target) for wrong in (sharper, flatter, blind)])
    assert distances.max(1).values.min() > 2 * BOUND
