"""Packing many trajectories of prompts into one row: masks, positions, and decoding with one cached prompt.

A row is `[trunk, branches]`: a prompt, or a window that several prompts share, and the branches of all these prompts.
With a 4-D additive mask each branch sees its prompt and itself, and positions continue after the prompt, so each
branch is computed exactly as in a row of its own.
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
    """Return the positions of left-padded prompts: `(B, P)`, 0 on padding."""
    return (attention_mask.long().cumsum(1) - 1).clamp(min=0)


def group_visibility(attention_mask: Tensor, among: Tensor, of_prompt: Tensor | None = None) -> Tensor:
    """Return which columns of `[prompt, S tokens]` see which: `bool (B, P + S, P + S)`.

    Padding sees only itself (a row that sees nothing would give NaN).

    Args:
        attention_mask: `(B, P)` of the prompts.
        among: `bool (B or 1, S, S)`, which of the S tokens after the prompt see which.
        of_prompt: `bool (B, S, P)`, which columns of the prompt each of these tokens sees. None: all.
    """
    batch, prompt_length = attention_mask.shape
    total = prompt_length + among.shape[-1]
    visible = torch.zeros(batch, total, total, dtype=torch.bool, device=attention_mask.device)
    keys = attention_mask.bool()[:, None, :]
    visible[:, :prompt_length, :prompt_length] = keys & keys.new_ones(prompt_length, prompt_length).tril()
    visible[:, prompt_length:, :prompt_length] = keys if of_prompt is None else keys & of_prompt
    visible[:, prompt_length:, prompt_length:] = among
    visible.diagonal(dim1=1, dim2=2).fill_(True)
    return visible


def prompt_visibility(attention_mask: Tensor) -> Tensor:
    """Return which columns of prompts see which: `(B, P)` -> `bool (B, P, P)`."""
    return group_visibility(attention_mask, attention_mask.new_zeros(1, 0, 0, dtype=torch.bool))


def separate_branches(count: int, length: int, device: torch.device) -> Tensor:
    """Return which tokens of `count` separate branches of `length` tokens see which: `bool (1, S, S)`."""
    branch = torch.arange(count, device=device).repeat_interleave(length)
    return (branch[:, None] == branch[None, :]).tril()[None]


class Layout(NamedTuple):
    """The rows of one packed forward: trunks, each followed by the branches of all its prompts.

    Attributes:
        input_ids, position_ids: `(U, Q)`.
        visible: bool `(U, Q, Q)`, which columns see which.
        keep: `(Q',)` the last columns; logits of other columns are not needed.
        rows, columns: `(n,)` the row and the column of each state.
    """

    input_ids: Tensor
    position_ids: Tensor
    visible: Tensor
    keep: Tensor
    rows: Tensor
    columns: Tensor

    def flat_indices(self, kept: bool) -> Tensor:
        """Return each state's index in the flattened rows, `(n,)`; with `kept`, rows of the columns `keep` only."""
        width = len(self.keep) if kept else self.input_ids.shape[1]
        return self.rows * width + self.columns - (self.input_ids.shape[1] - width)

    def at_states(self, output: ModelOutput, kept: bool) -> tuple[Tensor, Tensor | None]:
        """Select the states from a model's output: logits `(n, V)` in float32 and log F `(n,)`, None without heads.

        Args:
            output: the logits `(U, Q, V)`, with `kept` `(U, Q', V)`, or already `(n, V)`; log_flows `(U, Q')`.
            kept: whether the logits are of the columns `keep` only.
        """
        logits, flows = output.logits, getattr(output, "log_flows", None)
        if logits.dim() == 3:
            logits = logits.flatten(0, 1)[self.flat_indices(kept)]
        return logits.float(), None if flows is None else flows.flatten()[self.flat_indices(True)]


