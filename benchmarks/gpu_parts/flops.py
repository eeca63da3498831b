"""FLOPs of a decoder by formula, and hooks that count the tokens of its forward passes.

For T tokens in rows that attend to S columns, W weights in the matrices of all layers, A = layers x heads x head size,
and n logits of hidden size H:

    forward                2 W T + 4 A (T S) + 2 H n
    forward and backward   6 W T + 12 A (T S) + 6 H n        (4 W T for weights that are frozen)

T S is the dense product of rows and columns, including masked entries. Norms, rotary embeddings and softmax do not
count, and neither do recomputations (gradient checkpointing, or the scores in the backward pass of fused attention).
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
    """The constants of a model in the formula of this module.

    Attributes:
        trained, frozen: number of weights in the matrices of the layers, without embeddings and output head.
        attention: layers x heads x head size.
        hidden: width of the states that the output head reads.
        head_trained: whether the weight of the head, or a part of it, has a gradient.
    """

    trained: int
    frozen: int
    attention: int
    hidden: int
    head_trained: bool = True

    @classmethod
    def of(cls, model: PreTrainedModel) -> FlopFormula:
        """Return the constants of a model, including its adapters, if any."""
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
        """Return the FLOPs of the layers.

        Args:
            tokens: T, the number of tokens read.
            pairs: T S, the tokens of each row times the columns that they attend to.
            backward: include the backward pass.
        """
        if not backward:
            return 2 * (self.trained + self.frozen) * tokens + 4 * self.attention * pairs
        return (6 * self.trained + 4 * self.frozen) * tokens + 12 * self.attention * pairs

    def head(self, logits: int, backward: bool) -> int:
        """Return the FLOPs of n `logits`."""
        return 2 * self.hidden * logits * ((3 if self.head_trained else 2) if backward else 1)


class Work:
    """Counts tokens and FLOPs of a model's forward passes since the last `reset`, without synchronizing the device.

    Attributes:
        tokens: tokens of forward passes with gradient, including padding.
        tokens_without_gradient: tokens of other forward passes (sampling and generation).
        flops: FLOPs of all forward passes, and of the backward passes of those with gradient.
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
        if isinstance(mask, Mapping):  # one mask per kind of layer
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
