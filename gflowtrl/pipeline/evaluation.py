"""The test split: one record of metrics a method, and the figures of each user for paired comparisons."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm.auto import tqdm

from gflowtrl.metrics import RankingReport, summarise, summarise_items
from gflowtrl.policy import make_policy
from gflowtrl.teachers import TeacherModule, top_items
from gflowtrl.trainer import rank_rows

from .materials import Materials
from .models import trained_model
from .stage import Record, Stage, Workshop, if_set


PER_USER_FILE = "per_user.safetensors"


def measure_policy(workshop: Workshop, materials: Materials, trained: Stage) -> Stage:
    """Constrained beam search over the test split by the model of a training stage; each process takes its share of
    the users."""

    def recommend() -> tuple[RankingReport, Tensor, Callable[[list], Tensor]]:
        model, rows, measure = trained_model(trained), materials.test, materials.recipe.evaluation
        policy, encoder, state = make_policy(model, materials.catalog), materials.encoder, workshop.state
        mine = rows.shard(state.num_processes, state.process_index, contiguous=True)
        ranked = rank_rows(policy, encoder, mine, measure.num_beams, measure.batch_size, workshop.shows_progress)
        leaves = torch.cat(gather_object([ranked]))
        targets = materials.catalog.leaf_of(rows["target"]).cpu()
        materials.catalog.to("cpu")
        report = summarise(leaves, targets, materials.catalog, materials.item_counts, measure.ks)

        def distribution(histories: list) -> Tensor:
            prompts = {name: value.to(model.device) for name, value in encoder(histories).items()}
            leaf_probs = policy.leaf_log_probs(prompts).exp() / materials.catalog.leaf_sizes
            return leaf_probs[:, materials.catalog.item_leaf].cpu()

        return report, leaves, distribution

    return _test(workshop, materials, trained.name, trained.fingerprint, recommend, main_only=False)


def measure_teacher(workshop: Workshop, materials: Materials, teacher: TeacherModule, key: Any) -> Stage:
    """The teacher's own recommendations on the test split; `key` is what the teacher depends on."""

    def recommend() -> tuple[RankingReport, Tensor, Callable[[list], Tensor]]:
        rows, measure, longest = materials.test, materials.recipe.evaluation, materials.encoder.max_history_items
        items = top_items(teacher, rows["history"], max(measure.num_beams, *measure.ks), max_history_items=longest)
        targets = materials.catalog.index_of(rows["target"])
        report = summarise_items(items, targets, materials.item_counts, measure.ks)
        leaves = materials.catalog.item_leaf.cpu()[items]

        def distribution(histories: list) -> Tensor:
            return teacher.score([history[-longest:] for history in histories]).softmax(-1).cpu()

        return report, leaves, distribution

    return _test(workshop, materials, "teacher", key, recommend, main_only=True)


def per_user(stage: Stage) -> dict[str, Tensor]:
    """Metrics of each test user `(U,)`, and `leaves` `(U, beams)`, in the order of the test rows."""
    return load_file(stage.folder / PER_USER_FILE)


def _test(
    workshop: Workshop, materials: Materials, method: str, key: Any, recommend: Callable[[], tuple], main_only: bool
) -> Stage:
    """The stage that keeps what `recommend` finds: a report, ranked leaves, and the distribution over all items."""
    rows, measure = materials.test, materials.recipe.evaluation

    @torch.no_grad()
    def work(folder: Path) -> Record:
        report, leaves, distribution = recommend()
        if not workshop.is_main:
            return {}
        tensors = {**report.per_user, "row_id": torch.tensor(rows["row_id"]), "leaves": leaves.int()}
        metrics = dict(report.metrics)
        if materials.truth is not None:
            parts = range(0, len(rows), measure.batch_size)
            bar = tqdm(parts, desc="Comparing with the truth", disable=not workshop.shows_progress)
            probs = [distribution(rows[start : start + measure.batch_size]["history"]) for start in bar]
            truth = materials.truth.per_user(rows["user"], torch.cat(probs))
            tensors |= truth
            metrics |= {name: float(values.mean()) for name, values in truth.items()}
        own = {name: tensor.clone(memory_format=torch.contiguous_format) for name, tensor in tensors.items()}
        save_file(own, folder / PER_USER_FILE)
        return {"users": len(rows), "metrics": metrics, "standard_errors": report.standard_errors}

    inputs = {"num_beams": measure.num_beams, "ks": measure.ks, **if_set(users=measure.users)}
    stage = workshop.stage(f"test-{method}", {"data": materials.fingerprint, "of": key, "evaluation": inputs})
    stage.run(f"recommending to {len(rows):,} test users", work, main_only)
    return stage
