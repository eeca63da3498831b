"""The distinct states of each prompt's trajectories.

Trajectories of one prompt often share a prefix: two trajectories with the same first token share the state after it.
Each such state is computed once. A state from which only one leaf can be reached is not computed at all, since the
remaining tokens are certain.
"""

from __future__ import annotations

from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from gflowtrl.catalog import PrefixTree


class Branches(NamedTuple):
    """The n distinct states of K trajectories for each of B prompts, level by level, the B roots first.

    Attributes:
        nodes: `(n,)` the node of each state.
        prompts: `(n,)` the prompt of each state.
        begin: L + 1 numbers: the states of depth d are begin[d] ... begin[d + 1] - 1.
        slots: `(B, K, L)` index of the states s_0 .. s_{L-1} of each trajectory, -1 for states that are not computed.
    """

    nodes: Tensor
    prompts: Tensor
    begin: list[int]
    slots: Tensor

    @property
    def depths(self) -> Tensor:
        """The number of tokens after the prompt: `(n,)`."""
        counts = [end - start for start, end in pairwise(self.begin)]
        depths = torch.arange(len(counts), device=self.nodes.device)
        return depths.repeat_interleave(depths.new_tensor(counts), output_size=len(self.nodes))


def dense_rank(nodes: Tensor) -> Tensor:
    """Return the dense rank of each node among the distinct nodes of its row (smallest = 0). Padding (-1) stays -1.

    Args:
        nodes: `(B, K, ...)`; ranks are taken along K.
    """
    ordered, order = nodes.sort(dim=1)
    differs = torch.zeros_like(order)
    differs[:, 1:] = ordered[:, 1:] != ordered[:, :-1]
    rank = differs.cumsum(1) - (ordered[:, :1] < 0).long()
    return torch.empty_like(order).scatter_(1, order, rank)


def scatter_rows(values: Tensor, index: Tensor, width: int, empty: int = 0) -> Tensor:
    """Scatter `values` `(B, K)` to the columns `index` `(B, K)` of a `(B, width)` tensor; index -1 drops a value."""
    return values.new_full((len(values), 1 + width), empty).scatter_(1, index + 1, values)[:, 1:]


def merge_branches(tree: PrefixTree, states: Tensor) -> Branches:
    """Merge the states of trajectories so that each prompt has each state once.

    Args:
        tree: on the device of `states`.
        states: `(B, K, L)` the nodes s_0 .. s_{L-1} of each trajectory, -1 for states that need not be computed.
            The roots are always included.
    """
    batch = len(states)
    states = states.clone()
    states[:, :, 0] = 0
    # Nodes are numbered level by level, so this orders states by depth, and roots by prompt.
    prompt = torch.arange(batch, device=states.device)[:, None, None]
    keys = torch.where(states >= 0, states * batch + prompt, -1)
    distinct, slots = keys.unique(return_inverse=True)
    padding = int((distinct[:1] < 0).sum())  # `unique` has already synchronized with the device
    distinct, slots = distinct[padding:], slots - padding
    bounds = distinct.new_tensor(tree.level_start[:-1]) * batch
    return Branches(
        nodes=distinct // batch,
        prompts=distinct % batch,
        begin=torch.searchsorted(distinct, bounds).tolist()[: states.shape[2]] + [len(distinct)],
        slots=slots,
    )
