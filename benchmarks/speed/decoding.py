"""Constrained decoding: this library, and Hugging Face `generate` under the same constraint.

    python benchmarks/speed/decoding.py --out benchmarks/results/speed/decoding.json
    python benchmarks/speed/decoding.py --data_dir DIR    # real prompts and catalogue, and all users ranked

Beam search of 20 and 50 and K = 16 samples of each prompt, for a Llama and a T5 of random weights. `generate` is told
of the catalogue in the two ways that people use: `prefix_allowed_tokens_fn` with a trie of dictionaries, and a
vectorised logits processor on the tree's arrays. The lists of all three must be the same.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from measuring import (
    BACKBONES,
    ROOT,
    arguments,
    interleaved,
    peak,
    random_catalog,
    random_prompts,
    report,
    reset_peak,
)
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList, PreTrainedModel

from gflowtrl.catalog import PrefixTree
from gflowtrl.policy import StatelessNoise, TreePolicy, make_policy
from gflowtrl.trainer.evaluation import rank_rows


def nested_trie(tree: PrefixTree) -> dict[int, dict]:
    """`{token: {token: ...}}`, as in most published recommenders."""
    root: dict[int, dict] = {}
    for path in tree.paths.tolist():
        node = root
        for token in path:
            if token >= 0:
                node = node.setdefault(token, {})
    return root


class TreeProcessor(LogitsProcessor):
    """The constraint as one vectorised mask a step."""

    def __init__(self, tree: PrefixTree, prompt_length: int):
        self.tree, self.prompt_length = tree, prompt_length

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        nodes = torch.zeros(len(input_ids), dtype=torch.long, device=input_ids.device)
        for column in range(self.prompt_length, input_ids.shape[1]):
            nodes = self.tree.step(nodes, input_ids[:, column])
        return scores.masked_fill(~self.tree.allowed_tokens(nodes, scores.shape[1]), -torch.inf)


def generate(model: PreTrainedModel, tree: PrefixTree, prompts: dict[str, Tensor], vectorised: bool, **how) -> Tensor:
    """Hugging Face's own loop: `(rows, L)` tokens."""
    begin = 1 if model.config.is_encoder_decoder else prompts["input_ids"].shape[1]
    if vectorised:
        how["logits_processor"] = LogitsProcessorList([TreeProcessor(tree, begin)])
    else:
        trie = nested_trie(tree)

        def allowed(_, sequence: Tensor) -> list[int]:
            node = trie
            for token in sequence[begin:].tolist():
                node = node.get(token, {})
            return list(node)

        how["prefix_allowed_tokens_fn"] = allowed
    sequences = model.generate(
        **prompts, max_new_tokens=tree.max_depth, min_new_tokens=tree.max_depth, renormalize_logits=True,
        eos_token_id=None, **how,
    )  # fmt: skip
    return sequences[:, begin:]


def leaves_of(tree: PrefixTree, tokens: Tensor) -> Tensor:
    """Tokens `(rows, L)` -> leaves `(rows,)`, -1 for what is no item."""
    nodes = torch.zeros(len(tokens), dtype=torch.long, device=tokens.device)
    for column in range(tokens.shape[1]):
        nodes = tree.step(nodes, tokens[:, column])
    return tree.leaf_at(nodes)


def beam_sides(policy: TreePolicy, prompts: dict[str, Tensor], width: int) -> dict[str, Callable[[], Tensor]]:
    """Each gives ranked leaves `(B, width)`."""
    tree, batch = policy.catalog.tree, len(prompts["input_ids"])
    how = {"num_beams": width, "num_return_sequences": width, "do_sample": False, "length_penalty": 0.0}

    def theirs(vectorised: bool) -> Tensor:
        tokens = generate(policy.model, tree, prompts, vectorised, **how)
        return leaves_of(tree, tokens).view(batch, width)

    return {
        "gflowtrl": lambda: policy.beam_search(prompts, width)[0],
        "prefix_allowed_tokens_fn": lambda: theirs(False),
        "logits processor": lambda: theirs(True),
    }


