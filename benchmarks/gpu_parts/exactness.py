"""Effect of bf16 on the policy's distribution over all leaves, and on the distribution that training reaches."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import replace
from functools import partial

import torch
from measuring import llama
from torch import Tensor
from transformers import PreTrainedModel, set_seed

from benchmarks.quality.total_variation import SETTINGS, Problem, small_llama, train
from gflowtrl import ItemCatalog
from gflowtrl.data import PromptEncoder
from gflowtrl.metrics import total_variation
from gflowtrl.policy import make_policy

from .settings import Row, Rows, RunSettings, cast_parameters
from .training import small_catalog


#: The dtype of the weights. With autocast, weights are float32 and products bf16, as with the Trainer's `bf16=True`.
WEIGHTS = {
    "float32": torch.float32,
    "float64": torch.float64,
    "bf16 autocast": torch.float32,
    "bf16 weights": torch.bfloat16,
}


def leaf_log_probs(
    model: PreTrainedModel, catalog: ItemCatalog, prompts: Mapping[str, Tensor], precision: str
) -> Tensor:
    """Return log pi of every leaf, `(B, N)` in float64, from a copy of the model in a precision of `WEIGHTS`."""
    model = cast_parameters(copy.deepcopy(model), WEIGHTS[precision]).eval()
    autocast = torch.autocast(prompts["input_ids"].device.type, torch.bfloat16)
    with autocast if precision == "bf16 autocast" else nullcontext():
        return make_policy(model, catalog).leaf_log_probs(prompts).double()


def exactness(settings: RunSettings) -> Rows:
    """Compare the policy's distribution with that of the same weights in float32, on the same prompts."""
    catalog, tokenizer = small_catalog(settings)
    histories = torch.randint(len(catalog), (settings.pick(16, 4), 20), generator=torch.Generator().manual_seed(1))
    encoder = PromptEncoder(catalog, tokenizer)
    prompts = settings.on_device(encoder([[catalog.items[i] for i in row] for row in histories.tolist()]))
    for size in settings.pick(("1.2M", "113M"), ("0.2M", "1.2M")):
        model = llama(len(tokenizer), size).to(settings.device)
        reference = leaf_log_probs(model, catalog, prompts, "float32")
        known = {"size": size, "parameters": model.num_parameters(), "leaves": catalog.tree.num_leaves}

        def compare(precision: str, known=known, model=model, reference=reference) -> Row:
            found = leaf_log_probs(model, catalog, prompts, precision)
            return {**known, "precision": precision, **distances(found, reference)}

        yield from (partial(compare, precision) for precision in list(WEIGHTS)[1:])


def distances(found: Tensor, reference: Tensor) -> dict[str, float]:
    """Compare log-probabilities `(B, N)` with a reference.

    Returns:
        The mean and largest total variation over the prompts, the largest difference of a log-probability, the share
        of the ten most probable leaves that both have in common, and the entropy of the reference in nats.
    """
    variation = total_variation(found.exp(), reference.exp())
    best = [values.topk(10).indices for values in (found, reference)]
    common = (best[0][:, :, None] == best[1][:, None]).any(2).double().mean()
    return {
        "total_variation": variation.mean().item(), "largest_total_variation": variation.max().item(),
        "largest_log_prob_difference": (found - reference).abs().max().item(), "top_10_in_common": common.item(),
        "entropy": torch.special.entr(reference.exp()).sum(1).mean().item(),
    }  # fmt: skip


def trained_total_variation(settings: RunSettings) -> Rows:
    """Measure the total variation to R / Z of exact flows trained in each precision, with equal weights and draws.

    `trained` is the total variation of the policy in the precision of its training, `trained_in_float32` that of the
    same weights in float32.
    """
    problem = Problem.draw(settings.pick(1000, 40), seed=0)
    setting = replace(SETTINGS["exact_flow"], steps=settings.pick(SETTINGS["exact_flow"].steps, 12))
    encoder = PromptEncoder(problem.catalog, problem.tokenizer)
    prompts = settings.on_device(encoder([[i] for i in range(problem.num_prompts)]))
    target = problem.catalog.fold_items(problem.reward.log_rewards.double()).softmax(1).to(settings.device)

    def distance(model: PreTrainedModel, precision: str) -> float:
        found = leaf_log_probs(model, problem.catalog, prompts, precision)
        return total_variation(found.exp(), target).max().item()

    def reach(precision: str) -> Row:
        set_seed(0)
        model = cast_parameters(small_llama(problem.tokenizer).to(settings.device), WEIGHTS[precision])
        untrained = distance(model, precision)
        arguments = {"use_cpu": settings.device.type == "cpu", "bf16": precision == "bf16 autocast"}
        train(problem, model, "exact_flow", setting, seed=0, arguments=arguments)
        # A new model, because training leaves autocast on the model's forward.
        trained = small_llama(problem.tokenizer).to(settings.device)
        trained.load_state_dict(model.state_dict())
        return {
            "precision": precision, "leaves": problem.catalog.tree.num_leaves, "steps": setting.steps,
            "untrained": untrained, "trained": distance(trained, precision),
            "trained_in_float32": distance(trained, "float32"),
        }  # fmt: skip

    yield from (partial(reach, precision) for precision in ("float32", "bf16 autocast", "bf16 weights"))
