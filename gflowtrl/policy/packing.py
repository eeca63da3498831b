"""Many trajectories behind one prompt in one row: masks, positions, and decoding on one cached prompt.

A row is `[prompt, branches]`. A 4-D additive mask lets every branch see the prompt and itself, and positions restart
after the prompt, so that each branch is computed exactly as if it stood alone behind its prompt.
The mask is additive in the model's dtype: a boolean one is silently wrong under eager attention.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers import DynamicCache, EncoderDecoderCache
from transformers.utils import ModelOutput

from .branches import Branches
from .modules import cache_argument, model_dtype


def prompt_positions(attention_mask: Tensor) -> Tensor:
    """Positions of a left-padded prompt: `(B, P)`, 0 on padding."""
    return (attention_mask.long().cumsum(1) - 1).clamp(min=0)


def group_visibility(attention_mask: Tensor, behind: Tensor, of_prompt: Tensor | None = None) -> Tensor:
    """Who sees whom in `[prompt, S tokens behind it]`: `(B, P)`, `bool (B or 1, S, S)` -> `bool (B, P + S, P + S)`.

    Everything behind the prompt sees all of it (or what `of_prompt`, `bool (B, S, P)`, says), and of the rest what
    `behind` says. Padding sees itself only (a row that sees nothing would be NaN).
    """
    batch, prompt_length = attention_mask.shape
    total = prompt_length + behind.shape[-1]
    visible = torch.zeros(batch, total, total, dtype=torch.bool, device=attention_mask.device)
    keys = attention_mask.bool()[:, None, :]
    visible[:, :prompt_length, :prompt_length] = keys & keys.new_ones(prompt_length, prompt_length).tril()
    visible[:, prompt_length:, :prompt_length] = keys if of_prompt is None else keys & of_prompt
    visible[:, prompt_length:, prompt_length:] = behind
    visible.diagonal(dim1=1, dim2=2).fill_(True)
    return visible


def prompt_visibility(attention_mask: Tensor) -> Tensor:
    """Who sees whom in prompts alone: `(B, P)` -> `bool (B, P, P)`."""
    return group_visibility(attention_mask, attention_mask.new_zeros(1, 0, 0, dtype=torch.bool))


def separate_branches(count: int, length: int, device: torch.device) -> Tensor:
    """Who sees whom in `count` branches of `length` tokens with nothing in common: `bool (1, S, S)`."""
    branch = torch.arange(count, device=device).repeat_interleave(length)
    return (branch[:, None] == branch[None, :]).tril()[None]


class Layout(NamedTuple):
    """How rows are laid out for one packed forward of a causal model.

    Attributes:
        input_ids, position_ids: `(U, Q)`.
        visible: bool `(U, Q, Q)`, who sees whom.
        keep: `(S,)` positions whose logits are needed.
        place: `(B,)` where prompts are shared: row b's states are block `place[b]` of the kept ones; else None.
    """

    input_ids: Tensor
    position_ids: Tensor
    visible: Tensor
    keep: Tensor
    place: Tensor | None = None


def group_layout(prompts: Mapping[str, Tensor], branches: Branches) -> Layout:
    """`[prompt, branches]` for each of a left-padded batch of prompts."""
    mask = prompts["attention_mask"]
    prompt_length, slots = mask.shape[1], len(branches.steps)
    return Layout(
        input_ids=torch.cat([prompts["input_ids"], branches.tokens], 1),
        position_ids=torch.cat([prompt_positions(mask), mask.sum(1, keepdim=True) + branches.steps], 1),
        visible=group_visibility(mask, branches.visible),
        keep=torch.arange(prompt_length - 1, prompt_length + slots, device=mask.device),
    )


class BranchDecoder(ABC):
    """Decode many branches on one cached prompt; the prompt's cache is never copied or reordered.

    Every token that was ever fed keeps its place in the cache; a branch that continues another one *sees* that one's
    tokens, which is an entry in the mask. A prompt is computed once, whatever the number of branches.

    Attributes:
        root_logits: `(B, 1, V)`, behind the prompt.
        depth: how many tokens each branch has.

    Args:
        model: bare or wrapped.
        cache: an empty one, for the prompts and the branches behind them.
        prompts: a left-padded batch.
    """

    def __init__(self, model: nn.Module, cache: DynamicCache | EncoderDecoderCache, prompts: Mapping[str, Tensor]):
        self.model, self.cache, self.dtype = model, cache, model_dtype(model)
        self.batch, self.device = len(prompts["input_ids"]), prompts["input_ids"].device
        self.root_logits = self._read(prompts)[:, -1:].float()
        self.cached_prompt = cache.get_seq_length()
        self.restart()

    def _run(self, **inputs: object) -> ModelOutput:
        """The model's forward on what stands behind the cache, which grows by it."""
        return self.model(**inputs, **cache_argument(self.model, self.cache), use_cache=True)

    def restart(self) -> None:
        """Forget all branches; the prompt stays."""
        surplus = self.cache.get_seq_length() - self.cached_prompt
        if surplus:
            self.cache.crop(-surplus)
        self.depth = 0
        self.visible = torch.zeros(self.batch, 1, 0, dtype=torch.bool, device=self.device)

    def extend(self, tokens: Tensor, parents: Tensor) -> Tensor:
        """Append one token to branches: `tokens`, `parents` `(B, n)` -> logits `(B, n, V)`.

        `parents[b, i]` is the branch of the previous call (0 at the first) that branch i continues.
        """
        past = self.visible.gather(1, parents[..., None].expand(-1, -1, self.visible.shape[2]))
        own = torch.eye(tokens.shape[1], dtype=torch.bool, device=tokens.device).expand(len(tokens), -1, -1)
        self.visible = torch.cat([past, own], 2)
        logits = self._feed(tokens)
        self.depth += 1
        return logits.float()

    @abstractmethod
    def _read(self, prompts: Mapping[str, Tensor]) -> Tensor:
        """Run the model on the prompts: logits `(B, n, V)`, the last of which stand behind them."""

    @abstractmethod
    def _feed(self, tokens: Tensor) -> Tensor:
        """Run the model on `tokens` `(B, n)` behind the cache: each sees its prompt and its row of `self.visible`."""
