"""Load a language model of either kind by its name."""

from __future__ import annotations

import copy
import os
from collections.abc import Mapping
from typing import Any

from peft import PeftConfig, load_peft_weights
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, PreTrainedModel

from gflowtrl.compat import find_adapter_config_file, require, set_name_or_path, whole_models

from .loading import WHERE, load_adapters, load_config, load_weights
from .merging import merge_adapters
from .temperature import read_temperature


def load_backbone(name: str | os.PathLike, **model_kwargs: Any) -> PreTrainedModel:
    """A causal or an encoder-decoder language model, whichever the folder or name holds.

    A folder of adapters stands for its base model with them: they are merged into it, and the result is trained and
    saved as a whole. Into a quantized base nothing can be merged: the adapters lie on it, frozen.

    Args:
        name: folder or name, as for `from_pretrained`, of a model or of adapters.
        **model_kwargs: handed to `from_pretrained`. What `gguf_file` names is no longer quantized afterwards. Code
            that comes with the model runs only with `trust_remote_code=True`.

    Raises:
        OSError: there is no such model.
        ValueError: the weights are not those of the model (`loading.load_weights`); the adapters are prompts (prompt
            tuning, say), which cannot be merged; or the base is quantized, and the installed version of transformers
            would leave out the adapters' item tokens.
    """
    where = {key: model_kwargs[key] for key in WHERE if key in model_kwargs}
    if find_adapter_config_file(name, **where) is not None:
        with whole_models():  # merging needs whole weights; an engine shards them afterwards
            return _load_adapted(name, where, model_kwargs)
    if "gguf_file" in model_kwargs:
        where |= {"gguf_file": model_kwargs["gguf_file"]}
    config = load_config(name, model_kwargs.get("trust_remote_code", False), **where)
    loader = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    model = load_weights(loader, name, **model_kwargs)
    return _as_if_never_quantized(model) if "gguf_file" in model_kwargs else model


def _load_adapted(name: str | os.PathLike, where: dict[str, Any], model_kwargs: dict[str, Any]) -> PreTrainedModel:
    """The base model of adapters, which may itself be a folder of adapters, with these merged."""
    adapters = PeftConfig.from_pretrained(name, **where)
    if adapters.is_prompt_learning:
        raise ValueError(
            f"{name} holds {adapters.peft_type.value} adapters, which are prompts and cannot be merged into a model. "
            f"Train adapters of its weights instead (LoraConfig, say)."
        )
    options = {key: value for key, value in model_kwargs.items() if key not in ("revision", "subfolder")}
    if adapters.revision is not None:
        options["revision"] = adapters.revision
    model = load_backbone(adapters.base_model_name_or_path, **options)
    saved = load_peft_weights(name, device="cpu", **where)
    _resize_embeddings(model, saved)
    if getattr(model, "hf_quantizer", None) is not None:
        require("transformers", "5.18", "A folder of adapters on a quantized model")  # it loads the item tokens
        model.load_adapter(os.fspath(name), adapter_kwargs=where)
        read_temperature(model, name, **where)
        return model
    if model.config.is_encoder_decoder:
        require("peft", "0.21.2", "Adapters on an encoder-decoder")
    frozen = {key for key, parameter in model.named_parameters() if not parameter.requires_grad}
    model = merge_adapters(load_adapters(model, name, saved, **where))
    for key, parameter in model.named_parameters():  # PEFT has frozen all of them
        parameter.requires_grad_(key not in frozen)
    # The base of adapters that are put on it next: not the base below, which knows nothing of these.
    set_name_or_path(model, name)
    read_temperature(model, name, **where)
    return model


def _resize_embeddings(model: PreTrainedModel, adapters: Mapping[str, Tensor]) -> None:
    """To as many rows as the saved adapters hold: they hold the whole embeddings where tokens were added to the base
    before the training."""
    table = model.get_input_embeddings()
    name = next(key for key, module in model.named_modules() if module is table)
    for key, value in adapters.items():
        is_table = f".{name}." in key and key.endswith(".weight") and value.shape[1:] == table.weight.shape[1:]
        if is_table and len(value) != len(table.weight):
            model.resize_token_embeddings(len(value), mean_resizing=False)  # new rows are overwritten
            return


def _as_if_never_quantized(model: PreTrainedModel) -> PreTrainedModel:
    """transformers reads the weights of a GGUF file into ordinary tensors, and then refuses to train or save them."""
    config = copy.deepcopy(model.config)
    del config.quantization_config
    plain = type(model)(config).to(model.dtype)
    plain.load_state_dict(model.state_dict())
    plain.generation_config = model.generation_config
    return plain.eval()


def merge_tied_embeddings(model: PreTrainedModel) -> None:
    """Make the embeddings of an encoder-decoder that share one weight one module, in place. Nothing is computed
    otherwise; FSDP2 refuses a weight that belongs to several modules."""
    first = model.get_input_embeddings()
    if not model.config.is_encoder_decoder:
        return
    for part in (model.get_encoder(), model.get_decoder()):
        own = getattr(part, "embed_tokens", None)
        same_scale = getattr(own, "embed_scale", None) == getattr(first, "embed_scale", None)
        if type(own) is type(first) and own.weight is first.weight and same_scale:
            part.embed_tokens = first
