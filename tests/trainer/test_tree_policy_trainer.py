"""Common and specific parts of the trainers: classes, errors before training, columns, the log."""

import ast
import dataclasses
import inspect
import logging
import re
import textwrap

import pytest
import torch
from datasets import Dataset
from trl.trainer.base_trainer import _BaseTrainer

from gflowtrl import APAOConfig, APAOTrainer, GFlowNetConfig, GFlowNetTrainer
from gflowtrl.data.step import REWARD_ARGUMENTS
from gflowtrl.losses import LOSSES
from gflowtrl.rewards import GroundTruthReward
from gflowtrl.trainer import TreePolicyConfig, TreePolicyTrainer, tree_policy_trainer
from tests.tiny import tiny_model

from .world import TOKENIZER, losses, make_catalog, make_rows, make_trainer


LOGGER = tree_policy_trainer.__name__


def make_plain(folder, trainer=TreePolicyTrainer, config=TreePolicyConfig, rows=None, **options):
    """A trainer without rewards."""
    settings = {"per_device_train_batch_size": 8, "num_train_epochs": 2, "learning_rate": 1e-2, "logging_steps": 1}
    settings |= {"use_cpu": True, "save_strategy": "no", "disable_tqdm": True, "eval_num_beams": 10, "eval_ks": [5]}
    return trainer(
        tiny_model(len(TOKENIZER)), config(str(folder), **settings | options),
        train_dataset=make_rows() if rows is None else rows, eval_dataset=make_rows(6, 1, 500),
        processing_class=TOKENIZER, catalog=make_catalog(),
    )  # fmt: skip


def with_column(name: str) -> Dataset:
    return make_rows().add_column(name, list(range(24)))


# ------------------------------------------------------------------------------------------------------------- classes
@pytest.mark.parametrize(
    ("trainer", "config"), [(GFlowNetTrainer, GFlowNetConfig), (APAOTrainer, APAOConfig)], ids=["GFlowNet", "APAO"]
)
def test_every_trainer_is_a_tree_policy_trainer_on_trls_base(trainer, config):
    assert trainer.__bases__ == (TreePolicyTrainer,) and issubclass(TreePolicyTrainer, _BaseTrainer)
    assert config.__bases__ == (TreePolicyConfig,)
    assert trainer.compute_loss is TreePolicyTrainer.compute_loss


def test_compute_loss_is_short():
    function = ast.parse(textwrap.dedent(inspect.getsource(TreePolicyTrainer.compute_loss))).body[0]
    body = function.body[1:]  # without the docstring
    lines = {line for statement in body for line in range(statement.lineno, statement.end_lineno + 1)}
    assert ast.get_docstring(function) and len(lines) + 1 <= 15


def test_it_trains_and_evaluates(tmp_path):
    trainer = make_plain(tmp_path)
    assert trainer.num_generations == 1 and trainer.sampler.source_names == ("ground_truth",)
    trainer.train()
    assert losses(trainer)[-1] < losses(trainer)[0]
    assert trainer.evaluate()["eval_recall@5"] > 0
    assert not any(name.startswith("reward") for log in trainer.state.log_history for name in log)


NEEDY = [name for name, loss in LOSSES.items() if loss.needs_rewards or loss.needs_reference]


@pytest.mark.parametrize("name", NEEDY)
def test_losses_that_need_rewards_or_a_reference_are_errors(tmp_path, name):
    with pytest.raises(ValueError, match=f"The loss '{name}' needs rewards or a reference model; use GFlowNetTrainer"):
        make_plain(tmp_path, loss_type=["sft", name])


def test_it_accepts_every_other_loss(tmp_path):
    assert {"sft", "msl", "bear", "prefix_pointwise", "prefix_pairwise"} == set(LOSSES) - set(NEEDY)
    trainer = make_plain(tmp_path, loss_type=[name for name in LOSSES if name not in NEEDY], num_generations=3)
    assert trainer.sampler.source_names == ("ground_truth", "uniform") and trainer.num_generations == 3
    trainer.train()
    assert losses(trainer)[-1] < losses(trainer)[0]


# ------------------------------------------------------------------------------------------------- no rewards for APAO
def test_apao_has_no_fields_for_rewards(tmp_path):
    own = {field.name for field in dataclasses.fields(GFlowNetConfig)}
    of_rewards = own - {field.name for field in dataclasses.fields(TreePolicyConfig)}
    assert {"reward_beta", "reward_weights", "ref_weight", "max_exact_elements", "source_weights"} <= of_rewards
    for name in of_rewards:
        with pytest.raises(TypeError, match=f"unexpected keyword argument '{name}'"):
            APAOConfig(str(tmp_path), **{name: 1.0})
    assert not of_rewards & {field.name for field in dataclasses.fields(APAOConfig)}


