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
    the users, and the first one puts them together."""

    def work(folder: Path) -> Record:
        model, rows, measure = trained_model(trained), materials.test, materials.recipe.evaluation
        policy, encoder = make_policy(model, materials.catalog), materials.encoder
        progress = workshop.is_main and not workshop.quiet
        mine = rows.shard(workshop.state.num_processes, workshop.state.process_index, contiguous=True)
        ranked = rank_rows(policy, encoder, mine, measure.num_beams, measure.batch_size, progress)
        leaves = torch.cat(gather_object([ranked]))
        if not workshop.is_main:
            materials.catalog.to("cpu")
            return {}
        targets = materials.catalog.leaf_of(rows["target"]).cpu()
        materials.catalog.to("cpu")
        report = summarise(leaves, targets, materials.catalog, materials.item_counts, measure.ks)

        def distribution(histories: list) -> Tensor:
            prompts = {name: value.to(model.device) for name, value in encoder(histories).items()}
            leaf_probs = policy.leaf_log_probs(prompts).exp() / materials.catalog.leaf_sizes
            return leaf_probs[:, materials.catalog.item_leaf].cpu()

        return _record(materials, folder, report, leaves, distribution, progress)

    return _run(workshop, materials, trained.name, trained.fingerprint, work, main_only=False)


def measure_teacher(workshop: Workshop, materials: Materials, teacher: TeacherModule, key: Any) -> Stage:
    """The teacher's own recommendations on the test split; `key` is what the teacher depends on."""

    def work(folder: Path) -> Record:
        rows, measure = materials.test, materials.recipe.evaluation
        cut = materials.recipe.data.max_history_items
        items = top_items(teacher, rows["history"], max(measure.num_beams, *measure.ks), max_history_items=cut)
        targets = materials.catalog.index_of(rows["target"])
        report = summarise_items(items, targets, materials.item_counts, measure.ks)
        leaves = materials.catalog.item_leaf.cpu()[items]

        def distribution(histories: list) -> Tensor:
            return teacher.score(histories).softmax(-1).cpu()

        return _record(materials, folder, report, leaves, distribution, not workshop.quiet)

    return _run(workshop, materials, "teacher", key, work, main_only=True)


def per_user(stage: Stage) -> dict[str, Tensor]:
    """Metrics of each test user `(U,)`, and `leaves` `(U, beams)`, in the order of the test rows."""
    return load_file(stage.folder / PER_USER_FILE)


def _run(
    workshop: Workshop, materials: Materials, method: str, key: Any, work: Callable[[Path], Record], main_only: bool
) -> Stage:
    given = materials.recipe.evaluation
    measure = {"num_beams": given.num_beams, "ks": given.ks, **if_set(users=given.users)}
    stage = workshop.stage(f"test-{method}", {"data": materials.fingerprint, "of": key, "evaluation": measure})
    stage.run(f"recommending to {len(materials.test):,} test users", work, main_only)
    return stage


@torch.no_grad()
def _record(
    materials: Materials,
    folder: Path,
    report: RankingReport,
    leaves: Tensor,
    distribution: Callable[[list], Tensor],
    progress: bool,
) -> Record:
    rows, metrics = materials.test, dict(report.metrics)
    tensors = {**report.per_user, "row_id": torch.tensor(rows["row_id"]), "leaves": leaves.int()}
    if materials.truth is not None:
        histories, size = rows["history"], materials.recipe.evaluation.batch_size
        starts = tqdm(range(0, len(histories), size), desc="Comparing with the truth", disable=not progress)
        probs = torch.cat([distribution(histories[start : start + size]) for start in starts])
        truth = materials.truth.per_user(rows["user"], probs)
        tensors |= truth
        metrics |= {name: float(values.mean()) for name, values in truth.items()}
    save_file(
        {name: tensor.clone(memory_format=torch.contiguous_format) for name, tensor in tensors.items()},
        folder / PER_USER_FILE,
    )
    return {"users": len(rows), "metrics": metrics, "standard_errors": report.standard_errors}
