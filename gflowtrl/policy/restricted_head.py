"""Logits of the catalog's tokens only, and of the states that are asked for.

A language model's head has a row for every token of its vocabulary (150,000, say); the policy asks for those of the
catalog's tokens only (a thousand). The product with all others would be most of a training step. Rows are chosen
inside the head's own forward, so that sharded engines gather the weight where they always do, and gradients reach the
chosen rows as if all had been computed. So are the states: of a packed row those where there is something to choose.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from gflowtrl.compat import TrainableTokensLayer, TrainableTokensWrapper

from .modules import innermost, mix_in


class _ChosenRows:
    """Mixed into the class of a model's output head, an `nn.Linear`."""

    _rows: Tensor | None = None
    _states: Tensor | None = None

    def forward(self, hidden: Tensor) -> Tensor:
        hidden = _at_states(hidden, self._states)
        if self._rows is None:
            return super().forward(hidden)
        bias = None if self.bias is None else self.bias.index_select(0, self._rows)
        return nn.functional.linear(hidden, self.weight.index_select(0, self._rows), bias)


class _ChosenTrainedRows:
    """Mixed into PEFT's wrapper of an output head of which some rows are trained (`trainable_token_indices`)."""

    _rows: Tensor | None = None
    _states: Tensor | None = None

    def forward(self, hidden: Tensor, *args, **kwargs) -> Tensor:
        hidden = _at_states(hidden, self._states)
        if self._rows is None:
            return super().forward(hidden, *args, **kwargs)
        bias = self.token_adapter.base_layer.bias
        bias = None if bias is None else bias.index_select(0, self._rows)
        return nn.functional.linear(hidden, _trained_rows(self.token_adapter, self._rows), bias)


class _BiasedTokens:
    """Mixed into PEFT's layer of trained rows in an output head with a bias (Phi, GPT-J, CodeGen), which multiplies by
    the head's weight itself and leaves the bias out."""

    def forward_adapters(self, x: Tensor, active_adapters: Any, *args, **kwargs) -> Tensor:
        layer: Any = self
        apart = bool(active_adapters) and not layer.disable_adapters and not layer.merged
        result = super().forward_adapters(x, active_adapters, *args, **kwargs)
        return result + layer.base_layer.bias if apart else result


def keep_head_bias(model: nn.Module) -> None:
    """Make PEFT's wrapper of an output head add the head's bias, in place. A second call changes nothing.

    PEFT's `trainable_token_indices` computes `x W'` with the trained rows in W' and forgets the bias, so fresh
    adapters would change the policy, and the merged model would differ from the trained one by the bias.
    """
    head = innermost(model).get_output_embeddings()
    layer = head.token_adapter if isinstance(head, TrainableTokensWrapper) else None
    if layer is None or isinstance(layer, _BiasedTokens) or getattr(layer.base_layer, "bias", None) is None:
        return
    mix_in(_BiasedTokens, layer)


def _at_states(hidden: Tensor, states: Tensor | None) -> Tensor:
    """The hidden states `(n, H)` at `states` `(n,)` of all rows end to end, `hidden` `(U, Q, H)`; all where None."""
    return hidden if states is None else hidden.flatten(0, 1).index_select(0, states)


def _trained_rows(layer: TrainableTokensLayer, rows: Tensor) -> Tensor:
    """Rows of the head's weight as its adapters have them now: `(T, hidden)`."""
    weight = layer.base_layer.weight.index_select(0, rows)
    for name in [] if layer.disable_adapters or layer.merged else layer.active_adapters:
        own, order = torch.tensor(layer.token_indices[name], device=rows.device).sort()
        place = torch.searchsorted(own, rows).clamp(max=len(own) - 1)
        trained = layer.trainable_tokens_delta[name].to(weight).index_select(0, order[place])
        weight = torch.where((own[place] == rows)[:, None], trained, weight)
    return weight


def selectable_head(model: nn.Module) -> nn.Module | None:
    """The output head of `model` where some of its rows can be computed alone, else None.

    That is a plain linear layer, or one of which PEFT trains single rows: not one that is quantized or adapted, nor
    one whose logits the model adds a number per token to (BART). The head's class gets a subclass of the same name;
    calls outside `only_rows` are untouched.
    """
    model = innermost(model)
    keep_head_bias(model)
    head = model.get_output_embeddings()
    if isinstance(head, _ChosenRows | _ChosenTrainedRows):
        return head
    if hasattr(model, "final_logits_bias"):
        return None
    if isinstance(head, TrainableTokensWrapper) and _is_plain(head.token_adapter.base_layer):
        mix_in(_ChosenTrainedRows, head)
    elif _is_plain(head):
        mix_in(_ChosenRows, head)
    else:
        return None
    return head


def num_rows(head: nn.Module) -> int:
    """How many rows a head that `selectable_head` gave has."""
    return head.token_adapter.base_layer.out_features if isinstance(head, _ChosenTrainedRows) else head.out_features


def _is_plain(head: nn.Module) -> bool:
    return isinstance(head, nn.Linear) and type(head).forward is nn.Linear.forward


def only_rows(head: nn.Module, rows: Tensor) -> AbstractContextManager[None]:
    """Within, `head` gives the logits of `rows` `(T,)` only, in their order."""
    return _within(head, "_rows", rows)


def only_states(head: nn.Module, states: Tensor) -> AbstractContextManager[None]:
    """Within, `head` gives logits `(n, V)` at `states` `(n,)` only, places in the rows of its input end to end."""
    return _within(head, "_states", states)


@contextmanager
def _within(head: nn.Module, name: str, chosen: Tensor) -> Iterator[None]:
    setattr(head, name, chosen)
    try:
        yield
    finally:
        setattr(head, name, None)