def test_apao_accepts_no_reference_model_and_no_other_configuration(tmp_path):
    options = {"processing_class": TOKENIZER, "catalog": make_catalog()}
    with pytest.raises(ValueError, match="APAOTrainer does not use ref_model; use GFlowNetTrainer"):
        APAOTrainer(tiny_model(len(TOKENIZER)), APAOConfig(str(tmp_path)), ref_model="folder", **options)
    with pytest.raises(TypeError, match="args is a GFlowNetConfig, but APAOTrainer needs an APAOConfig"):
        APAOTrainer(tiny_model(len(TOKENIZER)), GFlowNetConfig(str(tmp_path)), **options)


# ------------------------------------------------------------------------------------------------------------- columns
@pytest.mark.parametrize("name", REWARD_ARGUMENTS)
def test_a_column_named_like_an_argument_of_rewards_is_an_error(tmp_path, name):
    remedy = rf"column '{name}' has the name of an argument.*Rename it.*rename_column\('{name}', 'my_{name}'\)"
    with pytest.raises(ValueError, match=remedy):
        make_trainer(tmp_path, GroundTruthReward(), train_dataset=with_column(name))
    with pytest.raises(ValueError, match=remedy):
        make_trainer(tmp_path, GroundTruthReward(), eval_dataset={"good": make_rows(), "bad": with_column(name)})
    for trainer, config in ((TreePolicyTrainer, TreePolicyConfig), (APAOTrainer, APAOConfig)):
        with pytest.raises(ValueError, match=remedy):
            make_plain(tmp_path, trainer, config, rows=with_column(name))


def test_columns_of_all_other_names_reach_rewards_and_samplers(tmp_path):
    """Including names that the trainer itself used earlier."""
    names = (
        *("progress", "policy", "cache", "target_leaf", "target_leaves", "policy_leaves", "policy_log_probs"),
        *("leaf_log_rewards", "leaf_log_prior", "row_ids", "columns", "step", "leaves", "noise", "price"),
    )
    seen, drawn = {}, {}

    def mine(items, **columns):
        for place, row in enumerate(columns["row_id"]):
            seen[row] = {name: columns[name][place] for name in names}
        return [1.0] * len(items)

    def uniform(step, policy, reward, num_generations, noise):
        for place, row in enumerate(step.row_ids.tolist()):
            drawn[row] = {name: step.columns[name][place] for name in names}
        return torch.arange(num_generations).expand(len(step), -1)

    rows = make_rows()
    for place, name in enumerate(names):
        rows = rows.add_column(name, [100 * place + row for row in range(24)])
    make_trainer(tmp_path, mine, train_dataset=rows, sampler=uniform, max_steps=3).train()
    wanted = {row["row_id"]: {name: row[name] for name in names} for row in rows}
    assert seen == drawn == wanted and len(wanted) == 24


# ----------------------------------------------------------------------------------------------------------------- log
@pytest.mark.parametrize("kind", [GFlowNetTrainer, TreePolicyTrainer, APAOTrainer])
def test_the_constructor_logs_the_size_of_a_step_and_prints_nothing(tmp_path, caplog, capsys, kind):
    with caplog.at_level(logging.INFO, logger=LOGGER):
        if kind is GFlowNetTrainer:
            make_trainer(tmp_path, GroundTruthReward(), loss_type="sft,vargrad", gradient_accumulation_steps=2)
            expected = "16 prompts per step .*, 4 trajectories each, loss sft . vargrad"
        elif kind is TreePolicyTrainer:
            make_plain(tmp_path)
            expected = "8 prompts per step .*, 1 trajectories each, loss sft"
        else:
            make_plain(tmp_path, APAOTrainer, APAOConfig, method="pairwise", num_negatives=5)
            expected = "8 prompts per step .*, 6 trajectories each, loss sft . prefix_pairwise"
    (message,) = [record.getMessage() for record in caplog.records if record.name == LOGGER]
    assert message.startswith(f"{kind.__name__}: ") and "per_device_train_batch_size counts prompts" in message
    assert re.search(expected, message)
    assert capsys.readouterr().out == ""
