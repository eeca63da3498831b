"""Load a language model of either kind by its name."""

from __future__ import annotations

import os
from typing import Any

from peft import PeftConfig
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM, PreTrainedModel
from transformers.utils.peft_utils import find_adapter_config_file


# Arguments of `from_pretrained` that say where the files lie, and so hold for the configuration as for the model.
_WHERE = ("cache_dir", "force_download", "local_files_only", "revision", "subfolder", "token")


def load_backbone(name: str | os.PathLike, **model_kwargs: Any) -> PreTrainedModel:
    """A causal or an encoder-decoder language model, whichever the folder or name holds.

    Args:
        name: folder or name, as for `from_pretrained`; a folder of adapters stands for its base model with them.
        **model_kwargs: handed to `from_pretrained`.

    Raises:
        OSError: there is no such model.
    """
    where = {key: model_kwargs[key] for key in _WHERE if key in model_kwargs}
    base, base_where = name, where
    if find_adapter_config_file(name, **where) is not None:
        base, base_where = PeftConfig.from_pretrained(name, **where).base_model_name_or_path, {}
    trusted = model_kwargs.get("trust_remote_code", False)
    config = AutoConfig.from_pretrained(base, trust_remote_code=trusted, **base_where)
    loader = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    return loader.from_pretrained(name, **model_kwargs)


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
