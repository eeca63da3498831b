"""Positions of the branches in one decoder row: each branch gets the positions it would have in a row of its own.

Causal models take `position_ids`, but encoder-decoders do not: they count along the row, so the second branch of a
packed row would be computed as if it followed the first. `place_branches` adds the keyword `branch_positions` `(S,)`
to a model: the position of every token of the decoder row, including cached tokens. Everything happens inside the
model's own forward, with its own parameters, so sharded parameters, gradients and hooks work as usual:

- **T5 and similar models** add a bias to self-attention that depends on the distance of two tokens in the row. The
  modules that hold this bias look up the distance of the branch positions instead. The keyword is passed through the
  layers, so a layer that gradient checkpointing computes again gives the same result.
- **BART and similar models** add a position vector to each token before the first layer. That lookup is replaced. It
  happens before the checkpointed layers.

Calls without the keyword are unchanged. Only kinds of models that the tests compare with separate rows are accepted,
since a model that ignored the keyword would silently give wrong results.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from gflowtrl.compat import require

from .modules import innermost, mix_in


RELATIVE = ("t5", "mt5", "umt5")
ABSOLUTE = ("bart", "mbart", "pegasus", "marian")


class _PlacedAttention:
    """Mixed into the class of a self-attention that holds a relative position bias."""

    _branch_positions: Tensor | None = None

    def forward(self, *args, branch_positions: Tensor | None = None, **kwargs):
        self._branch_positions = branch_positions
        try:
            return super().forward(*args, **kwargs)
        finally:
            self._branch_positions = None

    def compute_bias(self, query_length: int, key_length: int, device=None, past_seen_tokens: int = 0) -> Tensor:
        """Return the bias `(1, heads, query_length, key_length)` between branch positions.

        The last query of an ordinary row of this length has a key at every possible distance, and its bias is looked
        up by distance. Pairs with a later key get an arbitrary value, since the mask hides them.
        """
        positions = self._branch_positions
        if positions is None:
            return super().compute_bias(query_length, key_length, device=device, past_seen_tokens=past_seen_tokens)
        last = super().compute_bias(1, key_length, device=device, past_seen_tokens=key_length - 1)
        by_distance = last[:, :, 0].flip(-1)
        distance = (positions[-query_length:, None] - positions).clamp(min=0)
        return by_distance[..., distance]


class _PlacedEmbedding:
    """Mixed into the class of a decoder's position embedding."""

    _branch_positions: Tensor | None = None

    def forward(self, *args, **kwargs):
        if self._branch_positions is not None:
            kwargs["position_ids"] = self._branch_positions
        return super().forward(*args, **kwargs)


def _pass_positions(decoder: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
    """Pre-hook of a decoder's forward: set the positions of the new tokens in its position embedding.

    Without `branch_positions` they are None, and the embedding counts along the row.
    """
    positions = kwargs.get("branch_positions")
    if positions is not None:
        positions = positions[-kwargs["input_ids"].shape[1] :]
    decoder.embed_positions._branch_positions = positions


def place_branches(model: nn.Module) -> None:
    """Add the keyword `branch_positions` to an encoder-decoder, in place. A second call changes nothing.

    Raises:
        ValueError: the kind of model is not known to be exact, or its attention does not follow the mask in the
            installed version of transformers.
    """
    model = innermost(model)
    kind = model.config.model_type
    decoder = model.get_decoder() if kind in RELATIVE + ABSOLUTE else None
    if kind in RELATIVE:
        require("transformers", "5.18", f"A tree policy on an encoder-decoder of kind {kind!r}")
        for module in list(decoder.modules()):
            if getattr(module, "has_relative_attention_bias", False) and not isinstance(module, _PlacedAttention):
                mix_in(_PlacedAttention, module)
    elif kind in ABSOLUTE:
        if not isinstance(decoder.embed_positions, _PlacedEmbedding):
            mix_in(_PlacedEmbedding, decoder.embed_positions)
            decoder.register_forward_pre_hook(_pass_positions, with_kwargs=True)
    else:
        raise ValueError(
            f"A tree policy on an encoder-decoder of kind {kind!r} is not known to be exact. Use one of "
            f"{', '.join(RELATIVE + ABSOLUTE)}, or a causal language model."
        )
