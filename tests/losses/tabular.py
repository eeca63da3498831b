"""A tabular policy (a table of logits) on a small random tree, for exact tests of the losses."""

from __future__ import annotations

import torch
from torch import Tensor

from gflowtrl.catalog import PrefixTree
from gflowtrl.losses import normalized_flows


def random_tree(seed: int, num_paths: int = 40, depth: int = 4, branching: int = 4) -> PrefixTree:
    """Ids of 2 to `depth` tokens. Last tokens are a separate set, so no id is a prefix of another."""
    generator = torch.Generator().manual_seed(seed)
    paths = torch.randint(0, branching, (num_paths, depth), generator=generator)
    lengths = torch.randint(2, depth + 1, (num_paths,), generator=generator)
    steps = torch.arange(depth)
    paths = torch.where(steps == lengths[:, None] - 1, paths + branching, paths)
    paths = torch.where(steps < lengths[:, None], paths, -1)
    return PrefixTree(paths.unique(dim=0))


class TabularPolicy:
    """pi(child | state) = softmax of the children's logits. `logits (B, M)`: a row per prompt, a column per node."""

    def __init__(self, tree: PrefixTree, logits: Tensor):
        self.tree, self.logits = tree, logits

    def children_of(self, leaves: Tensor) -> Tensor:
        """Children of the states on the way to each leaf: `(B, K) -> (B, K, L, C)`, padded with -1."""
        nodes, width = self.tree.walk(leaves), max(self.tree.max_children)
        levels = [self.tree.children(nodes[..., depth], depth)[1] for depth in range(self.tree.max_depth)]
        return torch.stack([torch.nn.functional.pad(c, (0, width - c.shape[-1]), value=-1) for c in levels], dim=-2)

    def score(self, leaves: Tensor, log_flows: Tensor, learned: Tensor | None = None) -> dict[str, Tensor]:
        """Everything that a trainer passes to a loss, except log Z.

        `log_flows (B, M)` are the true flows, `learned (B, M)` those of a flow head (default: the true ones).
        """
        children = self.children_of(leaves)
        logits = self.logits.gather(1, children.clamp(min=0).flatten(1)).view(children.shape)
        ended = (children < 0).all(-1, keepdim=True)
        logits = logits.masked_fill((children < 0) & ~ended, -torch.inf)
        child_log_probs = logits.log_softmax(-1).masked_fill(children < 0, -torch.inf)
        taken = (children == self.tree.walk(leaves)[..., 1:, None]) & (children >= 0)
        return {
            "log_probs": child_log_probs.masked_fill(~taken, 0.0).sum(-1),
            "child_log_probs": child_log_probs,
            "child_target_log_probs": normalized_flows(self._at(log_flows, children)),
            "lengths": self.tree.leaf_lengths[leaves],
            "log_rewards": log_flows.gather(1, self.tree.leaf_nodes()[leaves]),
            "log_flows": self.flows_of(leaves, log_flows if learned is None else learned),
        }

    def flows_of(self, leaves: Tensor, values: Tensor) -> Tensor:
        """`values (B, M)` at the states s_0 ... s_{L-1} of each leaf: `(B, K, L)`, 0 after a shorter id's end.

        The leaf itself is not read: log F of a leaf is its log R, not the head's value.
        """
        states = self.tree.walk(leaves)[..., :-1]
        steps = torch.arange(self.tree.max_depth)
        inner = steps < self.tree.leaf_lengths[leaves][..., None]
        return values.gather(1, states.clamp(min=0).flatten(1)).view(states.shape).masked_fill(~inner, 0.0)

    @staticmethod
    def _at(values: Tensor, nodes: Tensor) -> Tensor:
        """`values (B, M)` of any nodes `(B, ...)`, -inf for node -1."""
        return values.gather(1, nodes.clamp(min=0).flatten(1)).view(nodes.shape).masked_fill(nodes < 0, -torch.inf)

    def leaf_log_probs(self) -> Tensor:
        """Score every leaf: `(B, N)`."""
        leaves = torch.arange(self.tree.num_leaves).expand(len(self.logits), -1)
        return self.score(leaves, torch.zeros_like(self.logits))["log_probs"].sum(-1)
