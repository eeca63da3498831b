"""Training steps of a model with a large vocabulary: logits of the catalog's tokens only, and of all tokens.

    python benchmarks/speed/vocabulary.py --out benchmarks/results/speed/vocabulary.json

The model is a Qwen3 with few layers and 150,000 tokens, of which the catalog uses 768. Steps score K items per prompt
off policy (forward, backward), with and without the optimizer: AdamW has to update all rows of the embeddings,
whatever the head computes. The gradients of both sides are compared.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from measuring import arguments, interleaved, random_catalog, random_prompts, report
from transformers import Qwen3Config, Qwen3ForCausalLM

from gflowtrl.policy import CausalTreePolicy


def qwen(vocab_size: int, width: int, layers: int) -> Qwen3ForCausalLM:
    torch.manual_seed(0)
    return Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=vocab_size,
            hidden_size=width,
            intermediate_size=3 * width,
            num_hidden_layers=layers,
            num_attention_heads=8,
            num_key_value_heads=4,
            head_dim=width // 8,
            max_position_embeddings=1024,
            tie_word_embeddings=True,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
        )  # fmt: skip
    )


def sides(model, catalog, prompts, leaves, optimize: bool) -> dict[str, Callable[[], None]]:
    chosen, whole = CausalTreePolicy(model, catalog), CausalTreePolicy(model, catalog)
    whole._output = None
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, fused=True)  # the Trainer's default

    def step(policy: CausalTreePolicy) -> None:
        policy.score(prompts, leaves).trajectory_log_probs.mean().neg().backward()
        if optimize:
            optimizer.step()
        model.zero_grad()

    return {"the catalog's tokens": lambda: step(chosen), "all tokens": lambda: step(whole)}


def largest_difference(model, catalog, prompts, leaves) -> float:
    """Return the largest difference between the gradients of both sides, relative to the largest gradient."""
    found = []
    for whole in (False, True):
        policy = CausalTreePolicy(model, catalog)
        if whole:
            policy._output = None
        policy.score(prompts, leaves).trajectory_log_probs.sum().backward()
        found.append([p.grad.clone() for p in model.parameters()])
        model.zero_grad()
    scale = max(float(gradient.abs().max()) for gradient in found[1])
    return max(float((a - b).abs().max()) for a, b in zip(*found, strict=True)) / scale


def main() -> None:
    parser = arguments(__doc__, rounds=5)
    parser.add_argument("--vocab_size", type=int, default=150_000)
    parser.add_argument("--widths", nargs="+", type=int, default=[64, 128, 256])
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--prompt_length", type=int, default=80)
    parser.add_argument("--num_generations", type=int, default=16)
    given = parser.parse_args()
    catalog, tokenizer = random_catalog()
    prompts = random_prompts(given.prompts, given.prompt_length, len(tokenizer), given.device)
    leaves = torch.randint(
        catalog.tree.num_leaves, (given.prompts, given.num_generations), generator=torch.Generator().manual_seed(0)
    ).to(given.device)
    rows = []
    for width in given.widths:
        model = qwen(given.vocab_size, width, given.layers).to(given.device)
        difference = largest_difference(model, catalog, prompts, leaves)
        for optimize in (False, True):
            times = interleaved(
                sides(model, catalog, prompts, leaves, optimize), given.rounds, given.device, f"width {width}"
            )
            ours, theirs = times.values()
            rows.append({
                "width": width, "optimizer": optimize, "gradient_difference": difference,
                "seconds": ours["seconds"], "seconds_all": theirs["seconds"],
                "peak_memory": ours["peak_memory"], "peak_memory_all": theirs["peak_memory"],
                "ratio": theirs["seconds"] / ours["seconds"],
            })  # fmt: skip
    columns = {
        "width": "{width}", "with optimizer": "{optimizer}", "the catalog's tokens, s": "{seconds:.3f}",
        "all tokens, s": "{seconds_all:.3f}", "ratio": "{ratio:.1f}", "peak memory, bytes": "{peak_memory:.2e}",
        "all tokens": "{peak_memory_all:.2e}", "gradient difference": "{gradient_difference:.0e}",
    }  # fmt: skip
    report(rows, columns, given, vocab_size=given.vocab_size, layers=given.layers)


if __name__ == "__main__":
    main()
