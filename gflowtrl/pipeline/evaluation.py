"""The test split: metrics of each method, and of each user for paired comparisons."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm.auto import tqdm

from gflowtrl.metrics import RankingReport, summarize, summarize_items
from gflowtrl.policy import make_policy
from gflowtrl.teachers import TeacherModule, score_histories, top_items
from gflowtrl.trainer import rank_rows

from .models import trained_model
from .run_data import RunData
from .stage import Record, RunContext, Stage, if_set


PER_USER_FILE = "per_user.safetensors"


def measure_policy(run: RunContext, data: RunData, trained: Stage) -> Stage:
    """Measure the model of a training stage by beam search on the test split, which the processes share."""

    def recommend() -> tuple[RankingReport, Tensor, Callable[[list], Tensor]]:
        model, rows, measure = trained_model(trained), data.test, data.recipe.evaluation
        policy, encoder, state = make_policy(model, data.catalog), data.encoder, run.state
        mine = rows.shard(state.num_processes, state.process_index, contiguous=True)
        ranked = rank_rows(policy, encoder, mine, measure.num_beams, measure.batch_size, run.shows_progress)
        leaves = torch.cat(gather_object([ranked]))
        targets = data.catalog.leaf_of(rows["target"]).cpu()
        data.catalog.to("cpu")
        report = summarize(leaves, targets, data.catalog, data.item_counts, measure.ks)

        def distribution(histories: list) -> Tensor:
            prompts = {name: value.to(model.device) for name, value in encoder(histories).items()}
            leaf_probs = policy.leaf_log_probs(prompts).exp() / data.catalog.leaf_sizes
            return leaf_probs[:, data.catalog.item_leaf].cpu()

        return report, leaves, distribution

    return _test(run, data, trained.name, trained.fingerprint, recommend, main_only=False)


def measure_teacher(run: RunContext, data: RunData, teacher: TeacherModule, key: Any) -> Stage:
    """Measure the teacher's own recommendations on the test split; `key`: all that the teacher depends on."""

    def recommend() -> tuple[RankingReport, Tensor, Callable[[list], Tensor]]:
        rows, measure, longest = data.test, data.recipe.evaluation, data.encoder.max_history_items
        items = top_items(teacher, rows["history"], max(measure.num_beams, *measure.ks), max_history_items=longest)
        targets = data.catalog.index_of(rows["target"])
        report = summarize_items(items, targets, data.item_counts, measure.ks)
        leaves = data.catalog.item_leaf.cpu()[items]

        def distribution(histories: list) -> Tensor:
            return score_histories(teacher, histories, longest).softmax(-1).cpu()

        return report, leaves, distribution

    return _test(run, data, "teacher", key, recommend, main_only=True)


def per_user(stage: Stage) -> dict[str, Tensor]:
    """Metrics of each test user `(U,)`, and `leaves` `(U, beams)`, in the order of the test rows."""
    return load_file(stage.folder / PER_USER_FILE)


def _test(
    run: RunContext, data: RunData, method: str, key: Any, recommend: Callable[[], tuple], main_only: bool
) -> Stage:
    """The stage that saves the results of `recommend`: a report, ranked leaves, and a distribution over all items."""
    rows, measure = data.test, data.recipe.evaluation

    @torch.no_grad()
    def work(folder: Path) -> Record:
        report, leaves, distribution = recommend()
        if not run.is_main:
            return {}
        tensors = {**report.per_user, "row_id": torch.tensor(rows["row_id"]), "leaves": leaves.int()}
        metrics = dict(report.metrics)
        if data.truth is not None:
            parts = range(0, len(rows), measure.batch_size)
            bar = tqdm(parts, desc="Comparing with the truth", disable=not run.shows_progress)
            probs = [distribution(rows[start : start + measure.batch_size]["history"]) for start in bar]
            truth = data.truth.per_user(rows["user"], torch.cat(probs))
            tensors |= truth
            metrics |= {name: float(values.mean()) for name, values in truth.items()}
        own = {name: tensor.clone(memory_format=torch.contiguous_format) for name, tensor in tensors.items()}
        save_file(own, folder / PER_USER_FILE)
        return {"users": len(rows), "metrics": metrics, "standard_errors": report.standard_errors}

    inputs = {"num_beams": measure.num_beams, "ks": measure.ks, **if_set(users=measure.users)}
    stage = run.stage(f"test-{method}", {"data": data.fingerprint, "of": key, "evaluation": inputs})
    stage.run(f"recommending to {len(rows):,} test users", work, main_only)
    return stage
