"""Many trajectories behind prompts in one row: masks, positions, and decoding on one cached prompt.

A row is `[trunk, branches]`: a prompt, or a window that several prompts begin, and the branches of them all. A 4-D
additive mask lets every branch see its prompt and itself, and positions go on after the prompt, so that each branch is
computed exactly as if it stood alone behind its prompt.
The mask is additive in the model's dtype: a boolean one is silently wrong under eager attention.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers import DynamicCache, EncoderDecoderCache
from transformers.utils import ModelOutput

from gflowtrl.catalog import PrefixTree
from gflowtrl.trunks import Prompts, Trunks, num_prompts

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
    """Rows of one packed forward: trunks, and behind each of them the branches of all prompts that begin it.

    Attributes:
        input_ids, position_ids: `(U, Q)`.
        visible: bool `(U, Q, Q)`, who sees whom.
        keep: `(Q',)` the last columns, beyond which no logits are needed.
        rows, columns: `(n,)` where each state is.
    """

    input_ids: Tensor
    position_ids: Tensor
    visible: Tensor
    keep: Tensor
    rows: Tensor
    columns: Tensor

    def flat_indices(self, kept: bool) -> Tensor:
        """Where each state is in all rows end to end, `(n,)`; with `kept` in rows of the columns `keep` only."""
        width = len(self.keep) if kept else self.input_ids.shape[1]
        return self.rows * width + self.columns - (self.input_ids.shape[1] - width)

    def states(self, values: Tensor, kept: bool) -> Tensor:
        """What the model gives for columns, `(U, Q, ...)` or with `kept` `(U, Q', ...)`, at each state: `(n, ...)`."""
        return values.flatten(0, 1)[self.flat_indices(kept)]


def lay_out(tree: PrefixTree, trunks: Trunks, branches: Branches, aligned: bool = False) -> Layout:
    """Trunks and branches as rows.

    States that stand in the trunk itself are read there; all others are fed, one token each, and see the trunk as far
    as their prompt reaches (and as their way goes on in it), the states on their way, and themselves.

    Args:
        tree: the catalog's.
        trunks: what the prompts are.
        branches: the states that are needed.
        aligned: put states of one depth into the same columns in all rows, which then are longer: for models whose
            positions are those of columns.
    """
    depths = branches.depths
    nodes, prompts = branches.nodes, branches.prompts
    way = tree.path_nodes[tree.first_leaf[nodes]][:, : len(branches.begin) - 1].long()
    way = way.masked_fill(torch.arange(way.shape[1], device=way.device) > depths[:, None], -1)
    in_trunk = _in_trunk(tree, trunks, way.shape[1])[prompts] == way
    in_trunk &= way >= 0
    reached = in_trunk.sum(1)  # the root among them
    fed = (reached <= depths).nonzero().squeeze(1)
    row = trunks.trunk[prompts[fed]]
    slot, width = _slots(row, depths[fed], len(trunks.input_ids), len(branches.begin) - 1 if aligned else None)
    size, total = trunks.mask.shape[1], trunks.mask.shape[1] + width

    def put_in_rows(values: Tensor, empty: int) -> Tensor:
        shape = (len(trunks.input_ids), width, *values.shape[1:])
        return values.new_full(shape, empty).index_put_((row, slot), values)

    # A state is known by its node and its prompt; those on the way to a state are what it sees of the branches.
    key = nodes * len(trunks.cut) + prompts
    way = torch.where(way >= 0, way * len(trunks.cut) + prompts[:, None], -1)[fed]
    keys, ways = put_in_rows(key[fed], -2), put_in_rows(way, -1)
    behind = torch.zeros(*keys.shape, width, dtype=torch.bool, device=keys.device)
    for step in range(1, ways.shape[2]):
        behind |= ways[:, :, step, None] == keys[:, None]
    sees = trunks.cut[prompts] + reached - 1
    rank = trunks.mask.cumsum(1) - 1
    visible = group_visibility(trunks.mask, behind, of_prompt=rank[:, None] < put_in_rows(sees[fed], 0)[..., None])
    columns = trunks.last[prompts] + depths
    columns[fed] = size + slot
    first = size - 1 if not trunks.shared else int(columns.min())
    position = trunks.cut[prompts] + depths - 1
    return Layout(
        input_ids=torch.cat([trunks.input_ids, put_in_rows(tree.tokens_of(nodes[fed]), 0)], 1),
        position_ids=torch.cat([prompt_positions(trunks.mask), put_in_rows(position[fed], 0)], 1),
        visible=visible,
        keep=torch.arange(first, total, device=columns.device),
        rows=trunks.trunk[prompts],
        columns=columns,
    )


def _in_trunk(tree: PrefixTree, trunks: Trunks, length: int) -> Tensor:
    """The nodes that the trunk goes on with behind each prompt, the root first: `(B, length)`, -1 where it leaves the
    tree or ends."""
    nodes = [torch.zeros_like(trunks.cut)]
    for tokens in trunks.following(length - 1).unbind(1):
        nodes.append(tree.step(nodes[-1], tokens))
    return torch.stack(nodes, 1)


def _slots(row: Tensor, depth: Tensor, num_rows: int, levels: int | None) -> tuple[Tensor, int]:
    """Places `(n,)` of states in their rows, counted from 0 in each, and how many a row needs.

    With `levels` each depth has its own block of columns, as wide as the row with the most states there makes it.
    """
    if levels is None:
        group, num_groups = row, num_rows
    else:
        group, num_groups = depth * num_rows + row, levels * num_rows
    counts = torch.bincount(group, minlength=num_groups)
    order = group.argsort(stable=True)
    rank = torch.empty_like(order)
    rank[order] = torch.arange(len(order), device=order.device) - (counts.cumsum(0) - counts)[group[order]]
    if levels is None:
        return rank, int(counts.max())
    widths = counts.view(levels, num_rows).amax(1)
    return rank + (widths.cumsum(0) - widths)[depth], int(widths.sum())


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
        prompts: separate ones or windows.
    """

    def __init__(self, model: nn.Module, cache: DynamicCache | EncoderDecoderCache, prompts: Prompts):
        self.model, self.cache, self.dtype = model, cache, model_dtype(model)
        self.batch, self.device = num_prompts(prompts), prompts["input_ids"].device
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
    def _read(self, prompts: Prompts) -> Tensor:
        """Run the model on the prompts: logits `(B, n, V)`, the last of which stand behind them."""

    @abstractmethod
    def _feed(self, tokens: Tensor) -> Tensor:
        """Run the model on `tokens` `(B, n)` behind the cache: each sees its prompt and its row of `self.visible`."""
