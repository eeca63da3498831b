"""The reference model as a prior: the balanced target, its computation, and that it never changes."""

import copy

import pytest
import torch
from peft import LoraConfig

from gflowtrl import CausalTreePolicy
from gflowtrl.data import Step
from gflowtrl.losses import LOSSES
from gflowtrl.policy import Noise, StatelessNoise
from gflowtrl.rewards import CollaborativeReward, GroundTruthReward, Reward
from tests.tiny import tiny_model, tiny_seq2seq

from .test_step import CATALOG, LEAVES, first_batch, first_step, fixed_leaves, rewards
from .world import TOKENIZER, make_trainer, teacher, weights


WEIGHT = 0.7
LORA = {"r": 2, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"}


def leaf_log_probs(model, step: Step) -> torch.Tensor:
    return CausalTreePolicy(model.eval(), CATALOG).leaf_log_probs(step.prompts)


def fixed_noise(step: Step) -> Noise:
    return StatelessNoise(0).at(0, step.row_ids)


class PerLeaf(Reward):
    """A custom reward of every leaf, from a function of the prompts; items of a leaf share it."""

    def __init__(self, function):
        super().__init__("per_leaf")
        self.function = function

    def score_items(self, step):
        return self.function(step)[:, self.catalog.item_leaf]


def noisy(model):
    """Dropout, which is visible if the reference is not in evaluation mode."""
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.3
    return model


@pytest.mark.parametrize("loss_type", ["vargrad", "contrastive_balance", "trajectory_balance", "exact_flow"])
def test_the_prior_times_the_reward_is_the_fixed_point(tmp_path, loss_type):
    """With log R = log pi - weight * log pi_ref + c the policy equals the target: loss and gradient are zero."""
    model, ref_model = tiny_model(len(TOKENIZER)), tiny_model(len(TOKENIZER), seed=1)
    frozen = copy.deepcopy(model)
    reward = PerLeaf(lambda step: leaf_log_probs(frozen, step) - WEIGHT * leaf_log_probs(ref_model, step) + 1.5)
    options = {"loss_type": loss_type, "reward_transform": "exp", "leaf_reduction": "max", "sampler": fixed_leaves}
    trainer = make_trainer(tmp_path, reward, model, ref_model=ref_model, ref_weight=WEIGHT, **options)
    if LOSSES[loss_type].needs_flow_heads:
        torch.nn.init.constant_(trainer.model.flow_heads.outer.bias, 1.5)
    loss = trainer.compute_loss(trainer.model, first_batch(trainer))
    assert abs(loss.item()) < 1e-6
    loss.backward()
    assert max(p.grad.abs().max() for p in trainer.model.parameters() if p.grad is not None) < 1e-3
    blind = make_trainer(tmp_path, reward, tiny_model(len(TOKENIZER)), **options)
    assert blind.compute_loss(blind.model, first_batch(blind)).item() > 0.1


@pytest.mark.parametrize("loss_type", ["vargrad", "exact_flow"])
def test_the_prior_changes_log_r_by_log_pi_ref_alone(tmp_path, loss_type):
    ref_model = noisy(tiny_model(len(TOKENIZER), seed=1)).train()
    make = {"loss_type": loss_type, "sampler": fixed_leaves, "log_completions": True}
    plain = make_trainer(tmp_path, rewards(), **make)
    prior = make_trainer(tmp_path, rewards(), ref_model=ref_model, ref_weight=WEIGHT, **make)
    batch = first_batch(plain)
    groups = []
    for trainer in (plain, prior):
        trainer.compute_loss(trainer.model, batch)
        groups.append(trainer._last_group)
    log_ref = leaf_log_probs(ref_model, groups[0].step)
    leaves = groups[0].drawn.leaves
    change = groups[1].rewards.log_rewards - groups[0].rewards.log_rewards
    torch.testing.assert_close(change, WEIGHT * log_ref.gather(1, leaves), rtol=0, atol=1e-4)
    assert torch.equal(groups[1].rewards.rewards, groups[0].rewards.rewards)  # the reward itself does not change
    if loss_type == "exact_flow":  # the prior of every leaf, so that the flows are those of the target
        change = groups[1].reward.result.log_rewards - groups[0].reward.result.log_rewards
        torch.testing.assert_close(change, WEIGHT * log_ref, rtol=0, atol=1e-4)
    else:  # a reward sampler draws from R alone
        first, second = (group.reward.sample(1000, fixed_noise(group.step), temperature=5.0) for group in groups)
        assert all(torch.equal(*pair) for pair in zip(first, second, strict=True))
        assert all(len(row.unique()) == LEAVES for row in first[0])


def test_the_default_reference_is_the_model_before_training_and_never_changes(tmp_path):
    model = noisy(tiny_model(len(TOKENIZER)))
    start = copy.deepcopy(model.state_dict())
    trainer = make_trainer(
        tmp_path, [GroundTruthReward(), CollaborativeReward(teacher)], model, ref_weight=1.0,
        loss_type="sft,trajectory_balance",
    )  # fmt: skip
    reference = trainer.prior.model
    trainer.train()
    assert not any(torch.equal(value, start[name]) for name, value in weights(trainer).items() if name in start)
    assert set(reference.state_dict()) == set(start)  # it has no head and no adapters
    assert all(torch.equal(value, start[name]) for name, value in reference.state_dict().items())
    assert not reference.training and trainer.model.training
    assert all(p.grad is None and not p.requires_grad for p in reference.parameters())
    own = {id(p) for p in reference.parameters()}
    assert not own & {id(p) for group in trainer.optimizer.param_groups for p in group["params"]}
    log = next(log for log in trainer.state.log_history if "loss" in log)
    assert log["log_pi_ref"] < 0 and log["seconds/reference"] > 0


def test_the_reference_can_be_a_folder_and_another_architecture(tmp_path):
    reference = tiny_seq2seq(len(TOKENIZER))
    reference.save_pretrained(tmp_path / "reference")
    by_object, by_name = (
        make_trainer(tmp_path, rewards(), ref_model=ref_model, ref_weight=1.0, sampler=fixed_leaves)
        for ref_model in (reference, str(tmp_path / "reference"))
    )
    batch = first_batch(by_name)
    one, other = (trainer.compute_loss(trainer.model, batch).item() for trainer in (by_object, by_name))
    assert one == pytest.approx(other, rel=1e-6)
    assert type(by_name.prior.model).__name__ == "T5ForConditionalGeneration"


def test_with_adapters_the_reference_is_the_base_model(tmp_path):
    base = noisy(tiny_model(len(TOKENIZER)))
    expected = leaf_log_probs(copy.deepcopy(base), step := first_step(make_trainer(tmp_path, rewards())))
    trainer = make_trainer(
        tmp_path, rewards(), base, peft_config=LoraConfig(**LORA), ref_weight=WEIGHT, loss_type="trajectory_balance"
    )
    assert trainer.prior.model is None
    for name, parameter in trainer.model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)  # adapters that change the output
    model = trainer.model.train()
    leaves = torch.arange(LEAVES).expand(8, -1)
    before = {name: p.requires_grad for name, p in model.named_parameters()}
    torch.testing.assert_close(trainer.prior.score(model, step.prompts, leaves), WEIGHT * expected)
    torch.testing.assert_close(trainer.prior.score_all(model, step.prompts), WEIGHT * expected)
    assert {name: p.requires_grad for name, p in model.named_parameters()} == before
    assert all(module.training for module in model.modules())
    assert (leaf_log_probs(model, step) - expected).abs().max() > 0.1
    start = weights(trainer)
    trainer.train()
    moved = {name for name, value in weights(trainer).items() if not torch.equal(value, start[name])}
    assert moved == {name for name in start if any(part in name for part in ("lora_", "tokens_delta", "flow_heads"))}


def test_a_model_cannot_be_its_own_reference(tmp_path):
    model = tiny_model(len(TOKENIZER))
    with pytest.raises(ValueError, match="ref_model is the model to train"):
        make_trainer(tmp_path, rewards(), model, ref_model=model, ref_weight=1.0)
