"""All that gflowtrl uses of other libraries and that their documentation does not promise, in one file.

When a new release of transformers, trl, peft or accelerate moves such a name, this file changes and no other;
`tests/test_compat.py` has a test for each name and says which one is gone. It also lists the private methods and
attributes of base classes that our subclasses replace or call. Two kinds:

- **names** (`NAMES`): classes, functions and constants under a public name, imported on first use, so that importing
  this module loads no library;
- **functions** that read or change what a library keeps to itself, an underscore attribute of a model, say.
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
            f"gflowtrl uses {original} of {module}, which is not in the installed version of {library}: {error}. "
            f"Install a version of {library} that gflowtrl was tested with (setup.cfg); "
            f"gflowtrl/compat.py is the one file to adapt."
        ) from error


def require(library: str, version: str, feature: str) -> None:
    """Refuse a feature that older releases of a library compute wrongly, where all else works with them.

    Args:
        library: its name on the package index.
        version: the first release with which the feature passes our tests.
        feature: what needs it, as the subject of a sentence.

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
    """What a model's configuration computes attention with ("sdpa", say); "" where it does not say, or for None."""
    return getattr(config, "_attn_implementation", None) or ""


def is_stateful(model: nn.Module) -> bool:
    """Whether a model says that it is recurrent: it carries a state from token to token, past the attention mask."""
    return bool(getattr(model, "_is_stateful", False))


def carries_adapters(model: nn.Module) -> bool:
    """Whether adapters lie on a model that transformers itself has loaded (`load_adapter`), without being merged."""
    return bool(getattr(model, "_hf_peft_config_loaded", False))


def tied_weights(model: object) -> dict[str, str]:
    """Names of a model's tied weights, each with the name of the weight that it is tied to."""
    return getattr(model, "all_tied_weights_keys", None) or {}


def drop_ties(model: PreTrainedModel, head: str) -> None:
    """Say that the output head `head` shares its weight with no other layer any more."""
    for config in {id(c): c for c in (model.config, model.config.get_text_config())}.values():
        config.tie_word_embeddings = False
    model.all_tied_weights_keys = {
        name: first for name, first in tied_weights(model).items() if not f"{name}.".startswith(f"{head}.")
    }


def set_name_or_path(model: PreTrainedModel, name: str | os.PathLike[str]) -> None:
    """Say where a model comes from, as `from_pretrained` does: it is saved with the model's configuration."""
    model.name_or_path = model.config._name_or_path = os.fspath(name)


def empty_model_like(model: PreTrainedModel, config: Any) -> PreTrainedModel:
    """A new model of the class and dtype of `model`, its weights not loaded: under ZeRO-3 in shards from the start."""
    return type(model)._from_config(config, dtype=model.dtype)


@contextmanager
def whole_models() -> Iterator[None]:
    """Within, models are loaded and adapted whole in every process, where ZeRO-3 or FSDP would have them in parts.

    Meant for models that no engine will take over: frozen ones, and those that are evaluated.
    """
    from transformers.integrations import deepspeed as zero

    kept, efficient = zero._hf_deepspeed_config_weak_ref, os.environ.get("FSDP_CPU_RAM_EFFICIENT_LOADING")
    zero.unset_hf_deepspeed_config()
    os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] = "false"
    try:
        yield
    finally:
        if kept is not None and kept() is not None:
            zero.set_hf_deepspeed_config(kept())
        os.environ.pop("FSDP_CPU_RAM_EFFICIENT_LOADING")
        if efficient is not None:
            os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] = efficient


# --------------------------------------------------------------------------------------------------------- others
def uncompiled(model: nn.Module) -> nn.Module:
    """The module inside the wrapper of `torch.compile`; any other module as it is."""
    return getattr(model, "_orig_mod", model)


def parser_actions(parser: argparse.ArgumentParser) -> list[argparse.Action]:
    """The arguments that a parser knows, `--help` included."""
    return parser._actions


def quiet_libraries() -> None:
    """Hide messages that mean nothing to the user of a command.

    These are bitsandbytes on a CPU kernel that gflowtrl does not use, DeepSpeed on the accelerator that it found, and
    the progress bars of loading weights.
    """
    for name in ("bitsandbytes.backends.cpu.ops", "DeepSpeed"):
        logging.getLogger(name).addFilter(lambda record: record.levelno >= logging.ERROR)
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
