"""PEFT adapters on a recommender, with trainable embeddings of the item tokens (new tokens would not be learned)."""

from __future__ import annotations

import copy
import os
import re
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

from accelerate.utils import str_to_bool
from peft import PeftConfig, PeftModel, get_peft_model
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from transformers import PreTrainedModel

from gflowtrl.catalog import ItemCatalog
from gflowtrl.compat import TrainableTokensWrapper, require
from gflowtrl.policy import merge_tied_embeddings, whole_models
from gflowtrl.policy.merging import check_mergeable
from gflowtrl.policy.modules import mix_in
from gflowtrl.policy.restricted_head import keep_head_bias


if TYPE_CHECKING:
    WrapperBase = TrainableTokensWrapper
else:
    WrapperBase = object  # mixed into wrappers at runtime


def add_adapters(
    model: PreTrainedModel, peft_config: PeftConfig, catalog: ItemCatalog, train_item_tokens: bool = True
) -> PeftModel:
    """Add adapters to a model and make the embeddings of the catalog's tokens trainable, at input and output.

    This uses PEFT's `trainable_token_indices`, so a saved adapter contains only these rows and PEFT alone can load it.
    A configuration that names the embeddings itself (in `trainable_token_indices`, `modules_to_save` or
    `target_modules`) is used unchanged, and so is an adapter type that has no such field.

    Args:
        model: the language model.
        peft_config: the user's configuration; it is not modified.
        catalog: the catalog whose tokens are trained.
        train_item_tokens: False: the embeddings stay frozen.
    """
    if model.config.is_encoder_decoder:
        require("peft", "0.21.2", "Adapters on an encoder-decoder")
    config: Any = copy.deepcopy(peft_config)
    if train_item_tokens and hasattr(config, "trainable_token_indices") and not _names_embeddings(config, model):
        tokens = catalog.tree.tokens.tolist()
        names = embedding_names(model)
        config.trainable_token_indices = tokens if len(names) == 1 else dict.fromkeys(names, tokens)
    elif not train_item_tokens:
        merge_tied_embeddings(model)
    tables = [model.get_submodule(name).weight for name in embedding_names(model)]
    # Under ZeRO-3, PEFT would read the tokens' rows in a way that needs the whole model on a CUDA device.
    with whole_models(), gathered(tables):
        adapted = get_peft_model(model, config)
    check_mergeable(adapted)
    keep_head_bias(adapted)
    if str_to_bool(os.environ.get("ACCELERATE_USE_FSDP", "false")):
        _tie_wrappers(model)
    return adapted


class _TiedTokens(WrapperBase):
    """Mixin for PEFT's wrapper of tied embeddings: until it is sharded, `weight` is the shared base weight (PEFT would
    return a new tensor for each access), so that accelerate shards all modules that share it together."""

    @property
    def weight(self) -> Tensor:
        layer: Any = self.token_adapter
        return (
            layer.get_merged_weights(self.active_adapters) if isinstance(self, FSDPModule) else layer.base_layer.weight
        )


def _tie_wrappers(model: PreTrainedModel) -> None:
    wrappers = [model.get_input_embeddings(), model.get_output_embeddings()]
    if not all(isinstance(wrapper, TrainableTokensWrapper) for wrapper in wrappers):
        return
    if wrappers[0].token_adapter.base_layer.weight is wrappers[1].token_adapter.base_layer.weight:
        if model.config.is_encoder_decoder:
            for part in (model.get_encoder(), model.get_decoder()):
                part.embed_tokens = wrappers[0]
        for wrapper in wrappers:
            mix_in(_TiedTokens, wrapper)


def gathered(parameters: list[Any]) -> AbstractContextManager:
    """Context manager: gather the parameters that ZeRO-3 has sharded."""
    sharded = [parameter for parameter in parameters if hasattr(parameter, "ds_id")]
    if not sharded:
        return nullcontext()
    import deepspeed  # only if it is in use

    return deepspeed.zero.GatheredParameters(sharded)


def embedding_names(model: PreTrainedModel) -> list[str]:
    """Return the names of the modules with one row per token; modules that share a weight have a single name."""
    if model.config.tie_word_embeddings:
        modules = [model.get_input_embeddings()]  # PEFT handles the tied output
    elif model.config.is_encoder_decoder:
        modules = [model.get_encoder().embed_tokens, model.get_decoder().embed_tokens, model.get_output_embeddings()]
    else:
        modules = [model.get_input_embeddings(), model.get_output_embeddings()]
    names = {id(module): name for name, module in model.named_modules()}
    return [names[id(module)] for module in modules]


def _names_embeddings(config: Any, model: PreTrainedModel) -> bool:
    """Return whether a PEFT configuration says itself how the embeddings are trained."""
    if config.trainable_token_indices is not None:
        return True
    tables = [model.get_input_embeddings(), model.get_output_embeddings()]
    names = {*embedding_names(model), *(name for name, module in model.named_modules() if module in tables)}
    last = {name.rpartition(".")[2] for name in names}
    named = [getattr(config, field, None) or [] for field in ("modules_to_save", "target_modules")]
    if isinstance(named[1], str):  # a pattern; "all-linear" excludes the output head
        return any(re.fullmatch(named[1], name) for name in names)
    return any(last & {n.rpartition(".")[2] for n in chosen} for chosen in named)
