"""Checks without running a model: can it be a policy on the tree, and are its prompts and rows short enough?

Several branches are scored in one row, so every layer must follow the given mask and positions exactly. Deviations
that the configuration does not reveal are found by `exactness.check_exact`, which runs the model.
"""

from __future__ import annotations

from typing import Any
from weakref import WeakSet

from torch import nn

from gflowtrl.compat import is_stateful

from .masks import layer_reaches
from .modules import forward_parameters, innermost


class TooLongError(ValueError):
    """A prompt or a row is too long for a model: it has too few positions, or computes only shorter rows exactly."""


def check_causal(model: nn.Module) -> None:
    """Check that the layers of a causal model follow the attention mask and the positions.

    Raises:
        ValueError: the model is recurrent, at least in some layers (state-space, linear attention, convolutions), adds
            ALiBi biases, takes no `position_ids`, or sees later tokens too (an encoder).
    """
    model = innermost(model)
    if model in _CHECKED_MODELS:
        return
    if problem := _find_problem(model, model.config.get_text_config()):
        raise ValueError(
            f"{type(model).__name__} {problem}, so it cannot score several items after one prompt. Use a model whose "
            f"layers are all causal attention (Llama, Qwen3, GPT-2, GPT-NeoX, ...), or an encoder-decoder such as T5."
        )
    _CHECKED_MODELS.add(model)


_CHECKED_MODELS: WeakSet[nn.Module] = WeakSet()  # a policy is created at every step, and a model has many modules


def _find_problem(model: nn.Module, config: Any) -> str | None:
    """Return why the model cannot be used, as the predicate of a sentence, or None."""
    if is_stateful(model):
        return "carries a state from token to token, whatever the attention mask says"
    if "position_ids" not in forward_parameters(model):
        return "takes no position_ids"
    attention = getattr(config, "attn_config", None)
    if getattr(config, "alibi", False) or getattr(attention, "alibi", False):
        return "adds ALiBi biases, which depend on a token's column in the row and not on its position"
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else model
    modules = list(decoder.modules())
    if any(isinstance(module, nn.Conv1d) and module.kernel_size != (1,) for module in modules):
        return "has convolutions over neighboring tokens, which ignore the attention mask"
    causal = [module.is_causal for module in modules if hasattr(module, "is_causal")]
    if causal and not any(causal):
        return "sees later tokens too: it is an encoder (some become causal with is_decoder=True in the configuration)"
    try:
        layer_reaches(config)
    except ValueError as error:
        return str(error)
    return None


def max_row_length(model: nn.Module) -> int | None:
    """Return the largest number of columns of a row that the model computes exactly. None: no limit.

    Some attention layers count the columns of a row, whatever the positions are, and are exact only up to a limit:
    GPT-Neo's local layers hide tokens more than `window_size` columns back, and Llama 4's layers without rotary
    positions scale queries by their column from `floor_scale` on.
    """
    config = innermost(model).config.get_text_config()
    if "local" in getattr(config, "attention_layers", ()):
        return config.window_size
    if getattr(config, "attn_temperature_tuning", False) and not all(getattr(config, "no_rope_layers", ())):
        return config.floor_scale - 1
    return None


def check_row_length(model: nn.Module, length: int) -> None:
    """Check that a model computes a row of `length` columns exactly (`max_row_length`).

    Raises:
        TooLongError: the row is longer than the limit; the message says what to change.
    """
    limit = max_row_length(model)
    if limit is not None and length > limit:
        raise TooLongError(
            f"{type(innermost(model)).__name__} has layers that count the columns of a row, and is exact for up to "
            f"{limit}; a prompt and its branches take {length}. Use shorter histories (max_history_items), fewer "
            f"trajectories per prompt (num_generations) or fewer beams."
        )


def check_positions(
    model: nn.Module, prompt_length: int, id_length: int, max_history_items: int | None = None
) -> None:
    """Check that a model has enough positions for a prompt.

    Args:
        model: bare or wrapped.
        prompt_length: number of tokens of the longest prompt.
        id_length: number of tokens of the longest semantic id.
        max_history_items: the encoder's limit that gives the longest prompt, for the message. None: the prompt is one
            of a batch.

    Raises:
        TooLongError: the model has too few positions.
    """
    model = innermost(model)
    config = model.config.get_text_config()
    # The last token of an id is only predicted. The decoder of an encoder-decoder has separate positions for the id.
    needed = prompt_length if model.config.is_encoder_decoder else prompt_length + id_length - 1
    limit = getattr(config, "max_position_embeddings", None) or getattr(config, "n_positions", None)
    relative = model.config.is_encoder_decoder and hasattr(model.config, "relative_attention_num_buckets")  # T5
    if limit is not None and needed > limit and not relative:
        what = "The longest prompt" if max_history_items is None else f"A prompt of {max_history_items} items"
        raise TooLongError(
            f"{what} takes up to {prompt_length} tokens, and with an id {needed}, but {type(model).__name__} has "
            f"{limit} positions. Lower max_history_items, or use a model with more positions (for a new model, "
            f"raise max_position_embeddings)."
        )
    if not model.config.is_encoder_decoder:
        check_row_length(model, needed)
