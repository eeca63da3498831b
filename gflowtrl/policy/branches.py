"""What stands behind a prompt: the states of its trajectories, each of them once.

Trajectories of one prompt begin alike, often: two of them that share their first token share the state behind it.
Such states are computed once, and states from which only one leaf can be reached not at all: what follows there is
certain. A level is as wide as the prompt with the most distinct states there makes it: a batch of many prompts with
few trajectories gains next to nothing, and many trajectories cost no more than the tree's width.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from gflowtrl.catalog import PrefixTree


class Branches(NamedTuple):
    """The states s_0 .. s_{L-1} of K trajectories for each of B prompts: the root, then S more, level by level.

    Attributes:
        nodes: `(B, 1 + S)` the node of each state, -1 in empty slots.
        slots: `(B, K, L)` where the states of each trajectory are, -1 for those that are not computed.
        begin: L + 1 numbers, the slots of level d are begin[d] ... begin[d + 1] - 1.
        tokens: `(B, S)` the token that leads to each state but the root; any token in empty slots.
        steps: `(S,)` how many tokens of the branch stand before it, 0 for s_1.
        visible: bool `(B, S, S)` each state sees the states on its way and itself.
    """

    nodes: Tensor
    slots: Tensor
    begin: list[int]
    tokens: Tensor
    steps: Tensor
    visible: Tensor


def places(nodes: Tensor) -> Tensor:
    """The place of each node among the distinct nodes of its row in ascending order, -1 for -1: `(B, K, ...)`."""
    ordered, order = nodes.sort(dim=1)
    begins = torch.zeros_like(order)
    begins[:, 1:] = ordered[:, 1:] != ordered[:, :-1]
    rank = begins.cumsum(1) - (ordered[:, :1] < 0).long()
    return torch.empty_like(order).scatter_(1, order, rank)


def put(values: Tensor, place: Tensor, width: int, empty: int = 0) -> Tensor:
    """`values` `(B, K)` at their places `(B, K)` in `(B, width)`; those whose place is -1 are left out."""
    return values.new_full((len(values), 1 + width), empty).scatter_(1, place + 1, values)[:, 1:]


def merge_branches(tree: PrefixTree, states: Tensor) -> Branches:
    """Trajectories as states of which no prompt has one twice.

    Args:
        tree: on the device of `nodes`.
        states: `(B, K, L)` the nodes s_0 .. s_{L-1} of each, -1 for those that need not be computed.
    """
    batch = len(states)
    place = places(states)
    widths = (place.amax((0, 1)) + 1).tolist()  # the only thing that a device has to be waited for
    widths[0] = 1
    begin = [sum(widths[:level]) for level in range(len(widths) + 1)]
    merged = states.new_zeros(batch, begin[-1])
    visible = torch.zeros(batch, begin[-1], begin[-1], dtype=torch.bool, device=states.device)
    for step, width in enumerate(widths):
        level = slice(begin[step], begin[step + 1])
        merged[:, level] = put(states[:, :, step], place[:, :, step], width, empty=-1)
        visible[:, level, level] = torch.eye(width, dtype=torch.bool, device=states.device)
        if step and width:
            before = visible[:, begin[step - 1] : begin[step]]
            parents = put(place[:, :, step - 1], place[:, :, step], width)
            visible[:, level] |= before.gather(1, parents[..., None].expand(-1, -1, begin[-1]))
    return Branches(
        nodes=merged,
        slots=torch.where(place >= 0, place + place.new_tensor(begin[:-1]), -1),
        begin=begin,
        tokens=tree.tokens_of(merged[:, 1:]),
        steps=merged.new_tensor([step for step, width in enumerate(widths[1:]) for _ in range(width)]),
        visible=visible[:, 1:, 1:],
    )
