"""Many trajectories behind one prompt in one row: masks, positions, and decoding on one cached prompt.

A row is `[prompt, branch 1, ..., branch K]`. A 4-D additive mask lets every branch see the prompt and itself, and
positions restart after the prompt, so that each branch is computed exactly as if it stood alone behind its prompt.
The mask is additive in the model's dtype: a boolean one is silently wrong under eager attention.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from transformers import DynamicCache


def prompt_positions(attention_mask: Tensor) -> Tensor:
    """Positions of a left-padded prompt: `(B, P)`, 0 on padding."""
    return (attention_mask.long().cumsum(1) - 1).clamp(min=0)


def additive(visible: Tensor, dtype: torch.dtype) -> Tensor:
    """`bool (B, Q, S)` -> additive mask `(B, 1, Q, S)`: 0 where visible, the dtype's minimum elsewhere."""
    mask = torch.zeros(visible.shape, dtype=dtype, device=visible.device)
    return mask.masked_fill_(~visible, torch.finfo(dtype).min)[:, None]


def group_visibility(attention_mask: Tensor, num_branches: int, branch_length: int) -> Tensor:
    """Who sees whom in `[prompt, K branches of T tokens]`: `(B, P)` -> `bool (B, P + K T, P + K T)`.

    Padding sees itself only (a row that sees nothing would be NaN).
    """
    batch, prompt_length = attention_mask.shape
    device = attention_mask.device
    slots = num_branches * branch_length
    total = prompt_length + slots
    branch = torch.arange(slots, device=device) // max(branch_length, 1)
    within = (branch[:, None] == branch[None, :]).tril()
    visible = torch.zeros(batch, total, total, dtype=torch.bool, device=device)
    causal = torch.ones(prompt_length, prompt_length, dtype=torch.bool, device=device).tril()
    keys = attention_mask.bool()[:, None, :]
    visible[:, :prompt_length, :prompt_length] = causal & keys
    visible[:, prompt_length:, :prompt_length] = keys
    visible[:, prompt_length:, prompt_length:] = within
    visible.diagonal(dim1=1, dim2=2).fill_(True)
    return visible


def model_dtype(model: nn.Module) -> torch.dtype:
    return next(p.dtype for p in model.parameters() if p.dtype.is_floating_point)


def accepts_logits_to_keep(model: nn.Module) -> bool:
    """Whether the model inside all wrappers can compute the logits of chosen positions only."""
    while True:
        if hasattr(model, "get_base_model"):
            model = model.get_base_model()
        elif isinstance(getattr(model, "module", None), nn.Module):
            model = model.module
        else:
            break
    forward = type(model).forward
    names = set(inspect.signature(forward).parameters)
    for base in type(model).__mro__[1:]:  # a flow-head subclass takes **kwargs and hands them to the model's forward
        if "forward" in vars(base):
            names |= set(inspect.signature(vars(base)["forward"]).parameters)
    return "logits_to_keep" in names


class BranchDecoder:
    """Decode many branches on one cached prompt; the prompt's cache is never copied or reordered.

    Every token that was ever fed keeps its place in the cache; a branch that continues another one *sees* that one's
    tokens, which is an entry in the mask. A prompt is computed once, whatever the number of branches.
    """

    def __init__(self, model: nn.Module, prompts: Mapping[str, Tensor], keep: bool):
        self.model = model
        self.keep = keep
        self.mask = prompts["attention_mask"].bool()
        self.batch, self.prompt_length = self.mask.shape
        self.dtype = model_dtype(model)
        self.lengths = self.mask.sum(1, keepdim=True)
        self.cache = DynamicCache()
        extra = {"logits_to_keep": 1} if keep else {}
        output = model(
            input_ids=prompts["input_ids"],
            attention_mask=additive(group_visibility(self.mask, 0, 0), self.dtype),
            position_ids=prompt_positions(self.mask),
            past_key_values=self.cache,
            use_cache=True,
            **extra,
        )
        self.root_logits = output.logits[:, -1:].float()
        self.restart()

    def restart(self) -> None:
        """Forget all branches; the prompt stays."""
        surplus = self.cache.get_seq_length() - self.prompt_length
        if surplus:
            self.cache.crop(-surplus)
        self.depth = 0
        self.visible = torch.zeros(self.batch, 1, 0, dtype=torch.bool, device=self.mask.device)

    def extend(self, tokens: Tensor, parents: Tensor) -> Tensor:
        """Append one token to branches: `tokens`, `parents` `(B, n)` -> logits `(B, n, V)`.

        `parents[b, i]` is the branch of the previous call (0 at the first) that branch i continues.
        """
        batch, width = tokens.shape
        past = self.visible.gather(1, parents[..., None].expand(-1, -1, self.visible.shape[2]))
        own = torch.eye(width, dtype=torch.bool, device=tokens.device).expand(batch, -1, -1)
        self.visible = torch.cat([past, own], 2)
        prompt = self.mask[:, None].expand(-1, width, -1)
        output = self.model(
            input_ids=tokens,
            attention_mask=additive(torch.cat([prompt, self.visible], 2), self.dtype),
            position_ids=(self.lengths + self.depth).expand(-1, width),
            past_key_values=self.cache,
            use_cache=True,
        )
        self.depth += 1
        return output.logits.float()
