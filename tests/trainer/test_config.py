"""Configurations from Python, YAML and the command line, and their documentation."""

import ast
import dataclasses
import re

import pytest
import torch
from trl import TrlParser

from gflowtrl import GFlowNetConfig
from gflowtrl.trainer import APAOConfig, TreePolicyConfig


OWN = [
    field
    for field in dataclasses.fields(GFlowNetConfig)
    if field.name in GFlowNetConfig.__annotations__ | TreePolicyConfig.__annotations__
]
#: Fields documented in one paragraph, as defaults that differ from `TrainingArguments`.
OTHER_DEFAULTS = (
    *("learning_rate", "train_sampling_strategy", "remove_unused_columns"),
    *("gradient_checkpointing", "bf16", "logging_nan_inf_filter"),
)


@pytest.mark.parametrize("given", ["sft,vargrad", ["sft", "vargrad"], ("sft", "vargrad")])
def test_losses_can_be_text_or_a_list(tmp_path, given):
    config = GFlowNetConfig(str(tmp_path), loss_type=given, loss_weights="1, 0.5")
    assert config.loss_type == ["sft", "vargrad"]
    assert config.loss_weights == [1.0, 0.5]
    assert GFlowNetConfig(str(tmp_path), loss_type=given).loss_weights == [1.0, 1.0]


def test_the_command_line_overrides_yaml(tmp_path):
    file = tmp_path / "recipe.yaml"
    file.write_text("loss_type: [sft, trajectory_balance]\nloss_weights: [1, 0.1]\nepsilon: 0.2\neval_ks: [5]\n")
    arguments = [
        "--config",
        str(file),
        "--output_dir",
        str(tmp_path),
        "--epsilon",
        "0.3",
        "--model_init_kwargs",
        '{"a": 1}',
    ]
    (config,) = TrlParser(GFlowNetConfig).parse_args_and_config(arguments)
    assert config.loss_type == ["sft", "trajectory_balance"] and config.loss_weights == [1.0, 0.1]
    assert TrlParser(GFlowNetConfig).format_help()  # a stray "%" in a help text would raise
    assert config.epsilon == 0.3 and config.eval_ks == [5] and config.model_init_kwargs == {"a": 1}


def test_a_configuration_can_be_rebuilt_from_its_dictionary(tmp_path):
    config = GFlowNetConfig(
        str(tmp_path), loss_type="sft,vargrad", loss_weights=[1, 2], loss_kwargs={"vargrad": {"huber_delta": 3.0}}
    )
    again = GFlowNetConfig(**{field.name: config.to_dict()[field.name] for field in OWN}, output_dir=str(tmp_path))
    assert [getattr(again, field.name) for field in OWN] == [getattr(config, field.name) for field in OWN]


@pytest.mark.skipif(torch.cuda.is_available(), reason="the defaults of a machine without an accelerator")
def test_defaults_on_a_machine_without_an_accelerator(tmp_path):
    config = GFlowNetConfig(str(tmp_path))
    assert config.bf16 is False and not config.gradient_checkpointing and config.report_to == []
    assert config.dataloader_pin_memory is False and config.remove_unused_columns is False


@pytest.mark.parametrize("config", [TreePolicyConfig, GFlowNetConfig, APAOConfig])
def test_every_field_is_documented_with_its_default(config):
    text = config.__doc__
    own = [field for field in dataclasses.fields(config) if field.name in config.__annotations__ and field.init]
    for field in own:
        assert field.metadata.get("help"), f"{field.name} has no help text"
        assert "%" not in field.metadata["help"].replace("%%", ""), field.name
        if field.name in OTHER_DEFAULTS:
            assert field.name.replace("_", " ") in text or field.name in text
            continue
        line = re.search(rf"^\s+{field.name} \((.*)\):$", text, re.M)
        assert line, f"{field.name} is not in the class docstring"
        default = field.default_factory() if field.default_factory is not dataclasses.MISSING else field.default
        if default is not None:
            stated = re.search(r"defaults to `(.*)`", line[1])[1].replace("_", "")
            assert ast.literal_eval(stated) == default, (
                f"{field.name}: the docstring says {stated}, the field {default}"
            )
    assert issubclass(config, TreePolicyConfig) and own


@pytest.mark.parametrize("config", [TreePolicyConfig, GFlowNetConfig, APAOConfig])
@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("seed", [-1, 2**32, 1.5, True]),
        ("data_seed", [-1]),
        ("learning_rate", [-1, -1e-3]),
        ("num_train_epochs", [0, -1]),
        ("max_steps", [-2]),
        ("per_device_train_batch_size", [0, -1, 1.5]),
        ("per_device_eval_batch_size", [0]),
        ("gradient_accumulation_steps", [0, -1]),
        ("weight_decay", [-0.1]),
        ("adam_beta2", [1.0, -0.1]),
        ("dataloader_num_workers", [-1]),
        ("temperature", [0]),
    ],
)
def test_invalid_numbers_are_errors(tmp_path, config, name, values):
    for value in values:
        with pytest.raises(ValueError, match=rf"^{name} is {re.escape(repr(value))}; it must be "):
            config(str(tmp_path), **{name: value})


def test_valid_values_of_transformers_are_accepted(tmp_path):
    for options in (
        {"save_total_limit": 0}, {"logging_steps": 0, "logging_strategy": "no"},
        {"save_steps": 0, "save_strategy": "no"},
        {"max_steps": 3, "num_train_epochs": 0}, {"max_steps": 0}, {"max_grad_norm": -1.0}, {"adam_epsilon": 0.0},
        {"learning_rate": 0.0}, {"eval_steps": 0}, {"metric_for_best_model": "eval_revenue"},
    ):  # fmt: skip
        GFlowNetConfig(str(tmp_path), use_cpu=True, **options)


def test_rewards_without_an_effect_are_errors(tmp_path):
    for weights, message in (([0, 0], "not all zero"), ([1, -1], "the weights must be >= 0")):
        with pytest.raises(ValueError, match=f"reward_weights .*{message}"):
            GFlowNetConfig(str(tmp_path), reward_weights=weights)
    GFlowNetConfig(str(tmp_path), reward_weights=[1, -1], reward_transform="exp")
