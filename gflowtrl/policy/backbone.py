"""Load a language model of either kind by its name."""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from peft import PeftConfig
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM, PreTrainedModel
from transformers.integrations import deepspeed as zero
from transformers.utils.peft_utils import find_adapter_config_file


# Arguments of `from_pretrained` that say where the files lie, and so hold for the configuration as for the model.
_WHERE = ("cache_dir", "force_download", "local_files_only", "revision", "subfolder", "token")


def load_backbone(name: str | os.PathLike, **model_kwargs: Any) -> PreTrainedModel:
    """A causal or an encoder-decoder language model, whichever the folder or name holds.

    Args:
        name: folder or name, as for `from_pretrained`; a folder of adapters stands for its base model with them.
        **model_kwargs: handed to `from_pretrained`. What `gguf_file` names is no longer quantised afterwards.

    Raises:
        OSError: there is no such model.
    """
    where = {key: model_kwargs[key] for key in _WHERE if key in model_kwargs}
    base, base_where = name, where
    if find_adapter_config_file(name, **where) is not None:
        base, base_where = PeftConfig.from_pretrained(name, **where).base_model_name_or_path, {}
    trusted = model_kwargs.get("trust_remote_code", False)
    if "gguf_file" in model_kwargs:
        base_where = base_where | {"gguf_file": model_kwargs["gguf_file"]}
    config = AutoConfig.from_pretrained(base, trust_remote_code=trusted, **base_where)
    loader = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    model = loader.from_pretrained(name, **model_kwargs)
    return _as_if_never_quantised(model) if "gguf_file" in model_kwargs else model


def _as_if_never_quantised(model: PreTrainedModel) -> PreTrainedModel:
    """transformers reads the weights of a GGUF file into ordinary tensors, and then refuses to train or save them."""
    config = copy.deepcopy(model.config)
    del config.quantization_config
    plain = type(model)(config).to(model.dtype)
    plain.load_state_dict(model.state_dict())
    plain.generation_config = model.generation_config
    return plain.eval()


@contextmanager
def whole_models() -> Iterator[None]:
    """Within, models are loaded and adapted whole in every process, where ZeRO-3 or FSDP would have them in parts.

    Meant for models that no engine will take over: frozen ones, and those that are evaluated.
    """
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
