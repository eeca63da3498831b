"""What stands behind prompts: the states of their trajectories, each of them once.

Trajectories of one prompt begin alike, often: two of them that share their first token share the state behind it.
Such states are computed once, and states from which only one leaf can be reached not at all: what follows there is
certain.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from gflowtrl.catalog import PrefixTree


class Branches(NamedTuple):
    """The distinct states of K trajectories for each of B prompts, level by level; n in all, the B roots first.

    Attributes:
        nodes: `(n,)` the node of each state.
        prompts: `(n,)` the prompt that it stands behind.
        begin: L + 1 numbers: the states of depth d are begin[d] ... begin[d + 1] - 1.
        slots: `(B, K, L)` which of them the states s_0 .. s_{L-1} of each trajectory are, -1 for those that are not
            computed.
    """

    nodes: Tensor
    prompts: Tensor
    begin: list[int]
    slots: Tensor

    @property
    def depths(self) -> Tensor:
        """The number of tokens behind the prompt: `(n,)`."""
        counts = [end - start for start, end in zip(self.begin, self.begin[1:], strict=False)]
        depths = torch.arange(len(counts), device=self.nodes.device)
        return depths.repeat_interleave(depths.new_tensor(counts), output_size=len(self.nodes))


def dense_rank(nodes: Tensor) -> Tensor:
    """The place of each node among the distinct nodes of its row in ascending order, -1 for -1: `(B, K, ...)`."""
    ordered, order = nodes.sort(dim=1)
    begins = torch.zeros_like(order)
    begins[:, 1:] = ordered[:, 1:] != ordered[:, :-1]
    rank = begins.cumsum(1) - (ordered[:, :1] < 0).long()
    return torch.empty_like(order).scatter_(1, order, rank)


def scatter_rows(values: Tensor, place: Tensor, width: int, empty: int = 0) -> Tensor:
    """`values` `(B, K)` at their places `(B, K)` in `(B, width)`; those whose place is -1 are left out."""
    return values.new_full((len(values), 1 + width), empty).scatter_(1, place + 1, values)[:, 1:]


def merge_branches(tree: PrefixTree, states: Tensor) -> Branches:
    """Trajectories as states of which no prompt has one twice.

    Args:
        tree: on the device of `states`.
        states: `(B, K, L)` the nodes s_0 .. s_{L-1} of each, -1 for those that need not be computed; roots always are.
    """
    batch = len(states)
    states = states.clone()
    states[:, :, 0] = 0
    # Nodes are numbered level by level, so this orders states by depth, and roots by prompt.
    prompt = torch.arange(batch, device=states.device)[:, None, None]
    keys = torch.where(states >= 0, states * batch + prompt, -1)
    distinct, slots = keys.unique(return_inverse=True)
    none = int((distinct[:1] < 0).sum())  # a device has to be waited for anyway
    distinct, slots = distinct[none:], slots - none
    bounds = distinct.new_tensor(tree.level_start[:-1]) * batch
    return Branches(
        nodes=distinct // batch,
        prompts=distinct % batch,
        begin=torch.searchsorted(distinct, bounds).tolist()[: states.shape[2]] + [len(distinct)],
        slots=slots,
    )
