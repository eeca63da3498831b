"""Value checks for training arguments that transformers accepts, but that fail or do nothing during training."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from peft import PeftConfig
from torch import Tensor
from transformers import PreTrainedTokenizerBase, TrainerCallback, TrainingArguments

from gflowtrl.catalog import ItemCatalog
from gflowtrl.checks import (
    COUNT,
    NOT_NEGATIVE,
    POSITIVE,
    SEED,
    SHARE_BELOW_ONE,
    Bound,
    at_least,
    check_number,
    check_type,
    short_repr,
)


#: Bounds of the fields of `TrainingArguments`; None is always valid.
BOUNDS: dict[str, Bound] = {
    "seed": SEED,
    "data_seed": SEED,
    "learning_rate": NOT_NEGATIVE,
    "per_device_train_batch_size": COUNT,
    "per_device_eval_batch_size": COUNT,
    "gradient_accumulation_steps": COUNT,
    "eval_accumulation_steps": COUNT,
    "weight_decay": NOT_NEGATIVE,
    "warmup_steps": NOT_NEGATIVE,
    "adam_beta1": SHARE_BELOW_ONE,
    "adam_beta2": SHARE_BELOW_ONE,
    "adam_epsilon": NOT_NEGATIVE,
    "label_smoothing_factor": SHARE_BELOW_ONE,
    "neftune_noise_alpha": NOT_NEGATIVE,
    "eval_delay": NOT_NEGATIVE,
    "dataloader_num_workers": at_least(0),
    "dataloader_prefetch_factor": COUNT,
    "ddp_timeout": COUNT,
}
#: Fields of `TrainingArguments` that hold options. transformers reads JSON in text, and leaves other text as it is.
MAPPINGS = ("lr_scheduler_kwargs", "gradient_checkpointing_kwargs")


def check_training_arguments(args: TrainingArguments) -> None:
    """Raise an error for numbers with which training would fail, or do nothing, after it has started.

    Raises:
        ValueError: names the option, its value and the valid values.
    """
    for name, bound in BOUNDS.items():
        if getattr(args, name, None) is not None:
            check_number(name, getattr(args, name), bound)
    for name in MAPPINGS:
        if not isinstance(value := getattr(args, name, None) or {}, Mapping):
            raise ValueError(f"{name} is {short_repr(value)}; give options with their values, or leave it out.")
    for what in ("logging", "eval", "save"):
        steps = getattr(args, f"{what}_steps")
        if getattr(args, f"{what}_strategy") == "steps" and not (what == "eval" and not steps):
            check_number(f"{what}_steps", steps, POSITIVE)
    if args.max_steps < -1:
        raise ValueError(f"max_steps is {args.max_steps}; it must be {COUNT.meaning}, or -1 for num_train_epochs.")
    if args.max_steps <= 0:
        check_number("num_train_epochs", args.num_train_epochs, POSITIVE)


#: The types of arguments of the trainers; all but optimizers may be None.
TYPES: dict[str, tuple[Any, str]] = {
    "processing_class": (PreTrainedTokenizerBase, "a tokenizer of transformers"),
    "catalog": (ItemCatalog, "an ItemCatalog"),
    "peft_config": (PeftConfig, "a configuration of PEFT, for example a LoraConfig"),
    "item_counts": (Tensor, "a tensor with one count per item, in the order of catalog.items"),
    "item_titles": (Mapping, "a dictionary {item: title}"),
    "prompt_encoder": (Callable, "a PromptEncoder"),
    "callbacks": (list, "a list of callbacks"),
    "optimizers": (tuple | list, "a pair (optimizer, scheduler)"),
    "compute_metrics": (Callable, "a function of an EvalPrediction"),
    "optimizer_cls_and_kwargs": (tuple | list, "a pair (class, options)"),
    "model_init": (Callable, "a function that returns a model"),
}


def check_types(given: Mapping[str, Any]) -> None:
    """Raise a TypeError for the first of the given arguments that is not of its type in `TYPES`."""
    for name, (kinds, meaning) in TYPES.items():
        value = given[name]
        check_type(name, value, kinds, meaning, optional=name != "optimizers")
        if meaning.startswith("a pair") and value is not None and len(value) != 2:
            raise TypeError(f"{name} has {len(value)} entries; it must be {meaning}.")
    for callback in given["callbacks"] or ():
        kind = callback if isinstance(callback, type) else type(callback)
        if not issubclass(kind, TrainerCallback):
            raise TypeError(f"callbacks has {short_repr(callback)}; each one must be a TrainerCallback.")


#: Arguments of TRL's trainers that these trainers do not have, and what replaces them.
UNSUPPORTED = {
    "data_collator": "prompts are made from histories; give a prompt_encoder",
    "compute_loss_func": "the losses are those of loss_type; add your own with gflowtrl.losses.register_loss",
    "preprocess_logits_for_metrics": "compute_metrics gets lists of items, not logits",
    "formatting_func": "rows are histories and targets, not text; gflowtrl.data.text_sft_dataset makes text of them",
    "tools": "answers are items, which call no tools",
    "rollout_func": "trajectories are drawn by the sampler",
    "environment_factory": "a trajectory is the id of an item, without an environment",
}


def refuse_arguments(trainer: str, given: Mapping[str, Any]) -> None:
    """Raise a TypeError for arguments that a trainer does not have; it says what replaces those of TRL."""
    if not given:
        return
    name = next(iter(given))
    reason = UNSUPPORTED.get(name, "see the arguments in its documentation")
    raise TypeError(f"{trainer} has no argument {name!r}: {reason}.")
