"""An output head that computes only the logits a policy needs: those of the catalog's tokens, at chosen states.

The output head of a language model has a row for every token of its vocabulary (for example 150,000), and a policy
needs only the rows of the catalog's tokens (about a thousand). The product with all other rows would be most of a
training step. The rows are selected inside the head's own forward, so sharded engines gather the weight as usual, and
the selected rows get the same gradients as with all logits. The states are selected there too: those of a packed row
in which there is a choice.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from gflowtrl.compat import TrainableTokensLayer, TrainableTokensWrapper

from .modules import innermost, mix_in


class _RestrictedHead:
    """Mixed into the class of an output head: an `nn.Linear`, or PEFT's wrapper of one (`trainable_token_indices`)."""

    _rows: Tensor | None = None
    _states: Tensor | None = None

    def forward(self, hidden: Tensor, *args, **kwargs) -> Tensor:
        if self._states is not None:  # hidden is (U, Q, H); the states are indices into its flattened (U * Q) rows
            hidden = hidden.flatten(0, 1).index_select(0, self._states)
        if self._rows is None:
            return super().forward(hidden, *args, **kwargs)
        head: Any = self
        if isinstance(head, TrainableTokensWrapper):
            weight = _trained_rows(head.token_adapter, self._rows)
        else:
            weight = head.weight.index_select(0, self._rows)
        bias = _linear(head).bias
        return nn.functional.linear(hidden, weight, None if bias is None else bias.index_select(0, self._rows))


class _BiasedTokens:
    """Mixed into PEFT's layer of trained rows if the output head has a bias (Phi, GPT-J, CodeGen).

    PEFT's layer multiplies by the head's weight itself and omits the bias.
    """

    def forward_adapters(self, x: Tensor, active_adapters: Any, *args, **kwargs) -> Tensor:
        layer: Any = self
        omits_bias = bool(active_adapters) and not layer.disable_adapters and not layer.merged
        result = super().forward_adapters(x, active_adapters, *args, **kwargs)
        return result + layer.base_layer.bias if omits_bias else result


def keep_head_bias(model: nn.Module) -> None:
    """Make PEFT's wrapper of an output head add the head's bias, in place. A second call changes nothing.

    PEFT's `trainable_token_indices` computes `x W'` with the trained rows in W' and omits the bias, so new adapters
    would change the policy, and the merged model would differ from the trained one by the bias.
    """
    head = innermost(model).get_output_embeddings()
    layer = head.token_adapter if isinstance(head, TrainableTokensWrapper) else None
    if layer is None or isinstance(layer, _BiasedTokens) or getattr(layer.base_layer, "bias", None) is None:
        return
    mix_in(_BiasedTokens, layer)


def _linear(head: nn.Module) -> Any:
    """Return the head itself, or the layer inside PEFT's wrapper of it."""
    return head.token_adapter.base_layer if isinstance(head, TrainableTokensWrapper) else head


def _trained_rows(layer: TrainableTokensLayer, rows: Tensor) -> Tensor:
    """Return rows of the head's weight with the values of the active adapters: `(T, hidden)`."""
    weight = layer.base_layer.weight.index_select(0, rows)
    for name in [] if layer.disable_adapters or layer.merged else layer.active_adapters:
        tokens, order = torch.tensor(layer.token_indices[name], device=rows.device).sort()
        index = torch.searchsorted(tokens, rows).clamp(max=len(tokens) - 1)
        trained = layer.trainable_tokens_delta[name].to(weight).index_select(0, order[index])
        weight = torch.where((tokens[index] == rows)[:, None], trained, weight)
    return weight


def selectable_head(model: nn.Module) -> nn.Module | None:
    """Return the output head of `model` if it can compute a selection of its rows, else None.

    It can if it is a plain linear layer, or one with single rows trained by PEFT. Heads that are quantized or adapted
    are excluded, and so are models that add a bias per token to the logits (BART). The head's class is replaced by a
    subclass of the same name; without `only_rows` and `only_states` the head computes what it did before.
    """
    model = innermost(model)
    keep_head_bias(model)
    head = model.get_output_embeddings()
    if isinstance(head, _RestrictedHead):
        return head
    linear = _linear(head)
    plain = isinstance(linear, nn.Linear) and type(linear).forward is nn.Linear.forward
    if not plain or hasattr(model, "final_logits_bias"):
        return None
    mix_in(_RestrictedHead, head)
    return head


def num_rows(head: nn.Module) -> int:
    """Return the number of rows of a head that `selectable_head` returned."""
    return _linear(head).out_features


def only_rows(head: nn.Module | None, rows: Tensor) -> AbstractContextManager[None]:
    """Context manager: `head` computes only the logits of `rows` `(T,)`, in their order. None: no effect."""
    return _restrict(head, "_rows", rows)


def only_states(head: nn.Module | None, states: Tensor) -> AbstractContextManager[None]:
    """Context manager: `head` computes logits `(n, V)` only at `states` `(n,)`. None: no effect.

    The states are indices into the rows of the head's input `(U, Q, H)`, flattened to `(U * Q, H)`.
    """
    return _restrict(head, "_states", states)


@contextmanager
def _restrict(head: nn.Module | None, name: str, selected: Tensor) -> Iterator[None]:
    if head is None:
        yield
        return
    setattr(head, name, selected)
    try:
        yield
    finally:
        setattr(head, name, None)
