"""Is the cost of a training step proportional to its tokens, P + K (L - 1) per prompt?

    python benchmarks/speed/shape.py --out benchmarks/results/speed/shape.json

Forward and backward of a scored group for prompt lengths P and numbers of trajectories K, on a catalog so wide that
hardly any two trajectories share a state after the first token. A line over the number of tokens is fitted to the
medians.
"""

from __future__ import annotations

import itertools

import torch
from measuring import arguments, interleaved, llama, random_catalog, random_prompts, report

from gflowtrl.policy import CausalTreePolicy


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--lengths", nargs="+", type=int, default=[20, 80, 320])
    parser.add_argument("--num_generations", nargs="+", type=int, default=[1, 4, 16, 64])
    given = parser.parse_args()
    catalog, tokenizer = random_catalog(num_items=200_000)
    model = llama(len(tokenizer)).to(given.device)
    policy = CausalTreePolicy(model, catalog)
    read: list[int] = []
    model.register_forward_pre_hook(lambda _, __, inputs: read.append(inputs["input_ids"].numel()), with_kwargs=True)

    def step(length: int, count: int) -> None:
        leaves = torch.randint(catalog.tree.num_leaves, (given.prompts, count), generator=generator)
        prompts = random_prompts(given.prompts, length, len(tokenizer), given.device)
        policy.score(prompts, leaves.to(given.device)).trajectory_log_probs.mean().backward()
        model.zero_grad()

    generator = torch.Generator().manual_seed(0)
    rows = []
    shapes = list(itertools.product(given.lengths, given.num_generations))
    times = interleaved(
        {shape: lambda shape=shape: step(*shape) for shape in shapes}, given.rounds, given.device, "shapes"
    )
    for index, (length, count) in enumerate(shapes):
        naive = given.prompts * count * (length + catalog.tree.max_depth - 1)
        entry = times[length, count]
        rows.append({"P": length, "K": count, "tokens": read[index], "tokens_repeated": naive, **entry})
    tokens = torch.tensor([float(row["tokens"]) for row in rows])
    seconds = torch.tensor([row["seconds"] for row in rows])
    design = torch.stack([torch.ones_like(tokens), tokens], 1)
    # Relative errors are fitted, so that large shapes do not dominate.
    fit = torch.linalg.lstsq(design / seconds[:, None], torch.ones(len(rows), 1)).solution.squeeze(1)
    for row, expected in zip(rows, (design @ fit).tolist(), strict=True):
        row["seconds_fit"] = expected
        row["to_fit"] = row["seconds"] / expected
    print(f"Fit: {1e3 * fit[0]:.1f} ms + {1e6 * fit[1]:.2f} us per token.")
    columns = {
        "P": "{P}", "K": "{K}", "tokens per step": "{tokens}", "with repeated prompts": "{tokens_repeated}",
        "s": "{seconds:.4f}", "s, fitted": "{seconds_fit:.4f}", "ratio": "{to_fit:.2f}",
        "peak memory, bytes": "{peak_memory:.2e}",
    }  # fmt: skip
    report(rows, columns, given, prompts=given.prompts, fit={"seconds": float(fit[0]), "per_token": float(fit[1])})


if __name__ == "__main__":
    main()
