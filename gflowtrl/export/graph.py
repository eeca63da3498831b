"""A causal model as one ONNX graph, which extends branches of a cached prompt.

The same graph reads prompts (with an empty cache) and takes steps, so the weights are stored and loaded once. Beams
are branches of one cached prompt, as in `gflowtrl.policy`: a token sees the tokens that its row of `visible` names.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel

from gflowtrl.policy.masks import attention_mask, layer_reaches
from gflowtrl.policy.modules import cache_argument, forward_parameters
from gflowtrl.policy.restricted_head import only_rows, selectable_head


INPUTS = ("input_ids", "position_ids", "key_positions", "visible", "logits_at")


class BranchGraph(nn.Module):
    """One forward of a causal model on `n` new tokens per prompt, after `S` cached ones.

    Args:
        model: a causal model in evaluation mode.
        tokens: `(T,)` the tokens of the catalog, sorted.
        temperature: divides the logits.
    """

    def __init__(self, model: PreTrainedModel, tokens: Tensor, temperature: float):
        super().__init__()
        self.model, self.tokens, self.temperature = model, tokens, temperature
        self.reaches = layer_reaches(model.config)
        self.limited = any(size is not None for reach in self.reaches.values() for size in reach)
        self.head = selectable_head(model)
        self.keep = "logits_to_keep" in forward_parameters(model)

    def forward(
        self, input_ids: Tensor, position_ids: Tensor, key_positions: Tensor, visible: Tensor, logits_at: Tensor,
        past: list[Tensor],
    ) -> tuple[Tensor, ...]:  # fmt: skip
        """Return logits `(B, m, T)` of the catalog's tokens, and the keys and values with the new tokens.

        Args:
            input_ids, position_ids: `(B, n)`.
            key_positions: `(B, S + n)`, used by layers that see a window of positions.
            visible: `bool (B, n, S + n)`, which of the cached and the new tokens each new token sees.
            logits_at: `(m,)` the new tokens whose logits are computed.
            past: keys and values of each layer in turn, each `(B, heads, S, size)`.
        """
        cache = DynamicCache()
        for layer in range(len(past) // 2):
            cache.update(past[2 * layer], past[2 * layer + 1], layer)
        keep = {"logits_to_keep": logits_at} if self.keep else {}
        with only_rows(self.head, self.tokens):
            logits = self.model(
                input_ids=input_ids,
                attention_mask=self._mask(visible, position_ids, key_positions),
                position_ids=position_ids,
                use_cache=True,
                **keep,
                **cache_argument(self.model, cache),
            ).logits
        logits = logits if self.keep else logits.index_select(1, logits_at)
        logits = logits if self.head is not None else logits.index_select(2, self.tokens)
        present = [tensor for layer in cache.layers for tensor in (layer.keys, layer.values)]
        return logits / self.temperature, *present

    def _mask(self, visible: Tensor, queries: Tensor, keys: Tensor) -> Tensor | dict[str, Tensor]:
        return attention_mask(visible, queries, keys, self.reaches, torch.float32)
