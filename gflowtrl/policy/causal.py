"""A causal language model read as a policy on the prefix tree.

Prompt and branches stand in one row (see `packing`); Llama, Qwen and their kin take the positions of the branches as
`position_ids`, so nothing in the model has to be changed.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from gflowtrl.catalog import ItemCatalog
from gflowtrl.compat import is_stateful

from .base import Prompts, TreePolicy
from .branches import Branches
from .modules import forward_parameters, innermost, model_dtype
from .packing import BranchDecoder, additive, group_layout, prompt_positions, prompt_visibility
from .sharing import shared_layout


def check_causal(model: nn.Module) -> None:
    """Whether a model sees of a row what its mask says, which scoring several branches in one row stands on.

    Raises:
        ValueError: the model is recurrent (a state-space or linear-attention one, wholly or in some layers), so that
            branches would see each other whatever the mask says; or its forward takes no `position_ids`.
    """
    model = innermost(model)
    if is_stateful(model):
        reason = "carries a state from token to token, past the attention mask"
    elif "position_ids" not in forward_parameters(model):
        reason = "takes no position_ids"
    else:
        return
    raise ValueError(
        f"{type(model).__name__} {reason}, so several items cannot be scored behind one prompt. Use a model whose "
        "layers all are attention (Llama, Qwen3, GPT-2, GPT-NeoX, ...), or an encoder-decoder such as T5."
    )


class CausalTreePolicy(TreePolicy):
    """The distribution over leaves that a causal model gives when its logits are renormalised over a node's children.

    Prompts are a left-padded batch `{"input_ids": (B, P), "attention_mask": (B, P)}`. With `members` `(U, C)` in it
    (`gflowtrl.data.prompt_members`), `score` computes rows whose prompts begin alike in one row. See `TreePolicy`.

    Raises:
        ValueError: the model is recurrent, or takes no `position_ids` (`check_causal`).
    """

    def __init__(self, model: nn.Module, catalog: ItemCatalog):
        check_causal(model)
        super().__init__(model, catalog)
        self._keep = "logits_to_keep" in forward_parameters(model)  # logits of chosen positions only

    def _packed(self, prompts: Prompts, branches: Branches) -> tuple[Tensor, Tensor | None]:
        make_layout = shared_layout if "members" in prompts else group_layout
        layout = make_layout(prompts, branches)
        extra = {"logits_to_keep": layout.keep} if self._keep else {}
        if self._heads:
            extra["flow_positions"] = layout.keep
        output = self.model(
            input_ids=layout.input_ids,
            attention_mask=additive(layout.visible, model_dtype(self.model)),
            position_ids=layout.position_ids,
            use_cache=False,
            **extra,
        )
        logits = output.logits if self._keep else output.logits[:, layout.keep]
        flows = getattr(output, "log_flows", None)
        if layout.place is not None:
            states = 1 + len(branches.steps)
            logits = logits.reshape(-1, states, logits.shape[-1])[layout.place]
            flows = None if flows is None else flows.reshape(-1, states)[layout.place]
        return logits.float(), flows

    def _decoder(self, prompts: Prompts) -> BranchDecoder:
        return CausalDecoder(self.model, prompts)


class CausalDecoder(BranchDecoder):
    """Branches behind the cached prompt of a causal model."""

    def __init__(self, model: nn.Module, prompts: Prompts):
        self.mask = prompts["attention_mask"].bool()
        self.lengths = self.mask.sum(1, keepdim=True)
        super().__init__(model, DynamicCache(), prompts)

    def _read(self, prompts: Prompts) -> Tensor:
        return self._run(
            input_ids=prompts["input_ids"],
            attention_mask=additive(prompt_visibility(self.mask), self.dtype),
            position_ids=prompt_positions(self.mask),
            **({"logits_to_keep": 1} if "logits_to_keep" in forward_parameters(self.model) else {}),
        ).logits

    def _feed(self, tokens: Tensor) -> Tensor:
        return self.read_behind(tokens, self.visible, tokens.new_full(tokens.shape[1:], self.depth))

    def read_behind(self, tokens: Tensor, visible: Tensor, steps: Tensor) -> Tensor:
        """Run the model on tokens behind the prompts.

        Args:
            tokens: `(B, n)`; each sees its whole prompt.
            visible: `bool (B, n, S)`, which of the S tokens behind the prompt each sees, those of this call the last.
            steps: `(n,)` how many tokens stand between the prompt and each.

        Returns:
            logits `(B, n, V)`.
        """
        prompt = self.mask[:, None].expand(-1, tokens.shape[1], -1)
        return self._run(
            input_ids=tokens,
            attention_mask=additive(torch.cat([prompt, visible], 2), self.dtype),
            position_ids=self.lengths + steps,
        ).logits
