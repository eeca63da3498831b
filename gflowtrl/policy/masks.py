"""Layers that see a part of what precedes a token: sliding windows and chunks.

Many models mix layers that see everything with layers that see the last `sliding_window` positions, or the positions
of their own chunk. transformers hides the rest by the mask that it makes itself; it takes a mask that is 4-D as it is,
so a packed row needs one mask per kind of layer. Distances are counted in positions, that is along a branch, and not
in columns of the row, in which other branches lie between a token and its prompt.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor


class Reach(NamedTuple):
    """How far a kind of layer sees; None means without limit.

    Attributes:
        window: a token sees the last `window` positions, its own included.
        chunk: a token sees the positions p with p // chunk equal to that of its own.
    """

    window: int | None = None
    chunk: int | None = None

    def limits(self, num_positions: int) -> bool:
        """Whether it hides anything in sequences of at most `num_positions` tokens."""
        return any(size is not None and size < num_positions for size in self)

    def sees(self, queries: Tensor, keys: Tensor) -> Tensor:
        """Positions `(B, Q)`, `(B, S)` -> `bool (B, Q, S)`: is the key near enough?"""
        near = torch.ones(1, 1, 1, dtype=torch.bool, device=queries.device)
        if self.window is not None:
            near = near & (queries[:, :, None] - keys[:, None] < self.window)
        if self.chunk is not None:
            near = near & (queries[:, :, None] // self.chunk == keys[:, None] // self.chunk)
        return near


#: Kinds of layers whose attention sees what a mask says, as `config.layer_types` calls them.
FULL, SLIDING, CHUNKED = "full_attention", "sliding_attention", "chunked_attention"


def layer_reaches(config: Any) -> dict[str, Reach]:
    """The kinds of attention layers of a model, and how far each sees.

    Args:
        config: of the model, as transformers has it.

    Raises:
        ValueError: a kind of layer that is not attention, or whose mask is not known here.
    """
    config = config.get_text_config()
    window = getattr(config, "sliding_window", None)
    chunk = getattr(config, "attention_chunk_size", None)
    known = {FULL: Reach(), SLIDING: Reach(window=window), CHUNKED: Reach(chunk=chunk)}
    kinds = list(dict.fromkeys(getattr(config, "layer_types", None) or ()))
    if not kinds:
        kinds = [FULL if window is None and chunk is None else CHUNKED if window is None else SLIDING]
    for kind in kinds:
        if kind not in known:
            raise ValueError(f"has layers of kind {kind!r}, which do not see just what an attention mask says")
    return {kind: known[kind] for kind in kinds}


def attention_mask(
    visible: Tensor, queries: Tensor, keys: Tensor, reaches: dict[str, Reach], dtype: torch.dtype
) -> Tensor | dict[str, Tensor]:
    """What a model takes as `attention_mask` so that each token sees what it would see alone behind its prompt.

    Args:
        visible: `bool (B, Q, S)`, which tokens precede each in its branch, and itself.
        queries, keys: their positions, `(B, Q)` and `(B, S)`.
        reaches: of the model's kinds of layers (`layer_reaches`).
        dtype: of the model.

    Returns:
        one additive mask `(B, 1, Q, S)`, or one per kind of layer where they differ.
    """
    # S bounds the number of positions: nobody has to wait for a device to learn the largest one.
    if not any(reach.limits(visible.shape[2]) for reach in reaches.values()):
        return additive(visible, dtype)
    masks = {kind: additive(visible & reach.sees(queries, keys), dtype) for kind, reach in reaches.items()}
    return masks if len(masks) > 1 else next(iter(masks.values()))


def additive(visible: Tensor, dtype: torch.dtype) -> Tensor:
    """`bool (B, Q, S)` -> additive mask `(B, 1, Q, S)`: 0 where visible, the dtype's minimum elsewhere."""
    mask = torch.zeros(visible.shape, dtype=dtype, device=visible.device)
    return mask.masked_fill_(~visible, torch.finfo(dtype).min)[:, None]
