"""Adapters merged into their base model, so that the result computes what was trained.

A language model often ties its tables: the output head multiplies by the embeddings. An adapter on one of the two
(LoRA on `lm_head`, say) changes what that table does and not the other, but its product merged into the shared weight
changes both; with adapters on both, each table gets the sum. So tables that were trained apart are untied before.
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
    """Merge adapters into their base model and take the wrappers off.

    A causal model whose embeddings and head were tied and have been trained apart comes out untied
    (`tie_word_embeddings=False`), with a table more; every other one as it went in.

    Raises:
        ValueError: tables of an encoder-decoder were tied and trained apart (`check_mergeable`).
    """
    check_mergeable(adapted)
    base: Any = adapted.get_base_model()
    if _trained_apart(base):
        head = base.get_output_embeddings()
        inner = _innermost_layer(head)
        inner.weight = nn.Parameter(inner.weight.detach().clone(), requires_grad=inner.weight.requires_grad)
        name = next(name for name, module in base.named_modules() if module is head)
        merged: Any = adapted.merge_and_unload()
        drop_ties(merged, name)
        return merged
    return adapted.merge_and_unload()


def settle_adapter_files(model: nn.Module, directory: str | os.PathLike) -> None:
    """After a model was saved: let its folder say of adapters what is true.

    With adapters the temperature is written beside them. Of a whole model, files of adapters that an earlier save has
    left in the folder are removed: whoever loads it would get those adapters.
    """
    if isinstance(model, PeftModel) or carries_adapters(model):
        write_temperature(model, directory)
        return
    for pattern in ("adapter_config.json", "adapter_model*.safetensors", "adapter_model*.bin", TEMPERATURE_FILE):
        for file in Path(directory).glob(pattern):
            file.unlink()


def check_mergeable(adapted: PeftModel) -> None:
    """Refuse adapters that would not be the trained model once they are merged.

    Raises:
        ValueError: the tables of an encoder-decoder are tied, and some of them are adapted or copied by themselves. As
            its decoder computes otherwise with untied tables (T5 scales its logits), they cannot be untied.
    """
    base: Any = adapted.get_base_model()
    if base.config.is_encoder_decoder and _trained_apart(base):
        raise ValueError(
            f"The adapters change the tied embeddings of {type(base).__name__} in one place and not in the others, so "
            f"they cannot be merged into the weight that these places share. Take the embeddings and the head out of "
            f"target_modules, modules_to_save and trainable_token_indices: train_item_tokens trains the items' rows."
        )


def _trained_apart(base: Any) -> bool:
    """Whether tables that share a weight in the base model are no longer one under its adapters."""
    places = [base.get_input_embeddings(), base.get_output_embeddings()]
    if base.config.is_encoder_decoder:
        places += [getattr(part, "embed_tokens", None) for part in (base.get_encoder(), base.get_decoder())]
    tables = list({id(place): place for place in places if place is not None}.values())
    weights = [_innermost_layer(table).weight for table in tables]
    shared = [table for table, w in zip(tables, weights, strict=True) if sum(w is other for other in weights) > 1]
    if not any(isinstance(table, AuxiliaryTrainingWrapper | BaseTunerLayer) for table in shared):
        return False
    # PEFT's trained rows follow the tie: all wrappers compute with the rows of the first.
    if not all(isinstance(table, TrainableTokensWrapper) for table in shared):
        return True
    rows = {id(table.token_adapter.trainable_tokens_delta) for table in shared}
    return len(rows) > 1 or any(not _is_plain(table.token_adapter.base_layer) for table in shared)


def _innermost_layer(module: Any) -> Any:
    """The layer of the base model inside PEFT's wrappers."""
    while isinstance(module, AuxiliaryTrainingWrapper | BaseTunerLayer):
        module = module.original_module if isinstance(module, AuxiliaryTrainingWrapper) else module.get_base_layer()
    return module


def _is_plain(module: Any) -> bool:
    return not isinstance(module, AuxiliaryTrainingWrapper | BaseTunerLayer)
