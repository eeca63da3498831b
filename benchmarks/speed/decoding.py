"""Constrained decoding: this library, and Hugging Face `generate` with the same constraint.

    python benchmarks/speed/decoding.py --out benchmarks/results/speed/decoding.json
    python benchmarks/speed/decoding.py --data_dir DIR    # real prompts and catalog; also ranks items for all users

Beam search of width 20 and 50 and K = 16 samples per prompt, for a Llama and a T5 with random weights. `generate` gets
the catalog in the two usual ways: as a `prefix_allowed_tokens_fn` with a trie of dictionaries, and as a vectorized
logits processor on the arrays of the tree. The lists of all three must be the same.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial

import torch
from measuring import (
    BACKBONES,
    arguments,
    interleaved,
    office,
    peak,
    random_catalog,
    random_prompts,
    report,
    reset_peak,
)
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList

from gflowtrl.catalog import PrefixTree
from gflowtrl.policy import StatelessNoise, TreePolicy, make_policy
from gflowtrl.trainer.evaluation import rank_rows


def nested_trie(tree: PrefixTree) -> dict[int, dict]:
    """Return `{token: {token: ...}}`, as in most published recommenders."""
    root: dict[int, dict] = {}
    for path in tree.paths.tolist():
        node = root
        for token in path:
            if token >= 0:
                node = node.setdefault(token, {})
    return root


def node_of(tree: PrefixTree, tokens: Tensor) -> Tensor:
    """Return the nodes `(rows,)` that tokens `(rows, n)` lead to, -1 for tokens that are not in the catalog."""
    nodes = torch.zeros(len(tokens), dtype=torch.long, device=tokens.device)
    for column in tokens.unbind(1):
        nodes = tree.step(nodes, column)
    return nodes


class TreeProcessor(LogitsProcessor):
    """The constraint as one vectorized mask per step."""

    def __init__(self, tree: PrefixTree, prompt_length: int):
        self.tree, self.prompt_length = tree, prompt_length

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        nodes = node_of(self.tree, input_ids[:, self.prompt_length :])
        return scores.masked_fill(~self.tree.allowed_tokens(nodes, scores.shape[1]), -torch.inf)


def sides(
    policy: TreePolicy, prompts: dict[str, Tensor], count: int, ours: Callable[[], tuple[Tensor, Tensor]], **how
) -> dict[str, Callable[[], Tensor]]:
    """Return functions that give leaves `(B, count)`: this library's, and `generate(**how)` with both constraints."""
    model, tree = policy.model, policy.catalog.tree
    begin = 1 if model.config.is_encoder_decoder else prompts["input_ids"].shape[1]
    trie = nested_trie(tree)

    def allowed(_, sequence: Tensor) -> list[int]:
        node = trie
        for token in sequence[begin:].tolist():
            node = node.get(token, {})
        return list(node)

    def theirs(**constraint) -> Tensor:
        sequences = model.generate(
            **prompts, **how, **constraint, num_return_sequences=count, max_new_tokens=tree.max_depth,
            min_new_tokens=tree.max_depth, renormalize_logits=True, eos_token_id=None,
        )  # fmt: skip
        return tree.leaf_at(node_of(tree, sequences[:, begin:])).view(-1, count)

    processor = LogitsProcessorList([TreeProcessor(tree, begin)])
    return {
        "gflowtrl": lambda: ours()[0],
        "prefix_allowed_tokens_fn": lambda: theirs(prefix_allowed_tokens_fn=allowed),
        "logits processor": lambda: theirs(logits_processor=processor),
    }


