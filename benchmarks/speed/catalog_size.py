"""How the cost of the tree grows with the catalog: build time, memory, time per decoding step.

    python benchmarks/speed/catalog_size.py --out benchmarks/results/speed/catalog_size.json

A `PrefixTree` is built from a tensor of uniform distinct paths of four tokens with 256 codes per level. A decoding
step is a step of beam search: the children of all beams, their log-probabilities from given logits, the best of them.
It is measured with the tree alone and with the 1.2 M Llama.
"""

from __future__ import annotations

import time

import torch
from measuring import arguments, interleaved, llama, peak, random_prompts, report, reset_peak

from gflowtrl.catalog import PrefixTree
from gflowtrl.policy import CausalTreePolicy


DEPTH, CODES, FIRST = 4, 256, 3
VOCAB = FIRST + DEPTH * CODES


class OnlyTree:
    """The part of a catalog that a policy needs."""

    def __init__(self, tree: PrefixTree):
        self.tree = tree

    @property
    def device(self) -> torch.device:
        return self.tree.device

    def to(self, device: torch.device) -> OnlyTree:
        self.tree.to(device)
        return self


def distinct_paths(count: int) -> torch.Tensor:
    """Return distinct paths `(count, 4)` in random order."""
    generator = torch.Generator().manual_seed(0)
    numbers = torch.unique(torch.randint(CODES**DEPTH, (count + count // 200 + 1000,), generator=generator))
    numbers = numbers[torch.randperm(len(numbers), generator=generator)[:count]]
    assert len(numbers) == count
    powers = CODES ** torch.arange(DEPTH - 1, -1, -1)
    return numbers[:, None] // powers % CODES + FIRST + CODES * torch.arange(DEPTH)


def memory_of(tree: PrefixTree) -> int:
    """Return the bytes of all tensors of the tree."""
    return sum(value.numel() * value.element_size() for value in vars(tree).values() if torch.is_tensor(value))


def tree_step(tree: PrefixTree, logits: torch.Tensor, beams: int) -> None:
    """Run beam search with given logits: all of its work except the model's."""
    nodes = torch.zeros(len(logits), 1, dtype=torch.long, device=logits.device)
    totals = torch.zeros(len(logits), 1, device=logits.device)
    for depth in range(tree.max_depth):
        tokens, children = tree.children(nodes, depth)
        scores = logits[:, : nodes.shape[1]].gather(-1, tokens.clamp(min=0)).masked_fill(children < 0, -1e9)
        candidates = (totals[..., None] + scores.log_softmax(-1)).masked_fill(children < 0, -torch.inf).flatten(1)
        totals, place = candidates.topk(min(beams, candidates.shape[1]), dim=1)
        nodes = children.flatten(1).gather(1, place)


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--sizes", nargs="+", type=int, default=[10**4, 10**5, 10**6, 10**7])
    parser.add_argument("--users", type=int, default=64)
    parser.add_argument("--num_beams", type=int, default=20)
    given = parser.parse_args()
    model = llama(VOCAB).to(given.device).eval()
    prompts = random_prompts(given.users, 80, VOCAB, given.device)
    logits = torch.randn(given.users, given.num_beams, VOCAB, device=given.device)
    trees, rows = {}, []
    for size in given.sizes:
        paths = distinct_paths(size)
        before, start = reset_peak(torch.device("cpu")), time.perf_counter()
        trees[size] = PrefixTree(paths)
        seconds = time.perf_counter() - start
        built = peak(torch.device("cpu")) - before
        rows.append({"items": size, "build_seconds": seconds, "build_peak": built, "bytes": memory_of(trees[size])})
        print(f"{size} items: {seconds:.1f} s", flush=True)
        trees[size].to(given.device)
    policies = {size: CausalTreePolicy(model, OnlyTree(tree)) for size, tree in trees.items()}
    alone = interleaved(
        {size: lambda tree=tree: tree_step(tree, logits, given.num_beams) for size, tree in trees.items()},
        given.rounds, given.device, "the tree alone",
    )  # fmt: skip
    whole = interleaved(
        {size: lambda p=policy: p.beam_search(prompts, given.num_beams) for size, policy in policies.items()},
        given.rounds, given.device, "beam search",
    )  # fmt: skip
    for row in rows:
        row["tree_step"] = alone[row["items"]]["seconds"] / DEPTH
        row["search_step"] = whole[row["items"]]["seconds"] / DEPTH
        row["to_smallest"] = row["search_step"] / rows[0]["search_step"]
        row["tree_to_smallest"] = row["tree_step"] / rows[0]["tree_step"]
    columns = {
        "items": "{items:,}", "build time, s": "{build_seconds:.1f}", "memory, bytes": "{bytes:.2e}",
        "peak while building": "{build_peak:.2e}", "step without the model, s": "{tree_step:.4f}",
        "relative to the smallest": "{tree_to_smallest:.2f}", "complete step, s": "{search_step:.4f}",
        "relative to the smallest ": "{to_smallest:.2f}",
    }  # fmt: skip
    report(rows, columns, given, users=given.users, num_beams=given.num_beams)


if __name__ == "__main__":
    main()
