"""A logits processor for vLLM that follows the catalog's prefix tree, and lists by vLLM's beam search and sampling.

    PYTHONPATH=FOLDER python -m vllm.entrypoints.openai.api_server --model FOLDER --dtype float32 --host 127.0.0.1 \
        --logits-processors gflowtrl_vllm:TreeLogitsProcessor --logprobs-mode processed_logprobs --max-logprobs 64

`example.py` shows the offline engine. The processor reads FOLDER/catalog of the served folder.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from gflowtrl_tree import Catalog, Item, RowNodes
from vllm import LLM, SamplingParams
from vllm.config import VllmConfig
from vllm.platforms import current_platform
from vllm.sampling_params import BeamSearchParams
from vllm.v1.sample.logits_processor import BatchUpdate, LogitsProcessor, MoveDirectionality


class TreeLogitsProcessor(LogitsProcessor):
    """Allow only the tokens of semantic ids, for all requests of an engine.

    It follows the answer of a request, and the end of its prompt too, since vLLM's beam search sends each beam as a
    prompt of one more token.
    """

    def __init__(self, vllm_config: VllmConfig, device: torch.device, is_pin_memory: bool):
        self.nodes = RowNodes(Catalog(Path(vllm_config.model_config.model, "catalog")))

    def is_argmax_invariant(self) -> bool:
        """The most probable token of the model may not be allowed."""
        return False

    def update_state(self, batch_update: BatchUpdate | None) -> None:
        """Follow the requests, in vLLM's order: removed, added, moved."""
        if batch_update is None:
            return
        for row in batch_update.removed:
            self.nodes.remove(row)
        for row, _, prompt, output in batch_update.added:
            self.nodes.add(row, prompt, output)
        for source, target, direction in batch_update.moved:
            self.nodes.move(source, target, direction == MoveDirectionality.SWAP)

    def apply(self, logits: torch.Tensor) -> torch.Tensor:
        """Restrict the logits."""
        return self.nodes.apply(logits)


def load(folder: str | Path, **options: Any) -> tuple[LLM, Catalog]:
    """Load the engine with the settings that exact log-probabilities need.

    Args:
        folder: the folder of the export.
        **options: of `LLM`. The default dtype is float32; 16 bits are faster, and their lists differ a little. On a
            CPU, `gpu_memory_utilization` is the share of the machine's memory to take, .3 by default.

    Returns:
        The engine and the catalog.
    """
    settings = {
        "dtype": "float32",
        "logits_processors": [TreeLogitsProcessor],
        "logprobs_mode": "processed_logprobs",  # by default those before the processor
        "max_logprobs": 64,  # beam search asks for twice as many as it has beams
        "enable_prefix_caching": True,  # beams of one prompt share its cache
    }
    if current_platform.is_cpu():
        settings["gpu_memory_utilization"] = 0.3  # vLLM's .92 does not start if other programs have some memory
    return LLM(model=str(folder), **(settings | options)), Catalog(Path(folder, "catalog"))


def recommend(
    llm: LLM, catalog: Catalog, histories: Sequence[Sequence[Item]], k: int = 10, num_beams: int | None = None
) -> list[list[tuple[Item, float]]]:
    """Return the `k` most probable items that a beam search finds, with the log-probability of their semantic id.

    Args:
        llm, catalog: of `load`.
        histories: items of each user, oldest first. Unknown items are skipped.
        k: length of the lists.
        num_beams: beam width, by default `max(20, k)`; at most half of the engine's `max_logprobs`, and of the model's
            tokens. More beams miss fewer of the most probable items.

    Raises:
        ValueError: a history has no known item, the semantic ids have several lengths, k is below 1, or there are too
            many beams, or fewer than k.
    """
    if k < 1:
        raise ValueError(f"k is {k}; it must be at least 1.")
    if num_beams is not None and num_beams < k:
        raise ValueError(f"num_beams is {num_beams}, less than k; it must be at least {k}.")
    beams, most = num_beams or max(20, k), llm.model_config.max_logprobs // 2
    if beams > most:
        raise ValueError(
            f"{beams} beams need an engine with max_logprobs={2 * beams}, but this one allows {most} beams. Use "
            f"load(folder, max_logprobs={2 * beams})."
        )
    if 2 * beams > (tokens := llm.model_config.get_vocab_size()):  # vLLM's engine would end with an error
        raise ValueError(
            f"{beams} beams need a model with at least {2 * beams} tokens, but this one has {tokens}. Give num_beams "
            f"(and k) of at most {tokens // 2}, or use sample(...)."
        )
    if not catalog.equal_lengths:
        raise ValueError(
            "The semantic ids have several lengths, and vLLM's beam search cannot end at one that is shorter than the "
            "longest. Use sample(...)."
        )
    # Without a length penalty, beams are ranked by their log-probability.
    params = BeamSearchParams(beams, catalog.max_depth, ignore_eos=True, length_penalty=0.0)
    lists = []
    prompts = [catalog.prompt_of(history) for history in histories]
    if not prompts:
        return []
    outputs = llm.beam_search([{"prompt_token_ids": prompt} for prompt in prompts], params)
    for prompt, output in zip(prompts, outputs, strict=True):
        ends = [(beam.tokens[len(prompt) :], beam.cum_logprob) for beam in output.sequences]
        found = [(catalog.items_at(tokens), value) for tokens, value in ends if value > -torch.inf]
        lists.append([(item, value) for items, value in found for item in items][:k])
    return lists


def sample(
    llm: LLM, catalog: Catalog, histories: Sequence[Sequence[Item]], count: int, seed: int | None = None
) -> list[list[tuple[list[Item], float]]]:
    """Draw semantic ids in proportion to their probability, with replacement.

    Args:
        llm, catalog: of `load`.
        histories: items of each user, oldest first. Unknown items are skipped.
        count: number of draws for each history.
        seed: the same seed gives the same draws.

    Returns:
        For each draw the items with this semantic id, and its log-probability.
    """
    params = SamplingParams(
        n=count, temperature=1.0, max_tokens=catalog.max_depth, logprobs=0, detokenize=False, seed=seed,
        stop_token_ids=None if catalog.end_token is None else [catalog.end_token],
    )  # fmt: skip
    prompts = [{"prompt_token_ids": catalog.prompt_of(history)} for history in histories]
    outputs = llm.generate(prompts, params, use_tqdm=False)
    return [
        [
            (
                catalog.items_at(one.token_ids),
                sum(step[token].logprob for step, token in zip(one.logprobs, one.token_ids, strict=True)),
            )
            for one in output.outputs
        ]
        for output in outputs
    ]
