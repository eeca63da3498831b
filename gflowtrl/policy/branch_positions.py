"""Branches of one decoder row at the positions they would have alone.

Causal models take `position_ids`; encoder-decoders do not: they count along the row, so the second branch of a packed
row would be computed as if it followed the first. `place_branches` teaches a model the keyword `branch_positions`
`(S,)`, the position of every token of the decoder row, cached ones included. Everything happens inside the model's own
forward, with its own parameters, so sharded parameters, gradients and hooks are met where they always are:

- **T5 and its kin** add a bias to self-attention that depends on the distance of two tokens in the row. The modules
  that own this bias look up the distance of the branch positions instead. The keyword travels through the layers, so
  a layer that is computed a second time by gradient checkpointing computes the same.
- **BART and its kin** add a vector for the position to each token before the first layer; that lookup is replaced. It
  stands before the checkpointed layers.

Calls without the keyword are untouched. Only kinds of models that tests compare with the naive way are accepted: a
model that ignored the keyword would be silently wrong.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from gflowtrl.compat import require

from .modules import innermost, mix_in


RELATIVE = ("t5", "mt5", "umt5")
ABSOLUTE = ("bart", "mbart", "pegasus", "marian")


class _PlacedAttention:
    """Mixed into the class of a self-attention that owns a relative position bias."""

    _branch_positions: Tensor | None = None

    def forward(self, *args, branch_positions: Tensor | None = None, **kwargs):
        self._branch_positions = branch_positions
        try:
            return super().forward(*args, **kwargs)
        finally:
            self._branch_positions = None

    def compute_bias(self, query_length: int, key_length: int, device=None, past_seen_tokens: int = 0) -> Tensor:
        """The bias `(1, heads, query_length, key_length)` between branch positions.

        The last query of an ordinary row of this length meets every distance that can occur; its entries are put where
        they belong. Pairs in which the key comes later get any value: the mask hides them.
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


def _hand_over_positions(decoder: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
    """Before a decoder's forward: tell its position embedding where the new tokens stand; None is the usual way."""
    positions = kwargs.get("branch_positions")
    if positions is not None:
        positions = positions[-kwargs["input_ids"].shape[1] :]
    decoder.embed_positions._branch_positions = positions


def place_branches(model: nn.Module) -> None:
    """Teach an encoder-decoder the keyword `branch_positions`, in place. A second call changes nothing.

    Raises:
        ValueError: a kind of model for which nobody has checked that branches are placed exactly, or one whose
            attention in the installed version of transformers does not do what its mask says.
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
            decoder.register_forward_pre_hook(_hand_over_positions, with_kwargs=True)
    else:
        raise ValueError(
            f"A tree policy on an encoder-decoder of kind {kind!r} is not known to be exact. Use one of "
            f"{', '.join(RELATIVE + ABSOLUTE)}, or a causal language model."
        )
