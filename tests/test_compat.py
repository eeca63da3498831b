"""Tests of the undocumented API of other libraries that gflowtrl uses. A failure names what a release has moved."""

from __future__ import annotations

import argparse
import ast
import copy
import inspect
import logging
import os
import subprocess
import sys
import weakref
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate.utils import compare_versions
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedModel, Trainer
from transformers.integrations import deepspeed as zero

import gflowtrl
from gflowtrl import APAOTrainer, GFlowNetTrainer, compat
from gflowtrl.pipeline.training import Seq2SeqSFTStage, SFTStage
from gflowtrl.policy import branch_positions, make_policy
from tests.tiny import catalog_of, random_paths, tiny_model, tiny_seq2seq


PACKAGE = Path(gflowtrl.__file__).parent
TREES = {path: ast.parse(path.read_text(encoding="utf-8")) for path in sorted(PACKAGE.rglob("*.py"))}
TRAINERS = (GFlowNetTrainer, APAOTrainer, SFTStage, Seq2SeqSFTStage)
#: Base class (module:name) -> its private methods with their parameters, and private attributes with None.
OVERRIDES: dict[str, dict[str, tuple[str, ...] | None]] = {
    "transformers:Trainer": {
        "_get_eval_sampler": ("eval_dataset",),
        "_get_output_dir": ("trial",),
        "_get_grad_norm": ("model", "grad_norm"),
        "_get_train_sampler": ("train_dataset",),
        "_hp_search_setup": ("trial",),
        "_issue_warnings_after_load": ("load_result",),
        "_load_best_model": (),
        "_load_from_checkpoint": ("resume_from_checkpoint", "model"),
        "_load_optimizer_and_scheduler": ("checkpoint",),
        "_prepare_inputs": ("inputs",),
        "_save": ("output_dir", "state_dict"),
        "_save_checkpoint": ("model", "trial"),
        "_save_optimizer_and_scheduler": ("output_dir",),
        "_save_rng_state": ("output_dir",),
    },
    "trl.trainer.base_trainer:_BaseTrainer": {"_name": None, "_send_telemetry": (), "_tag_names": None},
    "transformers:TrainingArguments": {"_VALID_DICT_FIELDS": None},
    "argparse:ArgumentDefaultsHelpFormatter": {"_get_help_string": ("action",)},
}


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__") and name != "_"


def base_class(address: str) -> type:
    module, name = address.split(":")
    return getattr(import_module(module), name)


def parameters(function: Any) -> list[inspect.Parameter]:
    return list(inspect.signature(function).parameters.values())[1:]  # without self


# ---------------------------------------------------------------------------------------------------------- names
@pytest.mark.parametrize("name", sorted(compat.NAMES))
def test_every_name_can_be_imported(name):
    assert getattr(compat, name) is not None


def test_names_have_the_expected_meaning():
    assert issubclass(compat.TRLTrainer, Trainer)
    assert {"output_dir", "train_sampling_strategy"} <= compat.TRLConfig.__dataclass_fields__.keys()
    assert (compat.PREFIX_CHECKPOINT_DIR, compat.TRAINER_STATE_NAME) == ("checkpoint", "trainer_state.json")
    files = (compat.OPTIMIZER_NAME, compat.SCHEDULER_NAME, compat.SCALER_NAME)
    assert files == ("optimizer.pt", "scheduler.pt", "scaler.pt")
    assert {word.value for word in compat.SaveStrategy} == {"no", "steps", "epoch", "best"}
    args = compat.launch_command_parser().parse_args(["--num_processes", "2", "--module", "gflowtrl", "train"])
    assert (args.num_processes, args.training_script, args.training_script_args) == (2, "gflowtrl", ["train"])
    assert [p.name for p in inspect.signature(compat.launch_command).parameters.values()] == ["args"]
    for prepare in (compat.prepare_deepspeed, compat.prepare_fsdp):
        assert list(inspect.signature(prepare).parameters)[:2] == ["model", "accelerator"]


def test_imports_for_the_type_checker_equal_the_table():
    (branch,) = (n for n in TREES[PACKAGE / "compat.py"].body if isinstance(n, ast.If))
    imported = {
        alias.asname: (node.module, alias.name)
        for node in branch.body
        for alias in node.names
        if alias.asname is not None
    }
    assert imported == compat.NAMES


def test_the_error_about_a_moved_name_has_a_remedy(monkeypatch):
    monkeypatch.setitem(compat.NAMES, "Gone", ("peft.utils.other", "Gone"))
    with pytest.raises(ImportError, match="uses Gone of peft.utils.other.*Install a version of peft"):
        _ = compat.Gone
    with pytest.raises(AttributeError, match="no attribute 'Unheard'"):
        _ = compat.Unheard


