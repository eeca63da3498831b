"""Everything that gflowtrl uses of other libraries' undocumented API.

When a new release of transformers, trl, peft or accelerate moves such a name, only this file changes.
`tests/test_compat.py` tests each name, so a failing test says which one is gone. It also lists the private methods
and attributes of base classes that gflowtrl's subclasses override or call. The module has two parts:

- **names** (`NAMES`): classes, functions and constants under a public name, imported at first use, so that importing
  this module loads no library;
- **functions** that read or change the private state of a library, for example an underscore attribute of a model.
"""

from __future__ import annotations

import argparse
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module, metadata
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    from accelerate.commands.launch import launch_command as launch_command
    from accelerate.commands.launch import launch_command_parser as launch_command_parser
    from peft.tuners.trainable_tokens import TrainableTokensLayer as TrainableTokensLayer
    from peft.tuners.tuners_utils import BaseTunerLayer as BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper as AuxiliaryTrainingWrapper
    from peft.utils.other import TrainableTokensWrapper as TrainableTokensWrapper
    from torch import nn
    from transformers import PreTrainedModel
    from transformers.trainer import OPTIMIZER_NAME as OPTIMIZER_NAME
    from transformers.trainer import SCALER_NAME as SCALER_NAME
    from transformers.trainer import SCHEDULER_NAME as SCHEDULER_NAME
    from transformers.trainer import TRAINER_STATE_NAME as TRAINER_STATE_NAME
    from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR as PREFIX_CHECKPOINT_DIR
    from transformers.trainer_utils import SaveStrategy as SaveStrategy
    from transformers.utils.peft_utils import find_adapter_config_file as find_adapter_config_file
    from trl.models.utils import prepare_deepspeed as prepare_deepspeed
    from trl.models.utils import prepare_fsdp as prepare_fsdp
    from trl.trainer.base_config import _BaseConfig as TRLConfig  # noqa: F401
    from trl.trainer.base_trainer import _BaseTrainer as TRLTrainer  # noqa: F401

#: Public name -> module and name in the other library.
NAMES = {
    "AuxiliaryTrainingWrapper": ("peft.utils.other", "AuxiliaryTrainingWrapper"),
    "BaseTunerLayer": ("peft.tuners.tuners_utils", "BaseTunerLayer"),
    "OPTIMIZER_NAME": ("transformers.trainer", "OPTIMIZER_NAME"),
    "PREFIX_CHECKPOINT_DIR": ("transformers.trainer_utils", "PREFIX_CHECKPOINT_DIR"),
    "SCALER_NAME": ("transformers.trainer", "SCALER_NAME"),
    "SCHEDULER_NAME": ("transformers.trainer", "SCHEDULER_NAME"),
    "SaveStrategy": ("transformers.trainer_utils", "SaveStrategy"),
    "TRAINER_STATE_NAME": ("transformers.trainer", "TRAINER_STATE_NAME"),
    "TRLConfig": ("trl.trainer.base_config", "_BaseConfig"),
    "TRLTrainer": ("trl.trainer.base_trainer", "_BaseTrainer"),
    "TrainableTokensLayer": ("peft.tuners.trainable_tokens", "TrainableTokensLayer"),
    "TrainableTokensWrapper": ("peft.utils.other", "TrainableTokensWrapper"),
    "find_adapter_config_file": ("transformers.utils.peft_utils", "find_adapter_config_file"),
    "launch_command": ("accelerate.commands.launch", "launch_command"),
    "launch_command_parser": ("accelerate.commands.launch", "launch_command_parser"),
    "prepare_deepspeed": ("trl.models.utils", "prepare_deepspeed"),
    "prepare_fsdp": ("trl.models.utils", "prepare_fsdp"),
}


def __getattr__(name: str) -> Any:
    if name not in NAMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; it has {', '.join(sorted(NAMES))}.")
    module, original = NAMES[name]
    try:
        return getattr(import_module(module), original)
    except (ImportError, AttributeError) as error:
        library = module.partition(".")[0]
        raise ImportError(
            f"gflowtrl uses {original} of {module}, which the installed version of {library} does not have: {error}. "
            f"Install a version of {library} that gflowtrl was tested with (setup.cfg), or adapt gflowtrl/compat.py."
        ) from error


