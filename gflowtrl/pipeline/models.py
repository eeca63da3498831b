"""Models of the stages: made from scratch or loaded, quantized if the recipe says so, merged with adapters."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from peft import load_peft_weights
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    PreTrainedConfig,
    PreTrainedModel,
    set_seed,
)
from trl import ModelConfig, get_quantization_config

from gflowtrl.data import add_item_tokens
from gflowtrl.finite import check_weights
from gflowtrl.policy import check_causal, load_backbone, whole_models
from gflowtrl.policy.loading import load_adapters, load_tokenizer
from gflowtrl.policy.merging import merge_adapters
from gflowtrl.policy.temperature import read_temperature, set_temperature

from .recipe import QUANTIZATION, Recipe
from .run_data import RunData
from .stage import Stage


def build_model(data: RunData, quantized: bool = True) -> PreTrainedModel:
    """The model before any training: a new one, or a checkpoint with item tokens added.

    The embeddings of item tokens are initialized from the titles if `model.new_tokens` is `titles`.

    Args:
        data: of the run; the seed of its recipe decides all random initial values.
        quantized: False: load the model in its own precision, whatever the recipe says.
    """
    set_seed(data.recipe.seed)
    recipe, options = data.recipe, dict(data.recipe.model)
    if name := options.pop("model_name_or_path", None):
        titles = data.titles if options.pop("new_tokens", "random") == "titles" else None
        options = {key: value for key, value in options.items() if key not in QUANTIZATION}
        options |= quantization(recipe) if quantized else {}
        model = load_backbone(recipe.local(name), **options)
        set_temperature(model, 1.0)  # SFT uses the logits as they are
        if not model.config.is_encoder_decoder:
            check_causal(model)  # SFT would not notice
        # The tokenizer without item tokens, so that they are added as new ones.
        tokenizer = load_tokenizer(**recipe.pretrained)
        add_item_tokens(tokenizer, data.interactions.semantic_ids, model, titles)
        return model
    model = untrained(scratch_config(data))
    if not model.config.is_encoder_decoder:
        check_causal(model)
    return model


def scratch_config(data: RunData) -> PreTrainedConfig:
    """The configuration of a new model."""
    tokenizer, options = data.tokenizer, dict(data.recipe.model)
    special = {f"{kind}_token_id": getattr(tokenizer, f"{kind}_token_id") for kind in ("pad", "bos", "eos")}
    config = AutoConfig.for_model(options.pop("model_type", "llama"), vocab_size=len(tokenizer), **special, **options)
    if config.is_encoder_decoder and getattr(config, "decoder_start_token_id", None) is None:
        config.decoder_start_token_id = tokenizer.pad_token_id  # as in published T5 checkpoints
    return config


def untrained(config: PreTrainedConfig) -> PreTrainedModel:
    """A language model with random weights."""
    return (AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM).from_config(config)


def trained_model(stage: Stage) -> PreTrainedModel:
    """The model of a training stage, unsharded and in evaluation mode."""
    with whole_models():
        model = load_backbone(stage.folder / "model")
    check_weights(model)
    return model.to(stage.context.state.device).eval()


def save_merged(base: Callable[[], PreTrainedModel], adapters: Path, folder: Path) -> None:
    """Merge adapters into the model that they were trained on (`base()`, not quantized), and save it."""
    with whole_models():
        merged = merge_adapters(load_adapters(base(), adapters, load_peft_weights(str(adapters), device="cpu")))
    read_temperature(merged, adapters)
    merged.save_pretrained(folder)


def quantization(recipe: Recipe) -> dict[str, Any]:
    """Arguments of `from_pretrained` for quantized loading, from TRL's fields in the recipe."""
    given = {name: recipe.model[name] for name in QUANTIZATION if name in recipe.model}
    if not given:
        return {}
    dtype = recipe.model.get("dtype", "float32")
    return {"quantization_config": get_quantization_config(ModelConfig(dtype=dtype, **given)), "dtype": dtype}