def sample_sides(policy: TreePolicy, prompts: dict[str, Tensor], count: int) -> dict[str, Callable[[], Tensor]]:
    """Each gives drawn leaves `(B, count)`."""
    tree, batch = policy.catalog.tree, len(prompts["input_ids"])
    noise = StatelessNoise(0).at(0, torch.arange(batch, device=prompts["input_ids"].device))
    how = {"num_return_sequences": count, "do_sample": True, "top_k": 0}

    def theirs(vectorised: bool) -> Tensor:
        return leaves_of(tree, generate(policy.model, tree, prompts, vectorised, **how)).view(batch, count)

    return {
        "gflowtrl": lambda: policy.sample(prompts, count, noise)[0],
        "prefix_allowed_tokens_fn": lambda: theirs(False),
        "logits processor": lambda: theirs(True),
    }


def check(policy: TreePolicy, prompts: dict[str, Tensor], job: str, found: dict[str, Tensor]) -> None:
    """All draw items only, and all beams give the same lists, but for neighbours that float32 cannot tell apart."""
    if not all((leaves >= 0).all() for leaves in found.values()):
        raise AssertionError(f"{job}: something is no item.")
    if not job.startswith("beam"):
        return
    ours = found["gflowtrl"]
    log_probs = policy.score(prompts, ours).trajectory_log_probs
    for name, theirs in found.items():
        if (log_probs - policy.score(prompts, theirs).trajectory_log_probs).abs().max() > 1e-4:
            raise AssertionError(f"{job}: the lists of {name} differ from ours.")
        print(f"{job}: {float((theirs == ours).float().mean()):.2%} of the places are the same in {name}", flush=True)


def main() -> None:
    parser = arguments(__doc__, rounds=3)
    parser.add_argument("--backbones", nargs="+", choices=list(BACKBONES), default=list(BACKBONES))
    parser.add_argument("--users", type=int, default=128, help="prompts of a batch")
    parser.add_argument("--prompt_length", type=int, default=80, help="of random prompts, the longest")
    parser.add_argument("--data_dir", help="prompts and catalogue of the Office recipe instead of random ones")
    given = parser.parse_args()
    if given.data_dir is None:
        catalog, tokenizer = random_catalog(depth=4)
        prompts = random_prompts(given.users, given.prompt_length, len(tokenizer), given.device, ragged=True)
    else:
        from gflowtrl.pipeline import load_recipe
        from gflowtrl.pipeline.materials import prepare

        recipe = load_recipe(ROOT / "recipes" / "gflowgr_office_llama.yaml", ["--data_dir", given.data_dir])
        materials = prepare(recipe)
        catalog, tokenizer = materials.catalog, materials.tokenizer
        chosen = materials.splits.test.shuffle(seed=0).select(range(given.users))
        prompts = {name: value.to(given.device) for name, value in materials.encoder(chosen["history"]).items()}
    rows = []
    for backbone in given.backbones:
        model = BACKBONES[backbone](len(tokenizer)).to(given.device).eval()
        policy = make_policy(model, catalog)
        with torch.no_grad():
            jobs = {f"beam {width}": beam_sides(policy, prompts, width) for width in (20, 50)}
            for name, sides in {**jobs, "sample 16": sample_sides(policy, prompts, 16)}.items():
                found: dict[str, Tensor] = {}
                keeping = {
                    side: lambda side=side, run=run, found=found: found.update({side: run()})
                    for side, run in sides.items()
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
            rank_rows(policy, materials.encoder, materials.splits.test, num_beams=20)
            seconds = time.perf_counter() - start
            print(f"All {len(materials.splits.test)} users ranked by the {backbone} in {seconds:.1f} s.")
            rows.append({
                "backbone": backbone, "job": f"all {len(materials.splits.test)} users, beam 20", "side": "gflowtrl",
                "ratio": 1.0, "seconds": seconds, "peak_memory": peak(given.device) - before, "rounds": 1,
            })  # fmt: skip
    columns = {
        "model": "{backbone}", "job": "{job}", "side": "{side}", "s": "{seconds:.3f}", "x ours": "{ratio:.1f}",
        "peak memory, bytes": "{peak_memory:.2e}",
    }  # fmt: skip
    report(rows, columns, given, users=given.users)


if __name__ == "__main__":
    main()
