"""Attention masks for layers that see only part of the preceding tokens: sliding windows and chunks.

Many models mix layers that see everything with layers that see the last `sliding_window` positions, or the positions
of the current chunk. transformers hides the other positions in the mask that it creates. It does not change a 4-D
mask, so a packed row needs one mask per kind of layer. Distances are counted in positions, that is along a branch, and
not in columns of the row, where the tokens of other branches are between a token and its prompt.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor


class Reach(NamedTuple):
    """How far a kind of layer sees. None: no limit.

    Attributes:
        window: a token sees the last `window` positions, its own included.
        chunk: a token sees the positions p in its own chunk, p // chunk.
    """

    window: int | None = None
    chunk: int | None = None

    def limits(self, num_positions: int) -> bool:
        """Return whether it hides anything in sequences of at most `num_positions` tokens."""
        return any(size is not None and size < num_positions for size in self)

    def sees(self, queries: Tensor, keys: Tensor) -> Tensor:
        """Return whether each key is within reach of each query: positions `(B, Q)`, `(B, S)` -> `bool (B, Q, S)`."""
        near = torch.ones(1, 1, 1, dtype=torch.bool, device=queries.device)
        if self.window is not None:
            near = near & (queries[:, :, None] - keys[:, None] < self.window)
        if self.chunk is not None:
            near = near & (queries[:, :, None] // self.chunk == keys[:, None] // self.chunk)
        return near


#: Kinds of layers in `config.layer_types` whose attention follows the mask exactly.
FULL, SLIDING, CHUNKED = "full_attention", "sliding_attention", "chunked_attention"


def layer_reaches(config: Any) -> dict[str, Reach]:
    """Return the kinds of attention layers of a model and the reach of each.

    Args:
        config: the model's configuration.

    Raises:
        ValueError: a kind of layer is not attention, or its mask is unknown. The message is the predicate of a
            sentence about the model.
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
            raise ValueError(f"has layers of kind {kind!r}, which do not follow an attention mask exactly")
    return {kind: known[kind] for kind in kinds}


def attention_mask(
    visible: Tensor, queries: Tensor, keys: Tensor, reaches: dict[str, Reach], dtype: torch.dtype
) -> Tensor | dict[str, Tensor]:
    """Return the model's `attention_mask` with which each token sees what it would see in a row of its own.

    Args:
        visible: `bool (B, Q, S)`, whether each key is the token itself or precedes it in its branch.
        queries, keys: their positions, `(B, Q)` and `(B, S)`.
        reaches: the model's kinds of layers (`layer_reaches`).
        dtype: the model's dtype.

    Returns:
        One additive mask `(B, 1, Q, S)`, or one per kind of layer if they differ.
    """
    # S is an upper bound of the positions, so the largest one need not be read from the device.
    if not any(reach.limits(visible.shape[2]) for reach in reaches.values()):
        return additive(visible, dtype)
    masks = {kind: additive(visible & reach.sees(queries, keys), dtype) for kind, reach in reaches.items()}
    return masks if len(masks) > 1 else next(iter(masks.values()))


def additive(visible: Tensor, dtype: torch.dtype) -> Tensor:
    """Convert `bool (B, Q, S)` to an additive mask `(B, 1, Q, S)`: 0 where visible, the dtype's minimum elsewhere."""
    mask = torch.zeros(visible.shape, dtype=dtype, device=visible.device)
    return mask.masked_fill_(~visible, torch.finfo(dtype).min)[:, None]