def require(library: str, version: str, feature: str) -> None:
    """Check that the installed version of a library supports a feature that older releases compute wrongly.

    Args:
        library: name of the library on the package index.
        version: first release with which the feature passes gflowtrl's tests.
        feature: the feature, as the subject of a sentence.

    Raises:
        ValueError: an older version is installed.
    """
    from accelerate.utils import compare_versions

    if compare_versions(library, "<", version):
        raise ValueError(
            f"{feature} needs {library} {version} or newer, and {metadata.version(library)} is installed: "
            f"pip install '{library}>={version}'."
        )


# --------------------------------------------------------------------------------------------------- transformers
def attention_implementation(config: Any) -> str:
    """Return the attention implementation in a model's configuration, for example "sdpa"; "" if it names none."""
    return getattr(config, "_attn_implementation", None) or ""


def is_stateful(model: nn.Module) -> bool:
    """Return whether a model declares itself recurrent: it passes a state between tokens, whatever the mask says."""
    return bool(getattr(model, "_is_stateful", False))


def carries_adapters(model: nn.Module) -> bool:
    """Return whether transformers (`load_adapter`) added adapters to a model that are not merged into it."""
    return bool(getattr(model, "_hf_peft_config_loaded", False))


def tied_weights(model: object) -> dict[str, str]:
    """Return the names of a model's tied weights, each with the name of the weight that it is tied to."""
    return getattr(model, "all_tied_weights_keys", None) or {}


def drop_ties(model: PreTrainedModel, head: str) -> None:
    """Record that the output head `head` no longer shares its weight with another layer."""
    for config in {id(c): c for c in (model.config, model.config.get_text_config())}.values():
        config.tie_word_embeddings = False
    model.all_tied_weights_keys = {
        name: first for name, first in tied_weights(model).items() if not f"{name}.".startswith(f"{head}.")
    }


def set_name_or_path(model: PreTrainedModel, name: str | os.PathLike[str]) -> None:
    """Record where a model comes from, as `from_pretrained` does. The model's configuration saves it."""
    model.name_or_path = model.config._name_or_path = os.fspath(name)


def empty_model_like(model: PreTrainedModel, config: Any) -> PreTrainedModel:
    """Create a model of the class and dtype of `model` without loading weights. Under ZeRO-3 it is sharded at once."""
    return type(model)._from_config(config, dtype=model.dtype)


@contextmanager
def whole_models() -> Iterator[None]:
    """Context manager: every process loads and adapts whole models, even if ZeRO-3 or FSDP would shard them.

    For models that no engine manages: frozen models, and models that are only evaluated.
    """
    from transformers.integrations import deepspeed as zero

    config, efficient = zero._hf_deepspeed_config_weak_ref, os.environ.get("FSDP_CPU_RAM_EFFICIENT_LOADING")
    zero.unset_hf_deepspeed_config()
    os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] = "false"
    try:
        yield
    finally:
        if config is not None and config() is not None:
            zero.set_hf_deepspeed_config(config())
        os.environ.pop("FSDP_CPU_RAM_EFFICIENT_LOADING")
        if efficient is not None:
            os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] = efficient


# --------------------------------------------------------------------------------------------------------- others
def uncompiled(model: nn.Module) -> nn.Module:
    """Return the module inside the wrapper of `torch.compile`; any other module unchanged."""
    return getattr(model, "_orig_mod", model)


def parser_actions(parser: argparse.ArgumentParser) -> list[argparse.Action]:
    """Return the arguments of a parser, including `--help`."""
    return parser._actions


def quiet_libraries() -> None:
    """Hide messages that mean nothing to the user of a command.

    These are bitsandbytes on a CPU kernel that gflowtrl does not use, DeepSpeed on the accelerator that it found, the
    progress bars of loading weights, and the table of tensors that do not fit, which `policy.loading` checks.
    """
    for name in ("bitsandbytes.backends.cpu.ops", "DeepSpeed"):
        logging.getLogger(name).addFilter(_is_error)
    logging.getLogger("transformers.modeling_utils").addFilter(_is_no_load_report)
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")


@contextmanager
def quiet_logger(name: str) -> Iterator[None]:
    """Context manager: hide what a library's logger says below an error."""
    logger = logging.getLogger(name)
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def _is_no_load_report(record: logging.LogRecord) -> bool:
    return "LOAD REPORT" not in record.getMessage()


def _is_error(record: logging.LogRecord) -> bool:
    return record.levelno >= logging.ERROR
