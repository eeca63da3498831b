"""`flows="known"`: log Z and log F from the rewards, compared with brute force over all leaves."""

import math
from dataclasses import replace

import pytest
import torch

from gflowtrl.policy import make_policy
from gflowtrl.rewards import CollaborativeReward, GroundTruthReward

from .test_step import (
    CATALOG,
    FLOOR,
    LEAVES,
    PATHS,
    WEIGHTS,
    first_batch,
    first_step,
    fixed_leaves,
    rewards,
    sub_path_mean,
    true_rewards,
)
from .world import make_trainer, teacher


BALANCE = ["trajectory_balance", "detailed_balance", "subtrajectory_balance"]


def residuals_with_true_flows(pi: torch.Tensor, reward: torch.Tensor, leaf: int) -> list[float]:
    """Residuals of detailed balance on the path to `leaf`, where F of a state is the sum of R below it."""
    path = PATHS[leaf]
    below = [[i for i in range(LEAVES) if PATHS[i][:depth] == path[:depth]] for depth in range(len(path) + 1)]
    flow, mass = ([float(x[inside].sum()) for inside in below] for x in (reward, pi))
    steps = range(len(path))
    return [math.log(flow[d]) + math.log(mass[d + 1] / mass[d]) - math.log(flow[d + 1]) for d in steps]


def make_known(tmp_path, name: str, **options):
    options = {"reward_weights": WEIGHTS, "reward_floor": FLOOR, "sampler": fixed_leaves} | options
    return make_trainer(tmp_path, rewards(), loss_type=name, flows="known", **options)


@pytest.mark.parametrize("name", BALANCE)
def test_a_step_equals_brute_force_and_the_model_has_no_head(name, tmp_path):
    trainer = make_known(tmp_path, name)
    assert not any("flow" in key or "log_z" in key for key in trainer.model.state_dict())
    step = first_step(trainer)
    log_pi = make_policy(trainer.model, CATALOG).leaf_log_probs(step.prompts).double()
    leaves, reward = fixed_leaves(step, None, None, 4, None), true_rewards(step).double()
    paths = [
        residuals_with_true_flows(pi, r, leaf)
        for pi, r, row in zip(log_pi.exp(), reward, leaves.tolist(), strict=True)
        for leaf in row
    ]
    of_path = {
        "trajectory_balance": lambda path: sum(path) ** 2,
        "detailed_balance": lambda path: sum(r**2 for r in path),
        "subtrajectory_balance": sub_path_mean,
    }[name]
    expected = sum(map(of_path, paths)) / len(paths)
    assert trainer.compute_loss(trainer.model, first_batch(trainer)).item() == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("name", BALANCE)
def test_loss_and_gradient_are_zero_at_the_target_distribution(name, tmp_path):
    """With pi = R / Z at every state, nothing is left to learn. Without a known Z, an offset of the head would be."""
    trainer = make_known(tmp_path, name)
    score = trainer._score

    def score_of_target(step, policy, drawn):
        leaves, scores = score(step, policy, drawn)
        flows = CATALOG.tree.log_flows(true_rewards(step).double().log())
        nodes = CATALOG.tree.walk(leaves)
        values = flows.gather(1, nodes.clamp(min=0).flatten(1)).view(nodes.shape)
        exact = (values[..., 1:] - values[..., :-1]).masked_fill(nodes[..., 1:] < 0, 0.0).float()
        return leaves, replace(scores, log_probs=exact + scores.log_probs - scores.log_probs.detach())

    trainer._score = score_of_target
    loss = trainer.compute_loss(trainer.model, first_batch(trainer))
    loss.backward()
    assert loss.item() < 1e-8
    assert max(p.grad.abs().max() for p in trainer.model.parameters() if p.grad is not None) < 1e-4


@pytest.mark.filterwarnings("ignore:.*would need a table")
@pytest.mark.parametrize("name", ["detailed_balance", "subtrajectory_balance"])
def test_flows_of_the_best_leaves_fit_together(name, tmp_path):
    """If only the best leaves keep their own flow, some policy still balances every step: that of these flows."""
    trainer = make_known(tmp_path, name, max_exact_elements=100, exact_top_items=5)
    score = trainer._score

    def score_of_target(step, policy, drawn):
        leaves, scores = score(step, policy, drawn)
        nodes = CATALOG.tree.walk(leaves)
        values = trainer.rewards.of(step, policy).log_flows(nodes)
        exact = (values[..., 1:] - values[..., :-1]).masked_fill(nodes[..., 1:] < 0, 0.0)
        return leaves, replace(scores, log_probs=exact)

    trainer._score = score_of_target
    assert trainer.compute_loss(trainer.model, first_batch(trainer)).item() < 1e-8


def test_too_large_a_table_keeps_the_best_leaves(tmp_path):
    with pytest.warns(UserWarning, match="detailed_balance with known flows would need a table of 8 prompts x 23"):
        trainer = make_known(tmp_path, "detailed_balance", max_exact_elements=100, exact_top_items=5)
    trainer.train()
    assert all(math.isfinite(entry["loss"]) for entry in trainer.state.log_history if "loss" in entry)


def test_what_cannot_work_is_refused(tmp_path):
    def no_items(completions, **columns):
        return [1.0] * len(completions)

    with pytest.raises(ValueError, match=r"trajectory_balance with known flows needs the reward of every leaf.*no_i"):
        make_trainer(tmp_path, [GroundTruthReward(), no_items], loss_type="trajectory_balance", flows="known")
    with pytest.raises(ValueError, match=r"flows is 'known', but no loss of \['vargrad'\] has a learned flow"):
        make_trainer(tmp_path, [CollaborativeReward(teacher)], loss_type="vargrad", flows="known")
    with pytest.raises(ValueError, match="flows is 'known', but log Z of the loss 'flowrl' is not the sum"):
        make_trainer(tmp_path, [CollaborativeReward(teacher)], loss_type="flowrl", flows="known")
    with pytest.raises(ValueError, match="loss_type has 'flowrl' and 'trajectory_balance', which learn different val"):
        make_trainer(tmp_path, [CollaborativeReward(teacher)], loss_type=["trajectory_balance", "flowrl"])
    with pytest.raises(ValueError, match="flows is 'exact'"):
        make_trainer(tmp_path, [CollaborativeReward(teacher)], loss_type="trajectory_balance", flows="exact")
