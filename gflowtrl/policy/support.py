"""Which causal models can be read as a policy on the tree, as far as it shows without running them.

Several branches are scored in one row, so a layer has to see just what the mask says, at the positions that it is
given. What cannot be told from the outside is found by `exactness.check_exact`, which runs the model.
"""

from __future__ import annotations

from typing import Any
from weakref import WeakSet

from torch import nn

from gflowtrl.compat import is_stateful

from .masks import layer_reaches
from .modules import forward_parameters, innermost


class TooLongError(ValueError):
    """A prompt or a row is longer than a model has positions, or computes exactly."""


def check_causal(model: nn.Module) -> None:
    """Refuse a causal model whose layers see something else than an attention mask and positions say.

    Raises:
        ValueError: the model is recurrent, wholly or in some layers (state-space, linear attention, convolutions); it
            adds ALiBi biases, takes no `position_ids`, or sees later tokens too (an encoder).
    """
    model = innermost(model)
    if model in _FOUND_CAUSAL:
        return
    reason = _reason(model, model.config.get_text_config())
    if reason:
        raise ValueError(
            f"{type(model).__name__} {reason}, so several items cannot be scored behind one prompt. Use a model whose "
            "layers all are causal attention (Llama, Qwen3, GPT-2, GPT-NeoX, ...), or an encoder-decoder such as T5."
        )
    _FOUND_CAUSAL.add(model)


_FOUND_CAUSAL: WeakSet[nn.Module] = WeakSet()  # a policy is made at every step, and a model has many parts


def _reason(model: nn.Module, config: Any) -> str | None:
    """Why the model cannot be read, as the predicate of a sentence; None where nothing speaks against it."""
    if is_stateful(model):
        return "carries a state from token to token, past the attention mask"
    if "position_ids" not in forward_parameters(model):
        return "takes no position_ids"
    attention = getattr(config, "attn_config", None)
    if getattr(config, "alibi", False) or getattr(attention, "alibi", False):
        return "adds ALiBi biases, which follow a token's place in the row and not its position"
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else model
    parts = list(decoder.modules())
    if any(isinstance(part, nn.Conv1d) and part.kernel_size != (1,) for part in parts):
        return "has convolutions over neighboring tokens, which know no attention mask"
    causal = [part.is_causal for part in parts if hasattr(part, "is_causal")]
    if causal and not any(causal):
        return "sees later tokens too: it is an encoder (some take is_decoder=True in their configuration)"
    try:
        layer_reaches(config)
    except ValueError as error:
        return str(error)
    return None


def max_row_length(model: nn.Module) -> int | None:
    """How many columns a row may have at most, None without limit.

    Some attention counts the columns of a row whatever positions say, beyond a limit of its own: GPT-Neo's local
    layers hide what lies more than `window_size` columns back, and Llama 4's layers without rotary positions scale
    queries by their column from `floor_scale` on. Up to there they are exact.
    """
    config = innermost(model).config.get_text_config()
    if "local" in getattr(config, "attention_layers", ()):
        return config.window_size
    if getattr(config, "attn_temperature_tuning", False) and not all(getattr(config, "no_rope_layers", ())):
        return config.floor_scale - 1
    return None


def check_row_length(model: nn.Module, length: int) -> None:
    """Refuse a row that a model would not compute exactly (`max_row_length`).

    Raises:
        TooLongError: it has more columns; the message says what to change.
    """
    limit = max_row_length(model)
    if limit is not None and length > limit:
        raise TooLongError(
            f"{type(innermost(model)).__name__} has layers that count the columns of a row, and is exact for up to "
            f"{limit}; a prompt and its branches take {length}. Use shorter histories (max_history_items) or fewer "
            f"trajectories per prompt (num_generations) and beams."
        )


def max_positions(model: nn.Module) -> int | None:
    """How many positions a model has, None without limit (T5 and its kin count distances)."""
    config = innermost(model).config
    if config.is_encoder_decoder and hasattr(config, "relative_attention_num_buckets"):
        return None
    config = config.get_text_config()
    return getattr(config, "max_position_embeddings", None) or getattr(config, "n_positions", None)


def check_positions(
    model: nn.Module, prompt_length: int, id_length: int, max_history_items: int | None = None
) -> None:
    """Refuse prompts that are longer than a model.

    Args:
        model: bare or wrapped.
        prompt_length: tokens of the longest prompt.
        id_length: tokens of the longest id.
        max_history_items: of the encoder whose longest prompt it is, for the message; None: of a prompt at hand.

    Raises:
        TooLongError: the model has too few positions.
    """
    model = innermost(model)
    # The last token of an id is only predicted; an encoder-decoder has positions of its own for the id.
    needed = prompt_length if model.config.is_encoder_decoder else prompt_length + id_length - 1
    limit = max_positions(model)
    if limit is not None and needed > limit:
        what = "The longest prompt" if max_history_items is None else f"A prompt of {max_history_items} items"
        raise TooLongError(
            f"{what} takes up to {prompt_length} tokens, and with an id {needed}, but "
            f"{type(model).__name__} has {limit} positions. Lower max_history_items, or use a model with more "
            f"(max_position_embeddings, where it is made from scratch)."
        )
    if not model.config.is_encoder_decoder:
        check_row_length(model, needed)
