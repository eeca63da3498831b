"""Recommend items with ONNX Runtime. This file needs numpy and onnxruntime, and the files next to it.

    echo '[17, 4, 2205]' | python onnx_recommender.py --k 10      # one history per line, oldest item first

    from onnx_recommender import OnnxRecommender
    recommender = OnnxRecommender("folder")
    for item, log_prob in recommender.recommend([[17, 4, 2205]], k=10)[0]: ...

The most probable items are found by beam search on the catalog's prefix tree. The model reads a prompt once. Beams are
branches after the cached prompt: all their tokens stay in the cache, and each token sees those of its own branch.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from numbers import Integral
from pathlib import Path

import numpy as np
import onnxruntime


Item = int | str


class Catalog:
    """The prefix tree of the items, as flat arrays (`catalog.json` and the `.npy` files next to it).

    Args:
        folder: the folder with the arrays.

    Attributes:
        only_leaf: the only leaf below each node, -1 for a node that leads to several leaves.
        columns: the column of each child's token in the logits, which are those of the catalog's tokens, sorted.
    """

    def __init__(self, folder: Path):
        header = json.loads(Path(folder, "catalog.json").read_text(encoding="utf-8"))
        if (header["format"], header["version"]) != ("gflowtrl catalog", 1):
            raise ValueError(f"{folder}/catalog.json has another format. Export the model again.")
        self.items: list[Item] = header["items"]
        self.prompt, self.max_depth = header["prompt"], header["max_depth"]
        self.index = {item: row for row, item in enumerate(self.items)}
        self.offsets, self.tokens, self.nodes, leaf, self.leaf_item_offsets, self.leaf_items, self.prompt_tokens = (
            np.load(Path(folder, f"{name}.npy"))
            for name in ("child_offsets", "child_tokens", "child_nodes", "node_leaf", "leaf_item_offsets",
                         "leaf_items", "prompt_tokens")
        )  # fmt: skip
        self.token_of = np.zeros(len(leaf), dtype=np.int64)
        self.token_of[self.nodes] = self.tokens
        self.columns = np.searchsorted(np.unique(self.tokens), self.tokens)
        single = np.flatnonzero(np.diff(self.offsets) == 1)
        self.only_leaf = leaf.copy()
        for _ in range(self.max_depth):
            self.only_leaf[single] = self.only_leaf[self.nodes[self.offsets[single]]]

    def items_of(self, leaf: int) -> list[Item]:
        """Return all items at a leaf."""
        return [self.items[row] for row in self.leaf_items[slice(*self.leaf_item_offsets[leaf : leaf + 2])]]

    def prompts(self, histories: Sequence[Sequence[Item]]) -> tuple[np.ndarray, np.ndarray]:
        """Return left-padded prompts `(B, P)` and which of their tokens are not padding, bool `(B, P)`."""
        rows = []
        for history in histories:
            if not isinstance(history, Sequence) or isinstance(history, str):
                raise ValueError(f"{history!r} is not a history; give a list of items, such as [17, 4, 2205].")
            if wrong := [item for item in history if isinstance(item, bool) or not isinstance(item, Integral | str)]:
                raise ValueError(f"{wrong[0]!r} is not an item; items are whole numbers or strings.")
            known = [self.index[item] for item in history if item in self.index][-self.prompt["max_history_items"] :]
            if not known:
                raise ValueError(f"The history {list(history)!r} has no item of the catalog. Leave it out.")
            tokens = self.prompt_tokens[known]
            rows.append([*self.prompt["head"], *tokens[tokens >= 0], *self.prompt["tail"]])
        length = max(map(len, rows))
        tokens = [[self.prompt["padding"]] * (length - len(row)) + row for row in rows]
        return np.array(tokens, dtype=np.int64), np.arange(length) >= length - np.array([[len(r)] for r in rows])

    def children(self, nodes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the children of nodes `(..)` and their columns in the logits, both `(.., C)`; -1 has no children."""
        first, end = self.offsets[nodes], self.offsets[nodes + 1]
        count = np.where(nodes >= 0, end - first, 0)[..., None]
        steps = np.arange(max(count.max(), 1))
        index = np.where(steps < count, first[..., None] + steps, 0)
        return np.where(steps < count, self.nodes[index], -1), self.columns[index]


