"""Weights of trajectories: their values, and what they change and do not change."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig

from gflowtrl.data import Step
from gflowtrl.losses import LOSSES, LossInputs, contrastive_balance, trajectory_balance, vargrad
from gflowtrl.policy import make_policy
from gflowtrl.samplers import Sampler, Trajectories
from gflowtrl.trainer.weighting import effective_number, source_table, weights_by_reward, weights_by_source
from tests.losses.tabular import TabularPolicy, random_tree
from tests.tiny import tiny_model

from .test_step import CATALOG, first_batch, fixed_leaves, rewards, true_rewards
from .world import TOKENIZER, make_trainer


SOURCES = torch.tensor([0, 1, 1, 2])


class ThreeSources(Sampler):
    """Fixed leaves from the sources a, b, b and c."""

    source_names = ("a", "b", "c")

    def sample(self, step, policy, reward, num_generations, noise):
        leaves = fixed_leaves(step, policy, reward, num_generations, noise)
        return Trajectories(leaves, SOURCES.expand_as(leaves))


def test_by_source_by_hand():
    table = source_table({"b": 3.0, "a": 1.0}, ("a", "b", "c"))
    assert table.tolist() == [1.0, 3.0, 1.0]
    weights = weights_by_source(table, torch.tensor([[0, 1, 1, 2], [1, 1, 1, 1]]))
    assert weights.tolist() == [[0.5, 1.5, 1.5, 0.5], [1.0, 1.0, 1.0, 1.0]]


def test_by_reward_by_hand():
    weights = weights_by_reward(torch.tensor([[1.0, 2.0, 5.0], [7.0, 7.0, 7.0]]).log())
    torch.testing.assert_close(weights, torch.tensor([[0.375, 0.75, 1.875], [1.0, 1.0, 1.0]]))
    torch.testing.assert_close(effective_number(weights), torch.tensor([64 / 30, 3.0]))


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 6), st.floats(-20, 20))
def test_weights_are_positive_with_mean_one_and_independent_of_the_scale(seed, count, shift):
    generator = torch.Generator().manual_seed(seed)
    log_rewards = 3 * torch.randn(2, count, dtype=torch.double, generator=generator)
    source = torch.randint(3, (2, count), generator=generator)
    table = torch.rand(3, generator=generator, dtype=torch.double) + 0.01
    for weights in (weights_by_reward(log_rewards), weights_by_source(table, source)):
        assert (weights > 0).all()
        assert weights.mean(1).allclose(torch.ones(2, dtype=torch.double))
        assert (effective_number(weights) >= 1 - 1e-9).all() and (effective_number(weights) <= count + 1e-9).all()
    assert weights_by_reward(log_rewards + shift).allclose(weights_by_reward(log_rewards))
    assert weights_by_source(7 * table, source).allclose(weights_by_source(table, source))


@pytest.mark.parametrize("name", [name for name in LOSSES if LOSSES[name].needs_log_rewards])
def test_weights_keep_the_fixed_point(name):
    tree = random_tree(0)
    generator = torch.Generator().manual_seed(0)
    log_rewards = 2 * torch.randn(2, tree.num_leaves, dtype=torch.double, generator=generator)
    flows = tree.log_flows(log_rewards)
    policy = TabularPolicy(tree, flows.clone().requires_grad_())
    leaves = torch.randint(tree.num_leaves, (2, 6), generator=generator)
    inputs = LossInputs(**policy.score(leaves, flows), log_z=flows[:, 0])
    loss = (weights_by_reward(log_rewards.gather(1, leaves)) * LOSSES[name](inputs)).sum()
    assert torch.autograd.grad(loss, policy.logits)[0].abs().max() < 1e-12


def test_away_from_it_weighted_vargrad_moves_all_trajectories_together():
    """As in docs/objectives.md: the gradient is that of the weighted variance and, because the mean in vargrad is
    unweighted, `2 (weighted mean - mean)` times that of the weighted mean of log pi."""
    generator = torch.Generator().manual_seed(3)
    surplus = torch.randn(1, 5, 1, dtype=torch.double, generator=generator).requires_grad_()
    log_rewards = 2 * torch.randn(1, 5, dtype=torch.double, generator=generator)
    weights = weights_by_reward(log_rewards)
    (ours,) = torch.autograd.grad((weights * vargrad(surplus, log_rewards)).mean(), surplus)
    s = surplus[0, :, 0] - log_rewards[0]
    share = weights[0] / weights.sum()
    mean = (share * s).sum()
    variance = (share * (s - mean).square()).sum()
    (spread,) = torch.autograd.grad(variance, surplus, retain_graph=True)
    (level,) = torch.autograd.grad((share * surplus[0, :, 0]).sum(), surplus)
    together = 2 * (mean - s.mean()).detach()
    assert together.abs() > 0.1
    assert ours.allclose(spread + together * level)


def test_the_weight_of_a_pair_is_the_mean_of_its_trajectories():
    """In contrastive balance, trajectory weights w give the pair i, j the weight (w_i + w_j) / 2."""
    generator = torch.Generator().manual_seed(4)
    log_probs, log_rewards = torch.randn(1, 4, 2, generator=generator), torch.randn(1, 4, generator=generator)
    weights = weights_by_reward(log_rewards)
    loss = (weights * contrastive_balance(log_probs, log_rewards, None)).mean()
    s, w = (log_probs.sum(-1) - log_rewards)[0].tolist(), weights[0].tolist()
    pairs = [(w[i] + w[j]) / 2 * (s[i] - s[j]) ** 2 for i in range(4) for j in range(i)]
    assert loss.item() == pytest.approx(sum(pairs) / len(pairs), rel=1e-5)


# ------------------------------------------------------------------------------------------------------ in the trainer
@pytest.mark.parametrize("weighting", ["source", "reward"])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_the_trainer_weights_balance_losses_and_not_sft(tmp_path, weighting, reduction):
    options = {"trajectory_weighting": weighting, "source_weights": {"b": 4} if weighting == "source" else None}
    options |= {"loss_reduction": reduction, "loss_type": "sft,trajectory_balance", "log_completions": True}
    trainer = make_trainer(tmp_path, rewards(), sampler=ThreeSources(), reward_weights=[0.7, 0.3], **options)
    batch = first_batch(trainer)
    loss = trainer.compute_loss(trainer.model, batch).item()
    group = trainer._last_group
    leaves, scores = group.drawn.leaves, group.scores
    step = Step.from_batch(batch, CATALOG)
    log_rewards = true_rewards(step).log().gather(1, leaves)
    share = torch.tensor([1.0, 4.0, 4.0, 1.0]) / 10 if weighting == "source" else log_rewards.softmax(1)
    each = trajectory_balance(scores.log_probs, log_rewards, scores.log_z)
    balance = (share * each).sum(1).mean() * (4 if reduction == "sum" else 1)
    target = CATALOG.leaf_of(step.columns["target"])[:, None]
    sft = -make_policy(trainer.model, CATALOG).leaf_log_probs(step.prompts).gather(1, target).mean()
    assert loss == pytest.approx((sft + balance).item(), rel=1e-4)
    assert not torch.allclose(share.expand_as(each), torch.full_like(each, 0.25))


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_a_loss_with_one_value_per_prompt_has_no_weights(tmp_path, reduction):
    """IPA's loss stays the same next to a weighted one."""
    found = []
    for weighting in (None, "reward"):
        options = {"trajectory_weighting": weighting, "loss_reduction": reduction, "loss_type": "ipa,vargrad"}
        trainer = make_trainer(tmp_path, rewards(), sampler=ThreeSources(), **options)
        trainer.compute_loss(trainer.model, first_batch(trainer))
        found.append({name: float(trainer._metric_sums[f"loss/{name}"][0]) for name in ("ipa", "vargrad")})
    assert found[0]["ipa"] == found[1]["ipa"] > 0.1
    assert found[0]["vargrad"] != pytest.approx(found[1]["vargrad"], rel=1e-2)


def test_the_effective_number_is_logged(tmp_path):
    weighted = {"trajectory_weighting": "source", "source_weights": {"b": 4}}
    trainer = make_trainer(tmp_path, rewards(), sampler=ThreeSources(), max_steps=1, **weighted)
    trainer.train()
    assert trainer.state.log_history[0]["effective_generations"] == pytest.approx(100 / 34)


def test_an_error_in_source_weights_does_not_change_the_model(tmp_path):
    """It is raised before adapters or heads are added, so the model can be used again."""
    model = tiny_model(len(TOKENIZER))
    before = [name for name, _ in model.named_parameters()]
    options = {"trajectory_weighting": "source", "source_weights": {"on_polcy": 2.0}, "peft_config": LoraConfig()}
    with pytest.raises(ValueError, match="source_weights names 'on_polcy'"):
        make_trainer(tmp_path, rewards(), model, loss_type="trajectory_balance", **options)
    assert [name for name, _ in model.named_parameters()] == before
