"""A catalog's prefix tree: needs numpy and the exported arrays, but no engine. Logits processors need torch, too.

A row of a batch is at a node of the tree: the root before an item, an inner node within its semantic id. Only the
tokens that lead to a child of the node are allowed.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from numbers import Integral
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np


if TYPE_CHECKING:
    import torch

Item = int | str
ROOT, NO_NODE = 0, -1


class Catalog:
    """The prefix tree and the items, as exported by gflowtrl (`catalog.json` and the `.npy` files next to it).

    Args:
        folder: the folder with the arrays.

    Attributes:
        max_depth: number of tokens of the longest semantic id.
        equal_lengths: whether all semantic ids have this length.
        end_token: the token that ends an answer after a shorter semantic id; None if the tokenizer has none.
        temperature: divides the logits, as in the training.
    """

    def __init__(self, folder: str | Path):
        header = json.loads(Path(folder, "catalog.json").read_text(encoding="utf-8"))
        if (header["format"], header["version"]) != ("gflowtrl catalog", 1):
            raise ValueError(f"{folder}/catalog.json has another format. Export the model again.")
        self.items: list[Item] = header["items"]
        self.prompt, self.max_depth, self.end_token = header["prompt"], header["max_depth"], header["end_token"]
        self.temperature: float = header["temperature"]
        self.index = {item: row for row, item in enumerate(self.items)}
        names = ("child_offsets", "child_tokens", "child_nodes", "node_leaf", "leaf_item_offsets", "leaf_items",
                 "prompt_tokens", "item_tokens")  # fmt: skip
        (self.offsets, self.tokens, self.nodes, self.node_leaf, self.leaf_item_offsets, self.leaf_items,
         self.prompt_tokens, item_tokens) = (np.load(Path(folder, f"{name}.npy")) for name in names)  # fmt: skip
        recommended = header["num_items"]  # the other items are retired: they occur in histories only
        self.equal_lengths = bool(((item_tokens[:recommended] >= 0).sum(1) == self.max_depth).all())
        self.retired = {tuple(row[row >= 0].tolist()) for row in item_tokens[recommended:]}
        self.id_tokens = set(np.unique(item_tokens[item_tokens >= 0]).tolist())

    def prompt_of(self, history: Sequence[Item]) -> list[int]:
        """Return the prompt of a history, oldest item first. Unknown items are skipped.

        Raises:
            ValueError: it is not a list of whole numbers and strings, or no item is known.
        """
        if not isinstance(history, Sequence) or isinstance(history, str):
            raise ValueError(f"{history!r} is not a history; give a list of items, such as [17, 4, 2205].")
        if wrong := [item for item in history if isinstance(item, bool) or not isinstance(item, Integral | str)]:
            raise ValueError(f"{wrong[0]!r} is not an item; items are whole numbers or strings.")
        known = [self.index[item] for item in history if item in self.index][-self.prompt["max_history_items"] :]
        if not known:
            raise ValueError(f"The history {list(history)!r} has no item of the catalog. Leave it out.")
        tokens = self.prompt_tokens[known]
        return [*self.prompt["head"], *tokens[tokens >= 0].tolist(), *self.prompt["tail"]]

    def step(self, node: int, token: int) -> int:
        """Return the child of a node by a token, -1 for none."""
        first, end = self.offsets[node], self.offsets[node + 1]
        index = first + int(np.searchsorted(self.tokens[first:end], token))
        return int(self.nodes[index]) if index < end and self.tokens[index] == token else NO_NODE

    def node_after(self, tokens: Iterable[int]) -> int:
        """Return the node after a prompt, which may already hold the first tokens of an answer.

        Semantic ids are a prefix code: no id begins another one. So a run of their tokens can be read from its start,
        id by id, and what remains at its end is the path from the root. Other tokens (words, bos) end a run.
        """
        node, path = ROOT, []
        for token in tokens:
            path = [*path, token] if token in self.id_tokens else []
            node = ROOT if not path else self.step(node, token) if node >= 0 else NO_NODE
            if (node >= 0 and self.node_leaf[node] >= 0) or tuple(path) in self.retired:
                node, path = ROOT, []
        return node

    def items_at(self, tokens: Iterable[int]) -> list[Item]:
        """Return all items with the semantic id at the start of an answer; none if it does not start with one."""
        node = ROOT
        for token in tokens:
            node = self.step(node, token)
            if node < 0:
                return []
            if (leaf := int(self.node_leaf[node])) >= 0:
                return [self.items[row] for row in self.leaf_items[slice(*self.leaf_item_offsets[leaf : leaf + 2])]]
        return []

    def restrict(self, logits: torch.Tensor, rows: Sequence[int], nodes: Sequence[int]) -> None:
        """Set the logits `(R, V)` of all tokens but those that lead to a child of the row's node to -inf, in place.

        Args:
            logits: they are divided by the policy's temperature.
            rows: the rows to change.
            nodes: the node of each of them. A leaf, or -1, allows `end_token` only.
        """
        import torch

        at = np.array(nodes, dtype=np.int64)
        inner = (at >= 0) & (self.node_leaf[at] < 0)
        counts = np.where(inner, self.offsets[at + 1] - self.offsets[at], 0)
        starts = np.repeat(np.where(inner, self.offsets[at], 0) - (counts.cumsum() - counts), counts)
        tokens = self.tokens[starts + np.arange(len(starts))]
        row = np.repeat(np.array(rows, dtype=np.int64), counts)
        changed = np.array(rows, dtype=np.int64)
        if self.end_token is None:
            changed = changed[inner]
        else:
            ended = changed[~inner]
            row, tokens = np.append(row, ended), np.append(tokens, np.full(len(ended), self.end_token))
        row_index, token_index, changed_index = (
            torch.from_numpy(array.astype(np.int64)).to(logits.device) for array in (row, tokens, changed)
        )
        kept = logits[row_index, token_index] / self.temperature
        logits[changed_index] = -torch.inf
        logits[row_index, token_index] = kept


def read_histories(lines: Iterable[str], catalog: Catalog) -> list[list[Item]]:
    """Return the histories of lines with a JSON list each; blank lines are skipped.

    A line that is wrong ends the program with its number, before an engine starts. Unknown items are reported.
    """
    histories = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            history = json.loads(line)
            catalog.prompt_of(history)
        except (ValueError, RecursionError) as error:
            print(f"error: line {number}: {error}", file=sys.stderr)
            sys.exit(2)
        if unknown := [item for item in history if item not in catalog.index]:
            print(f"line {number}: left out, because the catalog does not have them: {unknown}", file=sys.stderr)
        histories.append(history)
    return histories


@dataclass
class _Row:
    node: int
    output: Sequence[int]  # grows while the engine generates
    read: int = 0


class RowNodes:
    """The node of each row of an engine's batch, which changes as requests come, go and move.

    Args:
        catalog: the prefix tree.
    """

    def __init__(self, catalog: Catalog):
        self.catalog = catalog
        self._rows: dict[int, _Row] = {}

    def remove(self, row: int) -> None:
        """A request has ended."""
        self._rows.pop(row, None)

    def add(self, row: int, prompt: Sequence[int] | None, output: Sequence[int]) -> None:
        """A request has come to a row.

        Args:
            row: the row; an earlier request there is gone.
            prompt: its tokens.
            output: the list to which the engine appends the tokens of the answer; it may already hold some.
        """
        self._rows[row] = _Row(self.catalog.node_after(prompt or ()), output)

    def move(self, source: int, target: int, swap: bool) -> None:
        """A request has moved from one row to another; with `swap`, the one there has moved the other way."""
        moved, other = self._rows.pop(source, None), self._rows.pop(target, None)
        if moved is not None:
            self._rows[target] = moved
        if swap and other is not None:
            self._rows[source] = other

    def apply(self, logits: torch.Tensor) -> torch.Tensor:
        """Restrict the logits `(R, V)` of the next tokens to the tree, in place, and return them.

        The tokens of the answers are read here, because an engine that schedules ahead writes them late (-1 before).
        """
        rows = [row for row in sorted(self._rows) if row < len(logits)]
        for row in rows:
            self._read(self._rows[row])
        if rows:
            self.catalog.restrict(logits, rows, [self._rows[row].node for row in rows])
        return logits

    def _read(self, row: _Row) -> None:
        for token in row.output[row.read :]:
            if token < 0:
                return
            is_leaf = row.node >= 0 and self.catalog.node_leaf[row.node] >= 0
            row.node = NO_NODE if is_leaf or row.node < 0 else self.catalog.step(row.node, token)
            row.read += 1