def test_importing_compat_loads_no_library():
    code = "import sys, gflowtrl.compat; heavy = {'torch', 'trl', 'transformers', 'peft', 'accelerate'}; " + (
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=PACKAGE.parent)


def test_trainable_tokens_have_what_the_restricted_head_reads():
    model = get_peft_model(tiny_model(40), LoraConfig(target_modules=["q_proj"], trainable_token_indices=[5, 3]))
    wrapper = model.get_base_model().get_input_embeddings()
    assert isinstance(wrapper, compat.TrainableTokensWrapper)
    layer = wrapper.token_adapter
    assert isinstance(layer, compat.TrainableTokensLayer)
    assert layer.base_layer.weight.shape == (40, 32)
    (name,) = layer.active_adapters
    assert {"x", "active_adapters"} <= set(inspect.signature(layer.forward_adapters).parameters)
    assert layer.tied_adapter is None
    assert layer.token_indices[name] == [5, 3] and layer.trainable_tokens_delta[name].shape == (2, 32)
    assert not layer.disable_adapters and not layer.merged
    assert torch.equal(layer.get_merged_weights(layer.active_adapters), layer.base_layer.weight)


def test_adapter_folders_are_recognized(tmp_path):
    model = tiny_model(40)
    model.save_pretrained(tmp_path / "model")
    get_peft_model(model, LoraConfig(target_modules=["q_proj"])).save_pretrained(tmp_path / "adapters")
    assert compat.find_adapter_config_file(tmp_path / "model") is None
    assert compat.find_adapter_config_file(tmp_path / "adapters") is not None


# ------------------------------------------------------------------------------------------------------ functions
def test_a_feature_that_needs_a_newer_version_raises():
    compat.require("transformers", "5.0", "Anything")
    with pytest.raises(ValueError, match=r"^A dream needs transformers 99.1 or newer, and \d.* is installed: pip"):
        compat.require("transformers", "99.1", "A dream")


def test_models_that_older_transformers_compute_wrongly_raise(monkeypatch):
    def refuse(library, version, feature):
        raise ValueError(f"{feature} needs {library} {version}")

    catalog = catalog_of(random_paths(6))
    models = {kind: tiny_seq2seq(40, kind) for kind in ("umt5", "bart")}
    monkeypatch.setattr(branch_positions, "require", refuse)
    make_policy(models["bart"], catalog)
    with pytest.raises(ValueError, match="encoder-decoder of kind 'umt5' needs transformers 5.18"):
        make_policy(models["umt5"], catalog)


def test_attention_implementation_is_the_requested_one():
    assert [compat.attention_implementation(tiny_model(40, attention=a).config) for a in ("sdpa", "eager")] == [
        "sdpa",
        "eager",
    ]
    assert compat.attention_implementation(None) == compat.attention_implementation(SimpleNamespace()) == ""


def test_recurrent_models_are_detected():
    from transformers import MambaConfig, MambaForCausalLM

    config = MambaConfig(vocab_size=40, hidden_size=8, num_hidden_layers=1, state_size=2)
    assert compat.is_stateful(MambaForCausalLM(config)) and not compat.is_stateful(tiny_model(40))


def test_adapters_loaded_by_transformers_are_detected(tmp_path):
    get_peft_model(tiny_model(40), LoraConfig(target_modules=["q_proj"])).save_pretrained(tmp_path)
    model = tiny_model(40)
    assert not compat.carries_adapters(model)
    model.load_adapter(str(tmp_path))
    assert compat.carries_adapters(model)


def test_a_compiled_module_is_unwrapped():
    model = torch.nn.Linear(2, 2)
    assert compat.uncompiled(torch.compile(model)) is model is compat.uncompiled(model)


def test_tied_weights_are_named():
    model = tiny_seq2seq(40, "bart")
    tied = compat.tied_weights(model)
    weights = dict(model.named_parameters(remove_duplicate=False))
    assert "lm_head.weight" in tied
    assert all(weights[name] is weights[first] for name, first in tied.items())
    assert compat.tied_weights(torch.nn.Linear(2, 2)) == compat.tied_weights(tiny_model(40)) == {}


def test_an_untied_model_is_saved_with_both_tables(tmp_path):
    config = LlamaConfig(
        vocab_size=40,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        tie_word_embeddings=True,
    )
    model = LlamaForCausalLM(config)
    model.lm_head.weight = torch.nn.Parameter(torch.randn(40, 16))
    compat.drop_ties(model, "lm_head")
    assert not compat.tied_weights(model) and not model.config.tie_word_embeddings
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(loaded.lm_head.weight, model.lm_head.weight)
    assert torch.equal(loaded.model.embed_tokens.weight, model.model.embed_tokens.weight)