def lay_out(tree: PrefixTree, trunks: Trunks, branches: Branches, aligned: bool = False) -> Layout:
    """Arrange trunks and branches in rows.

    States that are part of the trunk are read there. All others are added to the row, one token each. Such a token
    sees the trunk up to the end of its prompt (and further, as far as the trunk continues with its path), the states
    on its path, and itself.

    Args:
        tree: the catalog's tree.
        trunks: the prompts.
        branches: the states that are needed.
        aligned: put states of one depth into the same columns in all rows, which makes the rows longer. For models
            that take one position per column.
    """
    depths = branches.depths
    nodes, prompts = branches.nodes, branches.prompts
    path = tree.path_nodes[tree.first_leaf[nodes]][:, : len(branches.begin) - 1].long()
    path = path.masked_fill(torch.arange(path.shape[1], device=path.device) > depths[:, None], -1)
    in_trunk = _trunk_nodes(tree, trunks, path.shape[1])[prompts] == path
    in_trunk &= path >= 0
    num_shared = in_trunk.sum(1)  # including the root
    added = (num_shared <= depths).nonzero().squeeze(1)
    row = trunks.trunk[prompts[added]]
    slot, width = _assign_slots(
        row, depths[added], len(trunks.input_ids), len(branches.begin) - 1 if aligned else None
    )
    size, total = trunks.mask.shape[1], trunks.mask.shape[1] + width

    def put_in_rows(values: Tensor, empty: int) -> Tensor:
        shape = (len(trunks.input_ids), width, *values.shape[1:])
        return values.new_full(shape, empty).index_put_((row, slot), values)

    # A state is identified by its node and its prompt. It sees the states on its path.
    key = nodes * len(trunks.cut) + prompts
    path = torch.where(path >= 0, path * len(trunks.cut) + prompts[:, None], -1)[added]
    keys, paths = put_in_rows(key[added], -2), put_in_rows(path, -1)
    among = torch.zeros(*keys.shape, width, dtype=torch.bool, device=keys.device)
    for depth in range(1, paths.shape[2]):
        among |= paths[:, :, depth, None] == keys[:, None]
    num_visible = trunks.cut[prompts] + num_shared - 1
    rank = trunks.mask.cumsum(1) - 1
    of_prompt = rank[:, None] < put_in_rows(num_visible[added], 0)[..., None]
    columns = trunks.last[prompts] + depths
    columns[added] = size + slot
    first = size - 1 if not trunks.shared else int(columns.min())
    position = trunks.cut[prompts] + depths - 1
    return Layout(
        input_ids=torch.cat([trunks.input_ids, put_in_rows(tree.tokens_of(nodes[added]), 0)], 1),
        position_ids=torch.cat([prompt_positions(trunks.mask), put_in_rows(position[added], 0)], 1),
        visible=group_visibility(trunks.mask, among, of_prompt),
        keep=torch.arange(first, total, device=columns.device),
        rows=trunks.trunk[prompts],
        columns=columns,
    )


def _trunk_nodes(tree: PrefixTree, trunks: Trunks, length: int) -> Tensor:
    """Return the nodes along the trunk after each prompt, root first: `(B, length)`; -1 outside the tree or trunk."""
    nodes = [torch.zeros_like(trunks.cut)]
    for tokens in trunks.following(length - 1).unbind(1):
        nodes.append(tree.step(nodes[-1], tokens))
    return torch.stack(nodes, 1)


def _assign_slots(row: Tensor, depth: Tensor, num_rows: int, levels: int | None) -> tuple[Tensor, int]:
    """Number the states of each row from 0: return `(n,)` numbers, and the largest number of slots of a row.

    With `levels`, each depth has its own block of columns, as wide as the row with the most states there needs.
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
    """Decode many branches with one cached prompt, which is never copied or reordered.

    Every token stays in the cache. A branch that continues another branch *sees* that branch's tokens, by entries of
    the mask. A prompt is computed once, whatever the number of branches.

    Attributes:
        root_logits: `(B, 1, V)`, after the prompt.
        root_flows: `(B, 1)`, log F of the root; None without `flows`.
        flows: `(B, n)`, log F of the last states; None without `flows`.
        depth: number of tokens of each branch.

    Args:
        model: bare or wrapped.
        cache: an empty cache for the prompts and their branches.
        prompts: separate prompts or windows.
        flows: whether to read the model's flow head at every state.
    """

    def __init__(
        self, model: nn.Module, cache: DynamicCache | EncoderDecoderCache, prompts: Prompts, flows: bool = False
    ):
        self.model, self.cache, self.dtype, self.reads_flows = model, cache, model_dtype(model), flows
        self.batch, self.device = num_prompts(prompts), prompts["input_ids"].device
        self.flows: Tensor | None = None
        self.root_logits = self._read(prompts)[:, -1:].float()
        self.root_flows = self.flows
        self.cached_prompt = cache.get_seq_length()
        self.restart()

    def _run(self, flow_positions: Tensor, **inputs: object) -> ModelOutput:
        """Run the model's forward on new tokens and add them to the cache. Keep log F at `flow_positions` of them."""
        extra = {"flow_positions": flow_positions} if self.reads_flows else {}
        output = self.model(**inputs, **extra, **cache_argument(self.model, self.cache), use_cache=True)
        self.flows = output.log_flows if self.reads_flows else None
        return output

    def restart(self) -> None:
        """Remove all branches and keep the prompt."""
        surplus = self.cache.get_seq_length() - self.cached_prompt
        if surplus:
            self.cache.crop(-surplus)
        self.depth, self.flows = 0, self.root_flows
        self.visible = torch.zeros(self.batch, 1, 0, dtype=torch.bool, device=self.device)

    def extend(self, tokens: Tensor, parents: Tensor) -> Tensor:
        """Append one token to each branch: `tokens`, `parents` `(B, n)` -> logits `(B, n, V)`.

        `parents[b, i]` is the branch of the previous call (0 in the first call) that branch i continues.
        """
        past = self.visible.gather(1, parents[..., None].expand(-1, -1, self.visible.shape[2]))
        itself = torch.eye(tokens.shape[1], dtype=torch.bool, device=tokens.device).expand(len(tokens), -1, -1)
        self.visible = torch.cat([past, itself], 2)
        logits = self._feed(tokens)
        self.depth += 1
        return logits.float()

    @abstractmethod
    def _read(self, prompts: Prompts) -> Tensor:
        """Run the model on the prompts and return logits `(B, n, V)`; the last ones are those after the prompts."""

    @abstractmethod
    def _feed(self, tokens: Tensor) -> Tensor:
        """Run the model on `tokens` `(B, n)`; each sees its prompt and the tokens in its row of `self.visible`."""