class Branches:
    """Prompts in the model's cache, and the tokens of branches after them.

    Args:
        session: the model.
        tokens, present: the prompts, of `Catalog.prompts`.

    Attributes:
        logits: `(B, n, T)` after the last tokens.
    """

    def __init__(self, session: onnxruntime.InferenceSession, tokens: np.ndarray, present: np.ndarray):
        self.session, self.present = session, present
        self.lengths = present.sum(1, keepdims=True)
        self.cache = {
            entry.name: np.zeros((len(tokens), entry.shape[1], 0, entry.shape[3]), dtype=np.float32)
            for entry in session.get_inputs()
            if entry.name.startswith("past_")
        }
        self.positions = np.zeros((len(tokens), 0), dtype=np.int64)
        self.seen = np.zeros((len(tokens), 1, 0), dtype=bool)  # of the tokens after the prompt, by each branch
        length = tokens.shape[1]
        # Padding sees itself: a token that sees nothing would give NaN.
        visible = present[:, None] & np.tri(length, dtype=bool) | np.eye(length, dtype=bool)
        self._run(tokens, np.maximum(present.cumsum(1) - 1, 0), visible, [length - 1])

    def extend(self, tokens: np.ndarray, parents: np.ndarray, depth: int) -> None:
        """Append tokens `(B, n)`, each one to the branch `parents` `(B, n)` of the last call."""
        count = tokens.shape[1]
        itself = np.broadcast_to(np.eye(count, dtype=bool), (len(tokens), count, count))
        self.seen = np.concatenate([np.take_along_axis(self.seen, parents[..., None], 1), itself], 2)
        prompt = np.broadcast_to(self.present[:, None], (len(tokens), count, self.present.shape[1]))
        visible = np.concatenate([prompt, self.seen], 2)
        self._run(tokens, np.broadcast_to(self.lengths + depth - 1, tokens.shape), visible, range(count))

    def _run(self, tokens: np.ndarray, positions: np.ndarray, visible: np.ndarray, logits_at: Sequence[int]) -> None:
        self.positions = np.concatenate([self.positions, positions], 1)
        inputs = {
            "input_ids": tokens,
            "position_ids": positions,
            "key_positions": self.positions,
            "visible": visible,
            "logits_at": np.array(logits_at, dtype=np.int64),
        }
        self.logits, *cache = self.session.run(None, inputs | self.cache)
        self.cache = dict(zip(self.cache, cache, strict=True))


