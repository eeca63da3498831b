"""The prefix tree of all semantic ids as flat tensors.

The nodes of each level have consecutive numbers, sorted by path, so

- the children of a node have consecutive numbers (`first_child[node] ... + num_children[node] - 1`),
- the leaves below a node have consecutive numbers, and
- the child of `node` by `token` is found by one binary search in the sorted array `node * num_tokens + token`.

No query walks a dictionary or loops over items in Python (the idea of STATIC, arXiv 2602.22647).
"""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from .rows import sorted_rows


_EXP_RANGE = 80.0  # exp(-80) is a normal number in 32 bits
_INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
_MOST_TOKENS = 2**26  # a table of all token ids up to the largest one takes 8 bytes per id


class PrefixError(ValueError):
    """A path is the beginning of another one; `rows` are the rows of both."""

    def __init__(self, message: str, rows: tuple[int, int]):
        super().__init__(message)
        self.rows = rows


class PrefixTree:
    """Prefix tree over token paths; node 0 is the root, -1 marks "none".

    Args:
        token_paths: integer tensor `(N, L)`, one semantic id per row, shorter ids padded with -1 on the right. The
            rows may have any order. **Leaf i** is row i of the lexicographically sorted paths (`paths`), and
            `leaf_of_row` maps the rows of `token_paths` to leaves.

    Raises:
        ValueError: the tensor is empty, a path has no tokens or has -1 before a token, two paths are equal, or a path
            is a prefix of another path (generation could not know where to stop).
    """

    # Node and leaf numbers are stored in 32 bits, which halves the memory and allows 2 billion nodes.

    def __init__(self, token_paths: Tensor):
        paths = _check_paths(token_paths)
        paths, order = sorted_rows(paths)
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
        """Number the nodes level by level. `paths` is sorted, so a new node starts where the prefix changes."""
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
        self.tokens = torch.bincount(self.node_token[1:]).nonzero().squeeze(1)  # sorted
        self._compact_ids = torch.searchsorted(self.tokens, torch.arange(self.num_tokens))
        # The number of nodes at each depth that lead to more than one leaf, so that a choice is left.
        sizes = [1, *self.nodes_per_depth]
        self.num_branching = [int(level.sum()) for level in (self.leaf_count > 1).split(sizes)[:-1]]
        self.max_children = [int(level.max()) for level in self.num_children.split(sizes)[:-1]]

    @staticmethod
    def _check_prefix_free(paths: Tensor, order: Tensor) -> None:
        # -1 sorts before every token, so an equal path, or a longer one with this prefix, comes next.
        continued = ((paths[:-1] == paths[1:]) | (paths[:-1] < 0)).all(1).nonzero()
        if not len(continued):
            return
        i = int(continued[0])
        short, other = (path[path >= 0].tolist() for path in paths[i : i + 2])
        pair = int(order[i]), int(order[i + 1])
        rows = f"rows {pair[0]} and {pair[1]}"
        if short == other:
            raise ValueError(
                f"Token path {short} occurs twice ({rows}). Paths of a PrefixTree must be distinct; "
                f"ItemCatalog.from_semantic_ids merges items that share an id."
            )
        raise PrefixError(
            f"Token path {short} is a prefix of {other} ({rows}), so generation could not tell where the shorter id "
            f"ends. Use ids of equal length, or add an end token.",
            pair,
        )

    # ------------------------------------------------------------------------------------------------------ queries
    @property
    def device(self) -> torch.device:
        return self.paths.device

    @property
    def nodes_per_depth(self) -> list[int]:
        """The number of nodes at the depths 1, 2, ... `max_depth`."""
        return [end - begin for begin, end in itertools.pairwise(self.level_start)][1:]

    def to(self, device: torch.device | str) -> PrefixTree:
        """Move all tensors to `device`, in place."""
        for name, value in vars(self).items():
            if isinstance(value, Tensor):
                setattr(self, name, value.to(device))
        return self

    def step(self, nodes: Tensor, tokens: Tensor) -> Tensor:
        """Return the child of each node by each token, elementwise: `(...,), (...,) -> (...,)`; -1 for no child.

        A node or token of -1 has no child.
        """
        _check_integers(nodes=nodes, tokens=tokens)
        known = (nodes >= 0) & (tokens >= 0) & (tokens < self.num_tokens)
        keys = torch.where(known, nodes * self.num_tokens + tokens, 0)
        index = torch.searchsorted(self._child_keys, keys).clamp_(max=self.num_nodes - 2)
        return torch.where(known & (self._child_keys[index] == keys), index + 1, -1)

    def tokens_of(self, nodes: Tensor) -> Tensor:
        """Return the token that leads to each node, 0 for the root and for -1: `(...,) -> (...,)`."""
        _check_integers(nodes=nodes)
        return self.node_token[nodes.clamp(min=0)].long().clamp(min=0)

    def compact_token_ids(self, tokens: Tensor) -> Tensor:
        """Return the index of each token in `self.tokens`, the sorted tokens of all ids: `(...,) -> (...,)`."""
        return self._compact_ids[tokens]

    def children(self, nodes: Tensor, depth: int) -> tuple[Tensor, Tensor]:
        """Return the children of nodes of one depth, padded with -1 to the largest number of children at that depth.

        Args:
            nodes: `(...,)` nodes of depth `depth`; -1 has no children.
            depth: 0 for the root.

        Returns:
            tokens and child nodes, both `(..., C)`, sorted by token.
        """
        return self._children(nodes, self.max_children[depth])

    def _children(self, nodes: Tensor, width: int) -> tuple[Tensor, Tensor]:
        _check_integers(nodes=nodes)
        offsets = torch.arange(width, device=nodes.device)
        safe = nodes.clamp(min=0)
        count = torch.where(nodes >= 0, self.num_children[safe], 0)
        child_nodes = torch.where(offsets < count[..., None], self.first_child[safe][..., None] + offsets, -1)
        tokens = torch.where(child_nodes >= 0, self.node_token[child_nodes.clamp(min=0)], -1).long()
        return tokens, child_nodes

    def allowed_tokens(self, nodes: Tensor, vocab_size: int) -> Tensor:
        """Return a mask of the tokens that lead to a child: `(...,) -> bool (..., vocab_size)`."""
        if vocab_size < self.num_tokens:
            raise ValueError(
                f"vocab_size is {vocab_size}, but the catalog uses token id {self.num_tokens - 1}. "
                f"Resize the model's embeddings to the tokenizer's length."
            )
        tokens, _ = self._children(nodes, max(self.max_children))
        mask = torch.zeros(*nodes.shape, vocab_size + 1, dtype=torch.bool, device=nodes.device)
        return mask.scatter_(-1, torch.where(tokens >= 0, tokens, vocab_size), True)[..., :vocab_size]

    def walk(self, leaves: Tensor) -> Tensor:
        """Return the nodes of each leaf's path: `(...,) -> (..., L + 1)`, root first, -1 after a shorter id's end."""
        _check_integers(leaves=leaves)
        return self.path_nodes[leaves].long()

    def leaf_nodes(self) -> Tensor:
        """Return the last node of each leaf's path: `(N,)`."""
        return self.path_nodes.gather(1, self.leaf_lengths[:, None]).squeeze(1).long()

    def path_mask(self, leaves: Tensor) -> Tensor:
        """Return a mask, bool `(M,)`, of the nodes on the paths to `leaves` `(n,)`, root and last nodes included."""
        path = self.walk(leaves)
        mask = torch.zeros(self.num_nodes, dtype=torch.bool, device=path.device)
        mask[path[path >= 0]] = True
        return mask

    def closed_nodes(self, excluded: Tensor, allowed: Tensor | None = None) -> Tensor:
        """Return the nodes from which only excluded leaves can be reached, for each row.

        The cost depends on the number of excluded leaves, not on the size of the tree (with `allowed`, on both).

        Args:
            excluded: `(B, X)` leaves; -1 is skipped, a repetition counts once.
            allowed: bool `(M,)` from `path_mask`; the leaves outside it count as excluded, too, but a node that leads
                to no allowed leaf is not returned.

        Returns:
            `(B, n)` nodes, ascending, padded with `num_nodes` at the end, for `in_rows`.
        """
        total = self.leaf_count
        leaves = torch.nn.functional.pad(excluded, (0, 1), value=-1).sort(1).values  # at least one column
        skipped = (leaves < 0) | (leaves == leaves.roll(1, 1))
        if allowed is not None:
            ends = allowed[self.leaf_nodes()]
            paths = self.path_nodes[ends]
            total = torch.bincount(paths[paths >= 0], minlength=self.num_nodes)
            skipped |= ~ends[leaves.clamp(min=0)]
        nodes = self.walk(leaves.clamp(min=0)).masked_fill(skipped[..., None], -1).flatten(1)
        nodes = torch.where(nodes >= 0, nodes, self.num_nodes).sort(1).values
        below = torch.searchsorted(nodes, nodes, right=True) - torch.searchsorted(nodes, nodes)
        closed = (nodes < self.num_nodes) & (below == total[nodes.clamp(max=self.num_nodes - 1)])
        return torch.where(closed, nodes, self.num_nodes).sort(1).values

    def is_determined(self, nodes: Tensor) -> Tensor:
        """Return whether at most one leaf can be reached from each node: `(...,) -> bool (...,)`; True for -1.

        The remaining tokens from such a node are certain, so a policy gives them probability 1 without the model.
        """
        _check_integers(nodes=nodes)
        return (nodes < 0) | (self.leaf_count[nodes.clamp(min=0)] == 1)

    def unique_leaf(self, nodes: Tensor) -> Tensor:
        """Return the only leaf below each determined node, -1 for all other nodes and for -1: `(...,) -> (...,)`."""
        return torch.where(self.is_determined(nodes) & (nodes >= 0), self.first_leaf[nodes.clamp(min=0)].long(), -1)

    def leaf_at(self, nodes: Tensor) -> Tensor:
        """Return the leaf that ends at each node, -1 for inner nodes: `(...,) -> (...,)`."""
        _check_integers(nodes=nodes)
        safe = nodes.clamp(min=0)
        return torch.where((nodes >= 0) & (self.num_children[safe] == 0), self.first_leaf[safe].long(), -1)

    def log_flows(self, leaf_log_rewards: Tensor) -> Tensor:
        """Return the log of the total reward below every node, log F(s) = logsumexp of log R over the leaves below s.

        Args:
            leaf_log_rewards: `(B, N)`; -inf is a reward of zero.

        Returns:
            `(B, M)`; column 0 is log Z. Rewards are added level by level, bottom-up, so that a subtree with tiny
            rewards keeps its relative precision.
        """
        if not isinstance(leaf_log_rewards, Tensor) or not leaf_log_rewards.is_floating_point():
            raise TypeError(f"leaf_log_rewards is {_kind(leaf_log_rewards)}; it must be a tensor of floats.")
        if leaf_log_rewards.ndim != 2 or leaf_log_rewards.shape[1] != self.num_leaves:
            shape = tuple(leaf_log_rewards.shape)
            raise ValueError(f"leaf_log_rewards has shape {shape}; the tree has {self.num_leaves} leaves: (B, N).")
        batch = len(leaf_log_rewards)
        peak, lowest = leaf_log_rewards.amax(1, keepdim=True), _least_finite(leaf_log_rewards)
        flows = leaf_log_rewards.new_full((batch, self.num_nodes), -torch.inf)
        flows[:, self.leaf_nodes()] = leaf_log_rewards
        if bool((lowest < peak - _EXP_RANGE).any()):
            return self._add_log_flows(flows)
        # exp of the difference to the row's maximum is a normal number for every leaf, so that plain sums are exact to
        # rounding, also those of tiny subtrees.
        peak = peak.masked_fill(peak == -torch.inf, 0.0)
        sums = flows.sub_(peak).exp_()
        for depth in range(self.max_depth, 0, -1):
            first, start, end = self.level_start[depth - 1 : depth + 2]
            sums[:, first:start].index_add_(1, self.parent[start:end].long() - first, sums[:, start:end])
        return sums.log_().add_(peak)

    def _add_log_flows(self, flows: Tensor) -> Tensor:
        """Fill in the inner nodes of `flows (B, M)`, whose leaves are set, for rewards of any range."""
        for depth in range(self.max_depth, 0, -1):
            first, start, end = self.level_start[depth - 1 : depth + 2]
            below = flows[:, start:end]
            parent = (self.parent[start:end].long() - first).expand(len(flows), -1)
            peak = below.new_full((len(flows), start - first), -torch.inf).scatter_reduce(1, parent, below, "amax")
            peak = peak.masked_fill(peak == -torch.inf, 0.0)
            total = torch.zeros_like(peak).scatter_add_(1, parent, (below - peak.gather(1, parent)).exp())
            inner = self.num_children[first:start] > 0
            flows[:, first:start] = torch.where(inner, total.log() + peak, flows[:, first:start])
        return flows

    def __repr__(self) -> str:
        return f"PrefixTree(num_leaves={self.num_leaves}, num_nodes={self.num_nodes}, max_depth={self.max_depth})"


