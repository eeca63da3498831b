"""A causal language model as a policy on the prefix tree.

Trunk and branches are in one row (see `packing`). Llama, Qwen and similar models take the positions of the branches as
`position_ids`, so the model needs no changes.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from gflowtrl.catalog import ItemCatalog
from gflowtrl.trunks import Prompts, Trunks

from .branches import Branches
from .masks import attention_mask, layer_reaches
from .modules import forward_parameters, innermost, model_dtype
from .packing import BranchDecoder, lay_out, prompt_positions, prompt_visibility
from .restricted_head import only_states
from .support import check_causal, check_row_length
from .tree_policy import TreePolicy


class CausalTreePolicy(TreePolicy):
    """The distribution over leaves of a causal model, with its logits renormalized over a node's children.

    A window is computed once for all its prompts; see `TreePolicy`.

    Raises:
        ValueError: the model is not known to be exact (`check_causal`), or a row is too long for a model whose layers
            count columns (`max_row_length`).
    """

    def __init__(self, model: nn.Module, catalog: ItemCatalog):
        check_causal(model)
        super().__init__(model, catalog)
        self._keep = "logits_to_keep" in forward_parameters(model)  # logits of chosen positions only
        self._reaches = layer_reaches(innermost(model).config)

    def _packed(self, prompts: Prompts, branches: Branches) -> tuple[Tensor, Tensor | None]:
        layout = lay_out(self.catalog.tree, Trunks.of(prompts), branches)
        check_row_length(self.model, layout.input_ids.shape[1])
        extra = {"logits_to_keep": layout.keep} if self._keep else {}
        if self._heads:
            extra["flow_positions"] = layout.keep
        with only_states(self._head, layout.flat_indices(self._keep)):
            output = self.model(
                input_ids=layout.input_ids,
                attention_mask=attention_mask(
                    layout.visible, layout.position_ids, layout.position_ids, self._reaches, model_dtype(self.model)
                ),
                position_ids=layout.position_ids,
                use_cache=False,
                **extra,
            )
        return layout.at_states(output, self._keep)

    def _decoder(self, prompts: Prompts, flows: bool = False) -> BranchDecoder:
        return CausalDecoder(self.model, prompts, flows)

    def _plain_logits(self, prompt: Tensor, paths: Tensor) -> Tensor:
        sequences = torch.cat([prompt.expand(len(paths), -1), paths[:, :-1]], 1)
        keep = {"logits_to_keep": paths.shape[1]} if self._keep else {}
        return self.model(input_ids=sequences, use_cache=False, **keep).logits[:, -paths.shape[1] :]


class CausalDecoder(BranchDecoder):
    """Branches after the cached prompt of a causal model."""

    def __init__(self, model: nn.Module, prompts: Prompts, flows: bool = False):
        self.reaches = layer_reaches(innermost(model).config)
        super().__init__(model, DynamicCache(), prompts, flows)

    def _read(self, prompts: Prompts) -> Tensor:
        trunks = Trunks.of(prompts)
        positions = prompt_positions(trunks.mask)
        keep = trunks.last.unique() if trunks.shared else trunks.last[:1]
        logits = self._run(
            keep,
            input_ids=trunks.input_ids,
            attention_mask=attention_mask(
                prompt_visibility(trunks.mask), positions, positions, self.reaches, self.dtype
            ),
            position_ids=positions,
            **({"logits_to_keep": keep} if "logits_to_keep" in forward_parameters(self.model) else {}),
        ).logits
        self.mask, self.prompt_positions, self.lengths = trunks.mask.bool(), positions, trunks.cut[:, None]
        if not trunks.shared:
            return logits
        # Each prompt gets a copy of its trunk's keys and values and sees its own part; computing them would cost more.
        self.cache.batch_select_indices(trunks.trunk)
        self.mask = self.mask[trunks.trunk] & (positions[trunks.trunk] < self.lengths)
        self.prompt_positions = positions[trunks.trunk]
        column = torch.searchsorted(keep, trunks.last)
        if self.flows is not None:
            self.flows = self.flows[trunks.trunk, column, None]
        if logits.shape[1] == trunks.mask.shape[1]:
            return logits[trunks.trunk, trunks.last, None]
        return logits[trunks.trunk, column, None]

    def restart(self) -> None:
        super().restart()
        self.positions = self.prompt_positions  # of all cached tokens

    def _feed(self, tokens: Tensor) -> Tensor:
        return self.feed(tokens, self.visible, tokens.new_full(tokens.shape[1:], self.depth))

    def feed(self, tokens: Tensor, visible: Tensor, steps: Tensor) -> Tensor:
        """Run the model on tokens after the prompts.

        Args:
            tokens: `(B, n)`; each sees its whole prompt.
            visible: `bool (B, n, S)`, which of the S tokens after the prompt each sees; the last n of the S are
                `tokens`.
            steps: `(n,)` number of tokens that precede each token in its branch.

        Returns:
            Logits `(B, n, V)`.
        """
        prompt = self.mask[:, None].expand(-1, tokens.shape[1], -1)
        positions = self.lengths + steps
        self.positions = torch.cat([self.positions, positions], 1)
        check_row_length(self.model, self.positions.shape[1])
        return self._run(
            torch.arange(tokens.shape[1], device=tokens.device),
            input_ids=tokens,
            attention_mask=attention_mask(
                torch.cat([prompt, visible], 2), positions, self.positions, self.reaches, self.dtype
            ),
            position_ids=positions,
        ).logits
