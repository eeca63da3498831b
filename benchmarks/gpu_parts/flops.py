"""Floating point operations that a decoder needs, by formula, and hooks that count what its forwards read.

Of T tokens in rows that attend to S columns, with W weights in the matrices of all layers, A = layers x heads x
head size, and n logits of hidden size H:

    forward                2 W T + 4 A (T S) + 2 H n
    forward and backward   6 W T + 12 A (T S) + 6 H n        (4 W T for weights that are frozen)

T S is the dense product of rows and columns, whatever the mask hides. Norms, rotations and softmax are left out, and
so is everything that is computed twice (gradient checkpointing, or the scores in the backward pass of a fused
attention).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel


@dataclass(frozen=True)
class FlopFormula:
    """The constants of a model in the formula of this file.

    Attributes:
        trained, frozen: weights in the matrices of the layers; embeddings and output head are not among them.
        attention: layers x heads x head size.
        hidden: width of the states that the output head reads.
        head_trained: whether the head's weight, or a part of it, has a gradient.
    """

    trained: int
    frozen: int
    attention: int
    hidden: int
    head_trained: bool = True

    @classmethod
    def of(cls, model: PreTrainedModel) -> FlopFormula:
        """Read off a model, with its adapters where it has some."""
        config, head = model.config.get_text_config(), model.get_output_embeddings()
        tables = {id(p) for module in (model.get_input_embeddings(), head) for p in module.parameters()}
        matrices = [p for p in model.parameters() if p.dim() == 2 and id(p) not in tables]
        head_size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        return cls(
            trained=sum(p.numel() for p in matrices if p.requires_grad),
            frozen=sum(p.numel() for p in matrices if not p.requires_grad),
            attention=config.num_hidden_layers * config.num_attention_heads * head_size,
            hidden=config.hidden_size,
            head_trained=any(p.requires_grad for p in head.parameters()),
        )

    def layers(self, tokens: int, pairs: int, backward: bool) -> int:
        """FLOPs of the layers.

        Args:
            tokens: T, those that are read.
            pairs: T S, the tokens of each row times the columns that they attend to.
            backward: with the backward pass.
        """
        if not backward:
            return 2 * (self.trained + self.frozen) * tokens + 4 * self.attention * pairs
        return (6 * self.trained + 4 * self.frozen) * tokens + 12 * self.attention * pairs

    def head(self, logits: int, backward: bool) -> int:
        """FLOPs of n `logits`."""
        return 2 * self.hidden * logits * ((3 if self.head_trained else 2) if backward else 1)


class Work:
    """Counts what the forwards of a model read and need, from the last `reset` on. Nothing waits for a device.

    Attributes:
        tokens: that forwards with gradient read, padding included.
        tokens_without_gradient: that the others read: those of sampling and generation.
        flops: of all of them, and of the backward passes that belong to those with gradient.
    """

    def __init__(self, model: PreTrainedModel):
        self.formula = FlopFormula.of(model)
        self.reset()
        model.base_model.register_forward_pre_hook(self._read, with_kwargs=True)
        model.get_output_embeddings().register_forward_hook(self._head)

    def reset(self) -> None:
        self.tokens = self.tokens_without_gradient = self.flops = 0

    def _read(self, module: nn.Module, args: tuple, kwargs: Mapping[str, Any]) -> None:
        ids, mask = kwargs["input_ids"], kwargs.get("attention_mask")
        if isinstance(mask, Mapping):  # one per kind of layer
            mask = next(iter(mask.values()))
        columns = ids.shape[1] if mask is None else mask.shape[-1]
        backward = torch.is_grad_enabled()
        if backward:
            self.tokens += ids.numel()
        else:
            self.tokens_without_gradient += ids.numel()
        self.flops += self.formula.layers(ids.numel(), ids.numel() * columns, backward)

    def _head(self, module: nn.Module, args: tuple, logits: Tensor) -> None:
        self.flops += self.formula.head(logits.numel(), torch.is_grad_enabled())
