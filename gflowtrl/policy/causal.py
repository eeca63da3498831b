"""A causal language model read as a policy on the prefix tree.

Trunk and branches stand in one row (see `packing`); Llama, Qwen and their kin take the positions of the branches as
`position_ids`, so nothing in the model has to be changed.
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
from .support import check_causal, check_row_length
from .tree_policy import TreePolicy


class CausalTreePolicy(TreePolicy):
    """The distribution over leaves that a causal model gives when its logits are renormalized over a node's children.

    Prompts that are windows are computed once for all that begin them; see `TreePolicy`.

    Raises:
        ValueError: a model that is not known to be exact (`check_causal`), or a row that is too long for one whose
            layers count its columns (`max_row_length`).
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
        with self._chosen_states(layout.flat_indices(self._keep)):
            output = self.model(
                input_ids=layout.input_ids,
                attention_mask=attention_mask(
                    layout.visible, layout.position_ids, layout.position_ids, self._reaches, model_dtype(self.model)
                ),
                position_ids=layout.position_ids,
                use_cache=False,
                **extra,
            )
        logits = output.logits if output.logits.dim() == 2 else layout.states(output.logits, self._keep)
        flows = getattr(output, "log_flows", None)
        return logits.float(), None if flows is None else layout.states(flows, True)

    def _decoder(self, prompts: Prompts) -> BranchDecoder:
        return CausalDecoder(self.model, prompts)

    def _plain_logits(self, prompt: Tensor, paths: Tensor) -> Tensor:
        sequences = torch.cat([prompt.expand(len(paths), -1), paths[:, :-1]], 1)
        keep = {"logits_to_keep": paths.shape[1]} if self._keep else {}
        return self.model(input_ids=sequences, use_cache=False, **keep).logits[:, -paths.shape[1] :]


class CausalDecoder(BranchDecoder):
    """Branches behind the cached prompt of a causal model."""

    def __init__(self, model: nn.Module, prompts: Prompts):
        self.reaches = layer_reaches(innermost(model).config)
        super().__init__(model, DynamicCache(), prompts)

    def _read(self, prompts: Prompts) -> Tensor:
        trunks = Trunks.of(prompts)
        positions = prompt_positions(trunks.mask)
        keep = trunks.last.unique() if trunks.shared else trunks.last[:1]
        logits = self._run(
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
        # Each prompt gets its trunk's keys and values, of which it sees its own: reading them again is what costs.
        self.cache.batch_select_indices(trunks.trunk)
        self.mask = self.mask[trunks.trunk] & (positions[trunks.trunk] < self.lengths)
        self.prompt_positions = positions[trunks.trunk]
        if logits.shape[1] == trunks.mask.shape[1]:
            return logits[trunks.trunk, trunks.last, None]
        return logits[trunks.trunk, torch.searchsorted(keep, trunks.last), None]

    def restart(self) -> None:
        super().restart()
        self.positions = self.prompt_positions  # of all cached tokens

    def _feed(self, tokens: Tensor) -> Tensor:
        return self.read_behind(tokens, self.visible, tokens.new_full(tokens.shape[1:], self.depth))

    def read_behind(self, tokens: Tensor, visible: Tensor, steps: Tensor) -> Tensor:
        """Run the model on tokens behind the prompts.

        Args:
            tokens: `(B, n)`; each sees its whole prompt.
            visible: `bool (B, n, S)`, which of the S tokens behind the prompt each sees, those of this call the last.
            steps: `(n,)` how many tokens of its branch precede each.

        Returns:
            logits `(B, n, V)`.
        """
        prompt = self.mask[:, None].expand(-1, tokens.shape[1], -1)
        positions = self.lengths + steps
        self.positions = torch.cat([self.positions, positions], 1)
        check_row_length(self.model, self.positions.shape[1])
        return self._run(
            input_ids=tokens,
            attention_mask=attention_mask(
                torch.cat([prompt, visible], 2), positions, self.positions, self.reaches, self.dtype
            ),
            position_ids=positions,
        ).logits
