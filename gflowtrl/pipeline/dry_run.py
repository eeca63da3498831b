"""Checks that need a model, an optimizer and a schedule, done before the first stage.

A new model scores its longest prompts once. Large models and checkpoints are made without memory for their weights.
"""

from __future__ import annotations

import inspect
import math
from dataclasses import replace
from typing import Any

import torch
from peft import get_peft_model
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel, Trainer, TrainingArguments, get_scheduler

from gflowtrl.compat import find_adapter_config_file
from gflowtrl.configuration import check_names, locate_errors
from gflowtrl.data import user_windows
from gflowtrl.policy import check_exact, make_policy, whole_models
from gflowtrl.policy.loading import load_config
from gflowtrl.trainer.input_checks import check_encoder, check_model

from .fields import check_delay
from .models import build_model, scratch_config, untrained
from .recipe import QUANTIZATION, Recipe
from .run_data import RunData


SMALL = 50_000_000  # parameters; a larger new model is not run
#: Arguments of `from_pretrained` that the section `model` may hold besides fields of the model's configuration.
LOADING = {
    *("dtype", "attn_implementation", "revision", "code_revision", "gguf_file", "subfolder", "token", "cache_dir"),
    *("local_files_only", "force_download", "proxies", "variant", "use_safetensors", "device_map", "max_memory"),
    *("low_cpu_mem_usage", "trust_remote_code", "offload_folder", "offload_buffers", "use_kernels", "key_mapping"),
    *("tp_plan", "tp_size", "experts_implementation", "ignore_mismatched_sizes", "adapter_kwargs"),
}
FAULTS = (ValueError, TypeError, RuntimeError, AssertionError, IndexError, KeyError, AttributeError, ZeroDivisionError)


def dry_run(data: RunData) -> None:
    """Check what would otherwise fail only after the teacher and earlier stages have been trained.

    Raises:
        ValueError: names the section of the recipe and what is wrong.
    """
    recipe = data.recipe
    if not recipe.trained_stages:
        return
    for stage in recipe.trained_stages:
        args = recipe.training_arguments(stage, recipe.output_dir)
        _check_optimizer(args, stage)
        with locate_errors(stage, ["eval_delay"]):
            _check_delay(data, args, stage)
    with whole_models(), torch.random.fork_rng(devices=[]):
        if "model_name_or_path" in recipe.model:
            _check_loaded(data)
        else:
            _check_scratch(data)


def _check_optimizer(args: TrainingArguments, stage: str) -> None:
    """Make an optimizer and a schedule for one parameter, as the Trainer will."""
    if args.optim_target_modules:
        return  # it needs the model's modules
    model = nn.Linear(1, 1)
    try:
        kind, options = Trainer.get_optimizer_cls_and_kwargs(args, model)
        optimizer = kind(model.parameters(), **options)
    except (*FAULTS, ImportError) as error:
        raise ValueError(
            f"{stage}.optim {args.optim.value!r} and its options cannot be used: {_line(error)}"
        ) from error
    try:
        options = args.lr_scheduler_kwargs or {}
        warmup = args.get_warmup_steps(100)
        get_scheduler(args.lr_scheduler_type, optimizer, warmup, 100, scheduler_specific_kwargs=options)
    except FAULTS as error:
        raise ValueError(
            f"{stage}.lr_scheduler_type {args.lr_scheduler_type.value!r} cannot be used with "
            f"{stage}.lr_scheduler_kwargs {options}: {_line(error)}"
        ) from error


def _check_delay(data: RunData, args: TrainingArguments, stage: str) -> None:
    """Check an `eval_delay` whose units are not those of the length (see `fields.check_evaluated`)."""
    by_epochs = args.eval_strategy == "epoch"
    if not args.eval_delay or args.eval_strategy == "no" or by_epochs != (args.max_steps > 0):
        return
    recipe, rows = data.recipe, len(data.train)
    if stage == "sft" and not recipe.encoder_decoder and not recipe.prompt:  # one row per window
        rows = len(user_windows(data.train_sequences, recipe.data.max_history_items))
    batches = rows / (args.train_batch_size * args.world_size)
    batches = math.floor(batches) if args.dataloader_drop_last else math.ceil(batches)
    steps = max(1, math.ceil(batches / args.gradient_accumulation_steps))
    check_delay(args, args.max_steps / steps if by_epochs else math.ceil(args.num_train_epochs * steps))


def _check_scratch(data: RunData) -> None:
    recipe = data.recipe
    kind = recipe.model.get("model_type", "llama")
    try:
        skeleton = _skeleton(scratch_config(data))
        model = build_model(data) if skeleton.num_parameters() <= SMALL else skeleton
        _check_fit(data, model)
        if model is not skeleton:
            check_exact(make_policy(model, data.catalog), data.encoder)
            data.catalog.to("cpu")
    except FAULTS as error:
        raise ValueError(
            f"The section model (model_type {kind}) makes a model that cannot be used: {_line(error)}"
        ) from error
    _check_adapters(recipe, skeleton)


def _check_loaded(data: RunData) -> None:
    recipe = data.recipe
    if find_adapter_config_file(recipe.local(recipe.model["model_name_or_path"])) is not None:
        return
    if recipe.model.get("trust_remote_code"):
        return
    options = {key: value for key, value in recipe.model.items() if key not in (*QUANTIZATION, "new_tokens")}
    name = recipe.local(options.pop("model_name_or_path"))
    found: Any = load_config(name, return_unused_kwargs=True, **options)
    config, unknown = found
    known = {*LOADING, *QUANTIZATION, "model_name_or_path", "new_tokens", *inspect.signature(type(config)).parameters}
    check_names(unknown, known, "model")
    skeleton = _skeleton(config)
    tokens = max(config.get_text_config().vocab_size, len(data.tokenizer))
    skeleton.resize_token_embeddings(tokens, mean_resizing=False)
    _check_fit(data, skeleton)
    _check_adapters(recipe, skeleton)


def _line(error: Exception) -> str:
    """Type and message of an error on one line (the message of a KeyError is only the key)."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


def _skeleton(config: PreTrainedConfig) -> PreTrainedModel:
    with torch.device("meta"):
        return untrained(config)


def _check_fit(data: RunData, model: PreTrainedModel) -> None:
    """The checks of the trainer's constructor."""
    check_model(model, data.catalog)
    check_encoder(data.encoder, data.catalog, model)


def _check_adapters(recipe: Recipe, skeleton: PreTrainedModel) -> None:
    if recipe.peft_config is None:
        return
    # Some initializations (pissa, olora, mica) decompose the weights, which the skeleton does not have.
    usual = recipe.peft_config.init_lora_weights in (True, False, "gaussian", "orthogonal", "eva")
    try:
        get_peft_model(skeleton, recipe.peft_config if usual else replace(recipe.peft_config, init_lora_weights=True))
    except FAULTS as error:
        raise ValueError(f"The section peft does not fit the model: {_line(error)}") from error
