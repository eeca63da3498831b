"""The prefix tree of all semantic ids as flat tensors.

Every level of the tree is one contiguous block of node numbers, sorted by path, so that

- the children of a node are consecutive numbers (`first_child[node] ... + num_children[node] - 1`),
- the leaves below a node are consecutive too, and
- "child of `node` reached by `token`" is one binary search in the sorted array `node * num_tokens + token`.

No query walks a dictionary or loops over items in Python (the idea of STATIC, arXiv 2602.22647).
"""

from __future__ import annotations

import itertools

import numpy as np
import torch
from torch import Tensor


class PrefixTree:
    """Prefix tree over token paths; node 0 is the root, -1 marks "none".

    Args:
        token_paths: integer tensor `(N, L)`, one id a row, shorter ids padded with -1 at the right. Rows may come in
            any order; **leaf i** is row i of the lexicographically sorted paths (`paths`), and `leaf_of_row` maps the
            rows that were given to leaves.

    Raises:
        ValueError: an empty tensor, a path without tokens, a hole (-1 before a token), two equal paths, or a path
            that is a prefix of another one (generation could not know where to stop).
    """

    # Node and leaf numbers are stored in 32 bits: half the memory, 2 billion nodes.

    def __init__(self, token_paths: Tensor):
        paths = _checked(token_paths)
        order = torch.from_numpy(np.lexsort(paths.T.flip(0).numpy()))  # stable, and the last key counts most
        paths = paths[order]
        self._check_prefix_free(paths, order)
        self.leaf_of_row = torch.empty(len(paths), dtype=torch.int32)
        self.leaf_of_row[order] = torch.arange(len(paths), dtype=torch.int32)
        self.paths = paths.to(torch.int32)
        self.leaf_lengths = (paths >= 0).sum(1)
        self.num_leaves, self.max_depth = paths.shape
        self.num_tokens = int(paths.max()) + 1
        self._build(paths)

    # ------------------------------------------------------------------------------------------------ construction
    def _build(self, paths: Tensor) -> None:
        """Number the nodes level by level. `paths` is sorted, so a new node begins where the prefix changes."""
        num_leaves, depth = paths.shape
        changed = torch.zeros(num_leaves, dtype=torch.bool)
        changed[0] = True
        path_nodes = torch.full((num_leaves, depth + 1), -1, dtype=torch.int32)
        path_nodes[:, 0] = 0
        tokens, parents, firsts = [torch.tensor([-1])], [torch.tensor([-1])], [torch.tensor([0])]
        level_start = [0, 1]
        for level in range(depth):
            column = paths[:, level]
            changed[1:] |= column[1:] != column[:-1]
            begin = torch.nonzero(changed & (column >= 0)).squeeze(1)
            numbers = torch.cumsum(changed & (column >= 0), 0) - 1 + level_start[-1]
            path_nodes[:, level + 1] = torch.where(column >= 0, numbers, -1)
            tokens.append(column[begin])
            parents.append(path_nodes[begin, level].long())
            firsts.append(begin)
            level_start.append(level_start[-1] + len(begin))
        self.path_nodes = path_nodes
        self.level_start = level_start  # nodes of depth d are level_start[d] ... level_start[d + 1] - 1
        self.num_nodes = level_start[-1]
        self.node_token = torch.cat(tokens).to(torch.int32)
        self.parent = torch.cat(parents).to(torch.int32)
        self.first_leaf = torch.cat(firsts).to(torch.int32)
        self.leaf_count = torch.bincount(path_nodes[path_nodes >= 0]).to(torch.int32)
        parent = self.parent[1:].long()
        self.num_children = torch.bincount(parent, minlength=self.num_nodes).to(torch.int32)
        # Children are numbered in the order of their parents.
        first_child = self.num_children.cumsum(0) - self.num_children + 1
        self.first_child = torch.where(self.num_children > 0, first_child, -1).to(torch.int32)
        self._child_keys = parent * self.num_tokens + self.node_token[1:].long()
        used = torch.zeros(self.num_tokens, dtype=torch.bool)
        used[self.node_token[1:].long()] = True
        self.tokens = torch.nonzero(used).squeeze(1)
        self._token_place = torch.cumsum(used, 0) - 1
        # How many nodes of each depth lead to more than one leaf: where something is left to decide.
        sizes = [1, *self.nodes_per_depth]
        self.num_branching = [int(level.sum()) for level in (self.leaf_count > 1).split(sizes)[:-1]]
        self.max_children = [int(level.max()) for level in self.num_children.split(sizes)[:-1]]

    @staticmethod
    def _check_prefix_free(paths: Tensor, order: Tensor) -> None:
        # -1 sorts before every token: an equal or longer path with the same beginning comes next.
        continued = ((paths[:-1] == paths[1:]) | (paths[:-1] < 0)).all(1).nonzero()
        if not len(continued):
            return
        i = int(continued[0])
        short, other = (path[path >= 0].tolist() for path in paths[i : i + 2])
        rows = f"rows {int(order[i])} and {int(order[i + 1])}"
        if short == other:
            raise ValueError(
                f"Token path {short} stands twice ({rows}). Paths of a PrefixTree must be distinct; items "
                f"that share an id are merged by ItemCatalog.from_semantic_ids."
            )
        raise ValueError(
            f"Token path {short} is a prefix of {other} ({rows}), so "
            f"generation could not tell where the shorter id ends. Give ids of equal length or add an end token."
        )

    # ------------------------------------------------------------------------------------------------------ queries
    @property
    def device(self) -> torch.device:
        return self.paths.device

    @property
    def nodes_per_depth(self) -> list[int]:
        """The number of prefixes of 1, 2, ... `max_depth` tokens."""
        return [end - begin for begin, end in itertools.pairwise(self.level_start)][1:]

    def to(self, device: torch.device | str) -> PrefixTree:
        """Move all tensors to `device`, in place."""
        for name, value in vars(self).items():
            if isinstance(value, Tensor):
                setattr(self, name, value.to(device))
        return self

    def step(self, nodes: Tensor, tokens: Tensor) -> Tensor:
        """Child of each node by each token, elementwise: `(...,), (...,) -> (...,)`; -1 where there is none.

        A node or token of -1 has no child.
        """
        known = (nodes >= 0) & (tokens >= 0) & (tokens < self.num_tokens)
        keys = torch.where(known, nodes * self.num_tokens + tokens, 0)
        place = torch.searchsorted(self._child_keys, keys).clamp_(max=self.num_nodes - 2)
        return torch.where(known & (self._child_keys[place] == keys), place + 1, -1)

    def tokens_of(self, nodes: Tensor) -> Tensor:
        """The token that leads to each node, 0 for the root and for -1: `(...,) -> (...,)`."""
        return self.node_token[nodes.clamp(min=0)].long().clamp(min=0)

    def compact_token_ids(self, tokens: Tensor) -> Tensor:
        """Where each token of the catalog stands in `tokens`, all that occur in ids: `(...,) -> (...,)`."""
        return self._token_place[tokens]

    def children(self, nodes: Tensor, depth: int) -> tuple[Tensor, Tensor]:
        """Children of nodes of one depth, padded with -1 to the largest number of children at that depth.

        Args:
            nodes: `(...,)` nodes of depth `depth`; -1 has no children.
            depth: 0 for the root.

        Returns:
            tokens and child nodes, both `(..., C)`, sorted by token.
        """
        return self._children(nodes, self.max_children[depth])

    def _children(self, nodes: Tensor, width: int) -> tuple[Tensor, Tensor]:
        offsets = torch.arange(width, device=nodes.device)
        safe = nodes.clamp(min=0)
        count = torch.where(nodes >= 0, self.num_children[safe], 0)
        child_nodes = torch.where(offsets < count[..., None], self.first_child[safe][..., None] + offsets, -1)
        tokens = torch.where(child_nodes >= 0, self.node_token[child_nodes.clamp(min=0)], -1).long()
        return tokens, child_nodes

    def allowed_tokens(self, nodes: Tensor, vocab_size: int) -> Tensor:
        """Mask over the vocabulary of the tokens that lead to a child: `(...,) -> bool (..., vocab_size)`."""
        if vocab_size < self.num_tokens:
            raise ValueError(
                f"vocab_size is {vocab_size}, but the catalog uses token {self.num_tokens - 1}. "
                f"Resize the model's embeddings to the tokenizer's length."
            )
        tokens, _ = self._children(nodes, max(self.max_children))
        mask = torch.zeros(*nodes.shape, vocab_size + 1, dtype=torch.bool, device=nodes.device)
        return mask.scatter_(-1, torch.where(tokens >= 0, tokens, vocab_size), True)[..., :vocab_size]

    def walk(self, leaves: Tensor) -> Tensor:
        """Nodes on the way to each leaf: `(...,) -> (..., L + 1)`, root first, -1 after a shorter id's end."""
        return self.path_nodes[leaves].long()

    def leaf_nodes(self) -> Tensor:
        """The node at which each leaf ends: `(N,)`."""
        return self.path_nodes.gather(1, self.leaf_lengths[:, None]).squeeze(1).long()

    def path_mask(self, leaves: Tensor) -> Tensor:
        """Which nodes lie on the way to one of `leaves` `(n,)`, root and end among them: bool `(M,)`."""
        path = self.walk(leaves)
        found = torch.zeros(self.num_nodes, dtype=torch.bool, device=path.device)
        found[path[path >= 0]] = True
        return found

    def is_determined(self, nodes: Tensor) -> Tensor:
        """Whether at most one leaf can be reached from each node: `(...,) -> bool (...,)`; True for -1.

        Whatever tokens follow there, they are certain: a policy gives them probability 1 without being asked.
        """
        return (nodes < 0) | (self.leaf_count[nodes.clamp(min=0)] == 1)

    def unique_leaf(self, nodes: Tensor) -> Tensor:
        """The leaf of settled nodes, -1 for all others and for -1: `(...,) -> (...,)`."""
        return torch.where((nodes >= 0) & self.is_determined(nodes), self.first_leaf[nodes.clamp(min=0)].long(), -1)

    def leaf_at(self, nodes: Tensor) -> Tensor:
        """The leaf that a node is, -1 for inner nodes: `(...,) -> (...,)`."""
        safe = nodes.clamp(min=0)
        return torch.where((nodes >= 0) & (self.num_children[safe] == 0), self.first_leaf[safe].long(), -1)

    def log_flows(self, leaf_log_rewards: Tensor) -> Tensor:
        """Log of the total reward below every node: `log F(s) = logsumexp of log R over the leaves below s`.

        Args:
            leaf_log_rewards: `(B, N)`; -inf is a reward of zero.

        Returns:
            `(B, M)`; column 0 is log Z. Computed level by level from below, so that a subtree with tiny rewards keeps
            its relative precision.
        """
        batch, num_leaves = leaf_log_rewards.shape
        if num_leaves != self.num_leaves:
            raise ValueError(f"leaf_log_rewards has {num_leaves} columns, but the tree has {self.num_leaves} leaves.")
        flows = leaf_log_rewards.new_full((batch, self.num_nodes), -torch.inf)
        flows[:, self.leaf_nodes()] = leaf_log_rewards
        for depth in range(self.max_depth, 0, -1):
            start, end = self.level_start[depth], self.level_start[depth + 1]
            first, last = self.level_start[depth - 1], start
            below = flows[:, start:end]
            parent = (self.parent[start:end].long() - first).expand(batch, -1)
            peak = below.new_full((batch, last - first), -torch.inf).scatter_reduce(1, parent, below, "amax")
            peak = peak.masked_fill(peak == -torch.inf, 0.0)
            total = torch.zeros_like(peak).scatter_add_(1, parent, (below - peak.gather(1, parent)).exp())
            inner = self.num_children[first:last] > 0
            flows[:, first:last] = torch.where(inner, total.log() + peak, flows[:, first:last])
        return flows

    def __repr__(self) -> str:
        return f"PrefixTree(num_leaves={self.num_leaves}, num_nodes={self.num_nodes}, max_depth={self.max_depth})"


def _checked(token_paths: Tensor) -> Tensor:
    if token_paths.ndim != 2 or token_paths.numel() == 0 or token_paths.is_floating_point():
        raise ValueError(
            f"token_paths must be a non-empty integer tensor of shape (items, tokens per id), got shape "
            f"{tuple(token_paths.shape)} of {token_paths.dtype}."
        )
    paths = token_paths.detach().cpu().long()
    if int(paths.min()) < -1:
        raise ValueError(f"token_paths holds {int(paths.min())}; tokens are >= 0 and -1 is the only padding.")
    present = paths >= 0
    empty = torch.nonzero(~present[:, 0]).squeeze(1)
    if len(empty):
        raise ValueError(f"Row {int(empty[0])} of token_paths has no first token; every id needs at least one token.")
    holes = torch.nonzero((present[:, 1:] & ~present[:, :-1]).any(1)).squeeze(1)
    if len(holes):
        raise ValueError(f"Row {int(holes[0])} of token_paths has a token after padding; pad with -1 at the right.")
    return paths[:, : int(present.sum(1).max())]
