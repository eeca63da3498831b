"""Logits of the catalogue's tokens only.

A language model's head has a row for every token of its vocabulary (150,000, say); the policy asks for those of the
catalogue's tokens only (a thousand). The product with all others would be most of a training step. Rows are chosen
inside the head's own forward, so that sharded engines gather the weight where they always do, and gradients reach the
chosen rows as if all had been computed.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor, nn

from .modules import innermost, mix_in


class _ChosenRows:
    """Mixed into the class of a model's output head, an `nn.Linear`."""

    _rows: Tensor | None = None

    def forward(self, hidden: Tensor) -> Tensor:
        if self._rows is None:
            return super().forward(hidden)
        bias = None if self.bias is None else self.bias.index_select(0, self._rows)
        return nn.functional.linear(hidden, self.weight.index_select(0, self._rows), bias)


def selectable_head(model: nn.Module) -> nn.Module | None:
    """The output head of `model` where some of its rows can be computed alone, else None.

    That is a plain linear layer: not one that is quantised or adapted, nor one whose logits the model adds a number
    per token to (BART). The head's class gets a subclass of the same name; calls outside `only_rows` are untouched.
    """
    model = innermost(model)
    head = model.get_output_embeddings()
    if isinstance(head, _ChosenRows):
        return head
    if not isinstance(head, nn.Linear) or type(head).forward is not nn.Linear.forward:
        return None
    if hasattr(model, "final_logits_bias"):
        return None
    mix_in(_ChosenRows, head)
    return head


@contextmanager
def only_rows(head: nn.Module, rows: Tensor) -> Iterator[None]:
    """Within, `head` gives the logits of `rows` `(T,)` only, in their order."""
    head._rows = rows
    try:
        yield
    finally:
        head._rows = None