def test_wrappers_of_peft_can_be_distinguished():
    config = LoraConfig(target_modules=["q_proj", "embed_tokens"], modules_to_save=["lm_head"])
    model = get_peft_model(tiny_model(40), config).get_base_model()
    layer, copied = model.get_input_embeddings(), model.get_output_embeddings()
    assert isinstance(layer, compat.BaseTunerLayer) and not isinstance(layer, compat.AuxiliaryTrainingWrapper)
    assert layer.get_base_layer().weight.shape == (40, 32)
    assert isinstance(copied, compat.AuxiliaryTrainingWrapper) and copied.original_module.weight.shape == (40, 32)
    assert issubclass(compat.TrainableTokensWrapper, compat.AuxiliaryTrainingWrapper)


def test_the_origin_of_a_model_is_recorded(tmp_path):
    model = tiny_model(40)
    compat.set_name_or_path(model, tmp_path)
    assert model.name_or_path == str(tmp_path)
    named = get_peft_model(model, LoraConfig(target_modules=["q_proj"]))
    assert named.peft_config["default"].base_model_name_or_path == str(tmp_path)


def test_an_empty_model_has_the_same_class_and_shapes():
    model = tiny_model(40).to(torch.bfloat16)
    other = compat.empty_model_like(model, copy.deepcopy(model.config))
    assert type(other) is LlamaForCausalLM and other.dtype == torch.bfloat16
    shapes = [{name: value.shape for name, value in m.named_parameters()} for m in (model, other)]
    assert shapes[0] == shapes[1]


def test_models_are_loaded_whole_under_zero3_and_fsdp(tmp_path, monkeypatch):
    class Config:
        def is_zero3(self):
            return True

    tiny_model(40).save_pretrained(tmp_path)
    config = Config()
    monkeypatch.setattr(zero, "_hf_deepspeed_config_weak_ref", weakref.ref(config))
    monkeypatch.setenv("FSDP_CPU_RAM_EFFICIENT_LOADING", "true")
    assert zero.is_deepspeed_zero3_enabled()
    with compat.whole_models():
        assert not zero.is_deepspeed_zero3_enabled()
        assert os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] == "false"
        assert isinstance(AutoModelForCausalLM.from_pretrained(tmp_path), PreTrainedModel)
    assert zero.is_deepspeed_zero3_enabled()
    assert os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] == "true"
    monkeypatch.delenv("FSDP_CPU_RAM_EFFICIENT_LOADING")
    with pytest.raises(KeyError), compat.whole_models():
        raise KeyError
    assert "FSDP_CPU_RAM_EFFICIENT_LOADING" not in os.environ and zero.is_deepspeed_zero3_enabled()


def test_parser_actions_are_its_arguments():
    parser = argparse.ArgumentParser()
    added = [parser.add_argument("rows"), parser.add_argument("--width", type=int)]
    assert compat.parser_actions(parser)[1:] == added


@pytest.mark.parametrize("name", ["bitsandbytes.backends.cpu.ops", "DeepSpeed"])
def test_other_libraries_warnings_are_hidden_by_commands_only(name, monkeypatch, caplog):
    logger = logging.getLogger(name)
    monkeypatch.setattr(logger, "filters", [])
    monkeypatch.setattr(logger, "propagate", True)
    logger.warning("before")
    compat.quiet_libraries()
    logger.warning("after")
    logger.error("an error")
    assert list(dict.fromkeys(caplog.messages)) == ["before", "an error"]


def test_the_table_of_tensors_that_do_not_fit_is_hidden_by_commands_only(tmp_path, monkeypatch):
    """A command's error about them is one line."""
    logger, records = logging.getLogger("transformers.modeling_utils"), []
    monkeypatch.setattr(logger, "filters", [lambda record: records.append(record) or True])
    tiny_model(20).save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    save_file(load_file(file) | {"extra": torch.zeros(2)}, file, {"format": "pt"})
    AutoModelForCausalLM.from_pretrained(tmp_path)
    if not records:
        pytest.skip("older releases of transformers print no table")
    assert all(logger.filter(record) for record in list(records))
    compat.quiet_libraries()
    assert not any(logger.filter(record) for record in list(records))


# ------------------------------------------------------------------------------------------------------ overrides
@pytest.mark.parametrize(
    ("base", "name"),
    [(b, name) for b in OVERRIDES for name in OVERRIDES[b]],
    ids=lambda value: value.rpartition(":")[2],
)
def test_overridden_names_still_exist(base, name):
    if name == "_send_telemetry" and compare_versions("trl", "<", "1.5"):
        pytest.skip("older releases of trl send no telemetry")
    owner, expected = base_class(base), OVERRIDES[base][name]
    assert hasattr(owner, name), f"{base} no longer has {name}; find its callers there and its overrides in gflowtrl"
    if expected is None:
        assert not callable(getattr(owner, name))
        return
    found = tuple(parameter.name for parameter in parameters(getattr(owner, name)))
    assert found == expected, f"{base}.{name} takes {found} now, where OVERRIDES says {expected}"