def _least_finite(values: Tensor) -> Tensor:
    """Return the least value of each row that is not -inf, `(B, 1)`; inf for a row without one."""
    return values.masked_fill(values == -torch.inf, torch.inf).amin(1, keepdim=True)


def in_rows(rows: Tensor, values: Tensor) -> Tensor:
    """Return whether each value occurs in its row: ascending `(B, n)` and `(B, ...)` to bool `(B, ...)`."""
    flat = values.flatten(1)
    index = torch.searchsorted(rows, flat).clamp_(max=rows.shape[1] - 1)
    return (rows.gather(1, index) == flat).view(values.shape)


def _check_integers(**given: Tensor) -> None:
    """Raise a TypeError unless all are tensors of node, leaf or token numbers (int32 or int64)."""
    for name, value in given.items():
        if not isinstance(value, Tensor) or value.dtype not in (torch.int32, torch.int64):
            raise TypeError(f"{name} is {_kind(value)}; it must be a tensor of integers (torch.long).")


def _kind(value: object) -> str:
    return f"a tensor of {value.dtype}" if isinstance(value, Tensor) else f"of type {type(value).__name__}"


def _check_paths(token_paths: Tensor) -> Tensor:
    if not isinstance(token_paths, Tensor):
        raise TypeError(f"token_paths is of type {type(token_paths).__name__}; it must be an integer tensor (N, L).")
    if token_paths.ndim != 2 or token_paths.numel() == 0 or token_paths.dtype not in _INTEGERS:
        raise ValueError(
            f"token_paths must be a non-empty integer tensor of shape (items, tokens per id), but its "
            f"shape is {tuple(token_paths.shape)} and its dtype {token_paths.dtype}."
        )
    paths = token_paths.detach().cpu().long()
    if int(paths.min()) < -1:
        raise ValueError(f"token_paths holds {int(paths.min())}; token ids must be >= 0, and the padding -1.")
    if int(paths.max()) >= _MOST_TOKENS:
        raise ValueError(f"token_paths holds {int(paths.max())}; token ids must be below {_MOST_TOKENS}.")
    present = paths >= 0
    empty = torch.nonzero(~present[:, 0]).squeeze(1)
    if len(empty):
        raise ValueError(
            f"Row {int(empty[0])} of token_paths has no first token; every semantic id needs at least one token."
        )
    holes = torch.nonzero((present[:, 1:] & ~present[:, :-1]).any(1)).squeeze(1)
    if len(holes):
        raise ValueError(f"Row {int(holes[0])} of token_paths has a token after padding; pad with -1 on the right.")
    return paths[:, : int(present.sum(1).max())]