def jobs(policy: TreePolicy, prompts: dict[str, Tensor]) -> dict[str, dict[str, Callable[[], Tensor]]]:
    """Map each job that is measured to its sides."""
    noise = StatelessNoise(0).at(0, torch.arange(len(prompts["input_ids"]), device=prompts["input_ids"].device))
    searches = {
        f"beam {width}": sides(
            policy, prompts, width, partial(policy.beam_search, prompts, width),
            num_beams=width, do_sample=False, length_penalty=0.0,
        )
        for width in (20, 50)
    }  # fmt: skip
    drawing = partial(policy.sample, prompts, 16, noise)
    return {**searches, "sample 16": sides(policy, prompts, 16, drawing, do_sample=True, top_k=0)}


def check(policy: TreePolicy, prompts: dict[str, Tensor], job: str, found: dict[str, Tensor]) -> None:
    """Check that all sides draw items only and give the same lists, except for neighbors that tie in float32."""
    if not all((leaves >= 0).all() for leaves in found.values()):
        raise AssertionError(f"{job}: some token sequences are not items.")
    if not job.startswith("beam"):
        return
    ours = found["gflowtrl"]
    log_probs = policy.score(prompts, ours).trajectory_log_probs
    for name, theirs in found.items():
        if (log_probs - policy.score(prompts, theirs).trajectory_log_probs).abs().max() > 1e-4:
            raise AssertionError(f"{job}: the lists of {name} differ from ours.")
        print(f"{job}: {float((theirs == ours).float().mean()):.2%} of the positions agree with {name}", flush=True)


def main() -> None:
    parser = arguments(__doc__, rounds=3)
    parser.add_argument("--backbones", nargs="+", choices=list(BACKBONES), default=list(BACKBONES))
    parser.add_argument("--users", type=int, default=128, help="prompts per batch")
    parser.add_argument("--prompt_length", type=int, default=80, help="tokens of the longest random prompt")
    parser.add_argument("--data_dir", help="use prompts and catalog of the Office recipe instead of random ones")
    given = parser.parse_args()
    if given.data_dir is None:
        catalog, tokenizer = random_catalog(depth=4)
        prompts = random_prompts(given.users, given.prompt_length, len(tokenizer), given.device, ragged=True)
    else:
        run_data = office(given.data_dir)
        catalog, tokenizer = run_data.catalog, run_data.tokenizer
        chosen = run_data.splits.test.shuffle(seed=0).select(range(given.users))
        prompts = {name: value.to(given.device) for name, value in run_data.encoder(chosen["history"]).items()}
    rows = []
    for backbone in given.backbones:
        model = BACKBONES[backbone](len(tokenizer)).to(given.device).eval()
        policy = make_policy(model, catalog)
        with torch.no_grad():
            for name, ways in jobs(policy, prompts).items():
                found: dict[str, Tensor] = {}
                keeping = {
                    side: lambda side=side, run=run, found=found: found.update({side: run()})
                    for side, run in ways.items()
                }
                times = interleaved(keeping, given.rounds, given.device, f"{backbone} {name}")
                check(policy, prompts, name, found)
                ours = times["gflowtrl"]["seconds"]
                rows += [
                    {"backbone": backbone, "job": name, "side": side, "ratio": entry["seconds"] / ours, **entry}
                    for side, entry in times.items()
                ]
        if given.data_dir is not None:
            before, start = reset_peak(given.device), time.perf_counter()
            rank_rows(policy, run_data.encoder, run_data.splits.test, num_beams=20)
            seconds = time.perf_counter() - start
            print(f"The {backbone} ranks items for all {len(run_data.splits.test)} users in {seconds:.1f} s.")
            rows.append({
                "backbone": backbone, "job": f"all {len(run_data.splits.test)} users, beam 20", "side": "gflowtrl",
                "ratio": 1.0, "seconds": seconds, "peak_memory": peak(given.device) - before, "rounds": 1,
            })  # fmt: skip
    columns = {
        "model": "{backbone}", "job": "{job}", "side": "{side}", "s": "{seconds:.3f}", "x ours": "{ratio:.1f}",
        "peak memory, bytes": "{peak_memory:.2e}",
    }  # fmt: skip
    report(rows, columns, given, users=given.users)


if __name__ == "__main__":
    main()
