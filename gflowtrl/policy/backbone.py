"""Loading a causal language model or an encoder-decoder by its name."""

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
    """Load a causal or an encoder-decoder language model, whichever the folder or name contains.

    For a folder of adapters, their base model is loaded and the adapters are merged into it. The result is trained and
    saved as a whole. Nothing can be merged into a quantized base: the adapters are added to it and frozen.

    Args:
        name: folder or name, as for `from_pretrained`, of a model or of adapters.
        **model_kwargs: passed to `from_pretrained`. A model from a `gguf_file` is dequantized. Python code that comes
            with the model runs only with `trust_remote_code=True`.

    Raises:
        OSError: the model does not exist.
        ValueError: the weights are not those of the model (`loading.load_weights`), the adapters are prompts (for
            example prompt tuning), which cannot be merged, or the base is quantized and the installed version of
            transformers would not load the adapters' item tokens.
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
    return _dequantized(model) if "gguf_file" in model_kwargs else model


def _load_adapted(name: str | os.PathLike, where: dict[str, Any], model_kwargs: dict[str, Any]) -> PreTrainedModel:
    """Load the base model of adapters, which may itself be a folder of adapters, and merge the adapters into it."""
    adapters = PeftConfig.from_pretrained(name, **where)
    if adapters.is_prompt_learning:
        raise ValueError(
            f"{name} holds {adapters.peft_type.value} adapters, which are prompts and cannot be merged into a model. "
            f"Train adapters of its weights instead (for example with LoraConfig)."
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
    for key, parameter in model.named_parameters():  # PEFT has frozen all parameters
        parameter.requires_grad_(key not in frozen)
    # Adapters that are added next must refer to these merged adapters, not to the base model without them.
    set_name_or_path(model, name)
    read_temperature(model, name, **where)
    return model


def _resize_embeddings(model: PreTrainedModel, adapters: Mapping[str, Tensor]) -> None:
    """Resize the embeddings to the number of rows in the saved adapters.

    The adapters contain the whole embeddings if tokens were added to the base model before the training.
    """
    table = model.get_input_embeddings()
    name = next(key for key, module in model.named_modules() if module is table)
    for key, value in adapters.items():
        is_table = f".{name}." in key and key.endswith(".weight") and value.shape[1:] == table.weight.shape[1:]
        if is_table and len(value) != len(table.weight):
            model.resize_token_embeddings(len(value), mean_resizing=False)  # new rows are overwritten
            return


def _dequantized(model: PreTrainedModel) -> PreTrainedModel:
    """Copy a model from a GGUF file to an ordinary model.

    transformers reads the weights into ordinary tensors, but still treats the model as quantized, so that it could
    neither be trained nor saved.
    """
    config = copy.deepcopy(model.config)
    del config.quantization_config
    plain = type(model)(config).to(model.dtype)
    plain.load_state_dict(model.state_dict())
    plain.generation_config = model.generation_config
    return plain.eval()


def merge_tied_embeddings(model: PreTrainedModel) -> None:
    """Replace the embeddings of an encoder-decoder that share one weight by one module, in place.

    The outputs do not change. FSDP2 does not support a weight that belongs to several modules.
    """
    first = model.get_input_embeddings()
    if not model.config.is_encoder_decoder:
        return
    for stack in (model.get_encoder(), model.get_decoder()):
        table = getattr(stack, "embed_tokens", None)
        same_scale = getattr(table, "embed_scale", None) == getattr(first, "embed_scale", None)
        if type(table) is type(first) and table.weight is first.weight and same_scale:
            stack.embed_tokens = first
