"""Merging adapters into their base model, so that the merged model computes what was trained.

Language models often tie their tables: the output head multiplies by the embeddings. An adapter on one of the two (for
example LoRA on `lm_head`) changes the output of that table only, but merged into the shared weight it changes both.
With adapters on both, each table gets the sum. Tables that were trained separately are therefore untied first.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel

from gflowtrl.compat import (
    AuxiliaryTrainingWrapper,
    BaseTunerLayer,
    TrainableTokensWrapper,
    carries_adapters,
    drop_ties,
)

from .temperature import FILE as TEMPERATURE_FILE
from .temperature import write_temperature


def merge_adapters(adapted: PeftModel) -> PreTrainedModel:
    """Merge adapters into their base model and remove PEFT's wrappers.

    A causal model whose embeddings and head were tied and have been trained separately is untied
    (`tie_word_embeddings=False`) and gets one more table. Other models keep their ties.

    Raises:
        ValueError: tied tables of an encoder-decoder were trained separately (`check_mergeable`).
    """
    check_mergeable(adapted)
    base: Any = adapted.get_base_model()
    if not _trained_separately(base):
        return adapted.merge_and_unload()
    head = base.get_output_embeddings()
    inner = _innermost_layer(head)
    inner.weight = nn.Parameter(inner.weight.detach().clone(), requires_grad=inner.weight.requires_grad)
    name = next(name for name, module in base.named_modules() if module is head)
    merged: Any = adapted.merge_and_unload()
    drop_ties(merged, name)
    return merged


def update_adapter_files(model: nn.Module, directory: str | os.PathLike) -> None:
    """Make the adapter files in a folder consistent with the model that was just saved there.

    For a model with adapters, write the temperature next to them. For a whole model, remove adapter files of an
    earlier save; otherwise loading the folder would load those adapters.
    """
    if isinstance(model, PeftModel) or carries_adapters(model):
        write_temperature(model, directory)
        return
    for pattern in ("adapter_config.json", "adapter_model*.safetensors", "adapter_model*.bin", TEMPERATURE_FILE):
        for file in Path(directory).glob(pattern):
            file.unlink()


def check_mergeable(adapted: PeftModel) -> None:
    """Check that merging adapters gives the trained model.

    Raises:
        ValueError: the tables of an encoder-decoder are tied, and only some of them are adapted or copied. They cannot
            be untied, because the decoder computes differently with untied tables (T5 scales its logits).
    """
    base: Any = adapted.get_base_model()
    if base.config.is_encoder_decoder and _trained_separately(base):
        raise ValueError(
            f"The adapters change the tied embeddings of {type(base).__name__} in some places and not in others, so "
            f"they cannot be merged into the shared weight. Remove the embeddings and the head from target_modules, "
            f"modules_to_save and trainable_token_indices. train_item_tokens trains the rows of the items."
        )


def _trained_separately(base: Any) -> bool:
    """Return whether tables that share a weight in the base model differ under its adapters."""
    modules = [base.get_input_embeddings(), base.get_output_embeddings()]
    if base.config.is_encoder_decoder:
        modules += [getattr(stack, "embed_tokens", None) for stack in (base.get_encoder(), base.get_decoder())]
    tables = list({id(module): module for module in modules if module is not None}.values())
    weights = [_innermost_layer(table).weight for table in tables]
    shared = [table for table, w in zip(tables, weights, strict=True) if sum(w is other for other in weights) > 1]
    if not any(isinstance(table, AuxiliaryTrainingWrapper | BaseTunerLayer) for table in shared):
        return False
    # PEFT ties trained rows as well: all wrappers compute with the rows of the first one.
    if not all(isinstance(table, TrainableTokensWrapper) for table in shared):
        return True
    rows = {id(table.token_adapter.trainable_tokens_delta) for table in shared}
    layers = [table.token_adapter.base_layer for table in shared]
    return len(rows) > 1 or any(layer is not _innermost_layer(layer) for layer in layers)


def _innermost_layer(module: Any) -> Any:
    """Return the layer of the base model inside PEFT's wrappers."""
    while isinstance(module, AuxiliaryTrainingWrapper | BaseTunerLayer):
        module = module.original_module if isinstance(module, AuxiliaryTrainingWrapper) else module.get_base_layer()
    return module