@pytest.mark.parametrize("trainer", TRAINERS)
def test_overriding_methods_can_be_called_as_the_base_calls_them(trainer):
    for cls in trainer.__mro__:
        if not cls.__module__.startswith("gflowtrl."):
            continue
        for base, names in OVERRIDES.items():
            for name in vars(cls).keys() & names.keys() if issubclass(trainer, base_class(base)) else ():
                expected = names[name]
                if expected is None or not hasattr(base_class(base), name):  # the test above says so
                    continue
                ours = parameters(vars(cls)[name])
                assert tuple(p.name for p in ours) == expected, f"{cls.__qualname__}.{name}"
                theirs = {p.name: p.default for p in parameters(getattr(base_class(base), name))}
                for p in ours:
                    assert (p.default is p.empty) <= (theirs[p.name] is p.empty), f"{cls.__qualname__}.{name}: {p}"


@pytest.mark.parametrize("trainer", TRAINERS)
def test_every_overridden_private_name_is_listed(trainer):
    listed = {name for names in OVERRIDES.values() for name in names}
    ours = {name for cls in trainer.__mro__ if cls.__module__.startswith("gflowtrl.") for name in vars(cls)}
    theirs = {name for cls in trainer.__mro__ if not cls.__module__.startswith("gflowtrl.") for name in vars(cls)}
    shared = {name for name in ours & theirs if is_private(name) and not name.startswith("_abc_")}
    assert shared <= listed, f"{trainer.__name__} overrides {sorted(shared - listed)}; list them in OVERRIDES"


# ------------------------------------------------------------------------------- private names are used in compat only
def defined_names() -> set[str]:
    """Return all names that gflowtrl itself defines: functions, classes, variables and attributes that it sets."""
    found = set()
    for path, tree in TREES.items():
        if path.name == "compat.py":
            continue
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                found.add(node.name)
            elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                found.add(node.id)
            elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and is_self(node.value):
                found.add(node.attr)
    return found


def is_self(node: ast.expr) -> bool:
    return isinstance(node, ast.Name) and node.id in ("self", "cls")


def private_uses(tree: ast.Module, defined: set[str], modules: set[str]) -> list[tuple[int, str]]:
    """Return the line and name of each use of a private name, or of a module that only compat may import from."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and not node.level and not (node.module or "").startswith("gflowtrl"):
            names = [alias.name for alias in node.names if is_private(alias.name)]
            names += [node.module] if node.module in modules or any(map(is_private, node.module.split("."))) else []
            found += [(node.lineno, name) for name in names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
            found += [(node.lineno, n) for n in names if n in modules or any(map(is_private, n.split(".")))]
        elif isinstance(node, ast.Attribute) and is_private(node.attr) and node.attr not in defined:
            found.append((node.lineno, node.attr))
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("getattr", "setattr", "hasattr", "delattr"):
            name = node.args[1].value if isinstance(node.args[1], ast.Constant) else ""
            found += [(node.lineno, name)] if is_private(name) and name not in defined else []
    return found


def test_a_logger_is_quiet_for_a_while(caplog):
    logger = logging.getLogger("some.library.inside")
    with compat.quiet_logger("some.library"):
        logger.warning("hidden")
        logger.error("shown")
    logger.warning("shown again")
    assert caplog.messages == ["shown", "shown again"]


def test_no_private_name_of_another_library_is_used_elsewhere():
    allowed = defined_names() | {name for names in OVERRIDES.values() for name in names}
    modules = {module for module, _ in compat.NAMES.values()} | {"transformers.integrations"}
    for path, tree in TREES.items():
        if path.name != "compat.py":
            found = private_uses(tree, allowed, modules)
            assert not found, f"{path}: {found} belongs to another library; use it through gflowtrl/compat.py"


@pytest.mark.parametrize(
    "line",
    [
        "from peft.utils.other import TrainableTokensWrapper",
        "from trl.trainer.dpo_trainer import _private",
        "from torch._dynamo import config",
        "import torch._inductor",
        "model.config._attn_implementation",
        "model.config._attn_implementation = 'sdpa'",
        "getattr(model, '_is_stateful', False)",
    ],
)
def test_the_search_finds_private_names(line):
    modules = {module for module, _ in compat.NAMES.values()}
    assert private_uses(ast.parse(line), defined_names(), modules)
    assert not private_uses(ast.parse("from trl import SFTConfig\nself._catalog\nx.weight"), defined_names(), modules)
