"""Custom optimizers and schedulers."""

import pytest
import torch
from peft import LoraConfig, get_peft_model

from gflowtrl.policy import attach_flow_heads
from gflowtrl.policy.heads import is_head
from gflowtrl.rewards import GroundTruthReward
from tests.tiny import tiny_model

from .world import TOKENIZER, make_trainer, weights


BALANCE = {"loss_type": "trajectory_balance"}


def model():
    return tiny_model(len(TOKENIZER))


def sgd(parameters, **options) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=1e-2, momentum=0.5, **options)


def made(folder, trained, optimizers, **options):
    return make_trainer(folder, [GroundTruthReward()], trained, optimizers=optimizers, **options)


def test_the_flow_head_is_added_with_its_rate_and_the_optimizers_defaults(tmp_path):
    trained = model()
    optimizer = sgd(trained.parameters(), weight_decay=0.25)
    trainer = made(tmp_path, trained, (optimizer, None), log_z_learning_rate=0.125, **BALANCE)
    heads = [parameter for name, parameter in trainer.model.named_parameters() if is_head(name)]
    group = optimizer.param_groups[-1]
    assert len(heads) == 4 and all(a is b for a, b in zip(group["params"], heads, strict=True))
    assert (group["lr"], group["momentum"], group["weight_decay"]) == (0.125, 0.5, 0.25)
    before = weights(trainer)
    trainer.train()
    after = weights(trainer)
    assert not torch.equal(before["flow_heads.outer.bias"], after["flow_heads.outer.bias"])


def test_the_trainers_optimizer_and_a_custom_one_do_the_same(tmp_path):
    given, own = model(), model()
    options = {"optim": "sgd", "weight_decay": 0.0, "lr_scheduler_type": "constant", **BALANCE}
    optimizer = torch.optim.SGD(given.parameters(), lr=1e-2)
    first, second = made(tmp_path, given, (optimizer, None), **options), made(tmp_path, own, (None, None), **options)
    first.train()
    second.train()
    expected = weights(second)
    assert all(torch.allclose(value, expected[name]) for name, value in weights(first).items())


def test_heads_that_are_already_in_the_optimizer_stay_in_their_group(tmp_path):
    trained = attach_flow_heads(model())
    optimizer = sgd(trained.parameters())
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5)
    made(tmp_path, trained, (optimizer, scheduler), **BALANCE).train()
    assert len(optimizer.param_groups) == 1 and optimizer.param_groups[0]["lr"] == 0.5e-2


def test_mismatched_optimizers_are_errors(tmp_path):
    trained, other = model(), model()
    with pytest.raises(ValueError, match=r"has 21 parameters, of which 21 do not belong to the LlamaForCausalLM"):
        made(tmp_path, trained, (sgd(other.parameters()), None))
    with pytest.raises(ValueError, match="of which 1 do not belong"):
        made(tmp_path, trained, (sgd([*trained.parameters(), torch.nn.Parameter(torch.ones(1))]), None))
    optimizer = sgd(trained.parameters())
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    with pytest.raises(ValueError, match="a scheduler without an optimizer"):
        made(tmp_path, trained, (None, scheduler))
    with pytest.raises(ValueError, match="belongs to another optimizer"):
        made(tmp_path, trained, (sgd(trained.parameters()), scheduler))
    with pytest.raises(TypeError, match="give a torch.optim.Optimizer"):
        made(tmp_path, trained, (torch.optim.SGD, None))
    with pytest.raises(ValueError, match="which the given scheduler would not know.*attach_flow_heads"):
        made(tmp_path, model_of(optimizer, trained), (optimizer, scheduler), **BALANCE)


def model_of(optimizer, trained):
    assert all(
        parameter in set(trained.parameters()) for group in optimizer.param_groups for parameter in group["params"]
    )
    return trained


def test_adapters_that_the_trainer_adds_cannot_be_in_an_optimizer(tmp_path):
    trained, lora = model(), LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM")
    with pytest.raises(ValueError, match=r"none of the trained parameters.*get_peft_model.*leave peft_config out"):
        made(tmp_path, trained, (sgd(trained.parameters()), None), peft_config=lora)
    adapted = get_peft_model(model(), lora)
    optimizer = sgd(p for p in adapted.parameters() if p.requires_grad)
    trainer = made(tmp_path, adapted, (optimizer, None))
    before = weights(trainer)
    trainer.train()
    assert any(not torch.equal(value, before[name]) for name, value in weights(trainer).items() if "lora_B" in name)


def test_missing_parameters_give_a_warning(tmp_path):
    trained = model()
    with pytest.warns(UserWarning, match=r"does not have 20 of 21 trainable tensors, for example 'model.embed_tokens"):
        made(tmp_path, trained, (sgd([trained.lm_head.weight]), None))