class OnnxRecommender:
    """A recommender that was exported to ONNX.

    Args:
        folder: the folder of the export.
        threads: threads of ONNX Runtime; by default one per core.
        providers: ONNX Runtime's execution providers, best first.
    """

    def __init__(
        self,
        folder: str | Path = Path(__file__).parent,
        threads: int = 0,
        providers: Sequence[str] = ("CPUExecutionProvider",),
    ):
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        self.session = onnxruntime.InferenceSession(Path(folder, "model.onnx"), options, list(providers))
        self.catalog = Catalog(Path(folder, "catalog"))

    def recommend(
        self, histories: Sequence[Sequence[Item]], k: int = 10, num_beams: int | None = None
    ) -> list[list[tuple[Item, float]]]:
        """Return the `k` most probable items that a beam search finds, with the log-probability of their semantic id.

        Args:
            histories: items of each user, oldest first. Unknown items are skipped.
            k: length of the lists.
            num_beams: beam width, by default `max(20, k)`. More beams miss fewer of the most probable items.

        Raises:
            ValueError: a history is not a list of whole numbers and strings, or has no known item; k is below 1, or
                num_beams below k.
        """
        if k < 1:
            raise ValueError(f"k is {k}; it must be at least 1.")
        if num_beams is not None and num_beams < k:
            raise ValueError(f"num_beams is {num_beams}, less than k; it must be at least {k}.")
        if len(histories) == 0:
            return []
        lists = []
        for leaves, totals in zip(*self.beam_search(histories, num_beams or max(20, k)), strict=True):
            found = [(int(leaf), float(total)) for leaf, total in zip(leaves, totals, strict=True) if leaf >= 0]
            lists.append([(item, total) for leaf, total in found for item in self.catalog.items_of(leaf)][:k])
        return lists

    def beam_search(self, histories: Sequence[Sequence[Item]], num_beams: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the most probable leaves and their log-probabilities, both `(B, n)`, best first; -1 where none is."""
        catalog, branches = self.catalog, Branches(self.session, *self.catalog.prompts(histories))
        nodes, parents = np.zeros((2, len(histories), 1), dtype=np.int64)
        totals = np.zeros(nodes.shape, dtype=np.float32)
        for depth in range(catalog.max_depth):
            # Beams with only one leaf left are finished: their remaining tokens are certain.
            finished = (nodes < 0) | (catalog.only_leaf[nodes] >= 0)
            count = int((~finished).sum(1).max())
            if not count:
                break
            active = np.argsort(finished, axis=1, kind="stable")[:, :count]
            states = np.take_along_axis(np.where(finished, -1, nodes), active, 1)
            if depth:
                tokens = np.where(states >= 0, catalog.token_of[states], 0)
                branches.extend(tokens, np.take_along_axis(parents, active, 1), depth)
            children, columns = catalog.children(states)
            values = np.take_along_axis(branches.logits, columns, 2)
            log_probs = log_softmax(np.where(children >= 0, values, -np.inf))
            candidates = (np.take_along_axis(totals, active, 1)[..., None] + log_probs).reshape(len(nodes), -1)
            # Finished beams compete with the children of the others.
            ranked = np.concatenate([candidates, np.where(finished, totals, -np.inf)], 1)
            best = np.argsort(-ranked, axis=1, kind="stable")[:, :num_beams]
            totals = np.take_along_axis(ranked, best, 1)
            nodes = np.take_along_axis(np.concatenate([children.reshape(len(nodes), -1), nodes], 1), best, 1)
            nodes = np.where(totals == -np.inf, -1, nodes)
            parents = np.minimum(best // children.shape[2], count - 1)
        return np.where(nodes >= 0, catalog.only_leaf[nodes], -1), totals


def log_softmax(values: np.ndarray) -> np.ndarray:
    """Return the log-softmax over the last axis; a row of -inf stays one."""
    peak = values.max(-1, keepdims=True)
    shifted = values - np.where(peak > -np.inf, peak, 0)
    total = np.exp(shifted).sum(-1, keepdims=True)
    return shifted - np.log(np.where(total > 0, total, 1))


def main() -> None:
    """Answer the histories on standard input, one JSON list per line, by lines of JSON."""
    parser = argparse.ArgumentParser(description="Recommend items for each line of standard input: [17, 4, 2205]")
    parser.add_argument("--folder", default=Path(__file__).parent, help="folder of the export")
    parser.add_argument("--k", type=int, default=10, help="length of the lists")
    parser.add_argument("--num_beams", type=int, help="beam width; by default max(20, k)")
    parser.add_argument("--threads", type=int, default=0, help="threads; 0: one per core")
    options = parser.parse_args()
    recommender = OnnxRecommender(options.folder, options.threads)
    sys.stdin.reconfigure(encoding="utf-8-sig", errors="surrogateescape")  # Windows too, and a byte order mark
    for number, line in enumerate(sys.stdin, start=1):
        if not line.strip():
            continue
        try:
            history = json.loads(line)
            (found,) = recommender.recommend([history], options.k, options.num_beams)
        except (ValueError, RecursionError) as error:
            print(f"error: line {number}: {error}", file=sys.stderr)
            sys.exit(2)
        if unknown := [item for item in history if item not in recommender.catalog.index]:
            print(f"line {number}: left out, because the catalog does not have them: {unknown}", file=sys.stderr)
        print(json.dumps([{"item": item, "probability": float(np.exp(value))} for item, value in found]), flush=True)


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:  # the reader of a pipe has exited (`... | head`)
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
