"""How well each method ranks the items that users were shown at random (`exposed.jsonl`)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from datasets import Dataset
from safetensors.torch import save_file
from torch import Tensor
from tqdm.auto import tqdm

from gflowtrl.catalog import Item, ItemCatalog
from gflowtrl.data import ExposedCollator, ExposedRows, PromptEncoder, reordered
from gflowtrl.ensemble import Ensemble
from gflowtrl.files import read_tensors
from gflowtrl.finite import NonFiniteError
from gflowtrl.metrics import exposed_metrics, mean_over_users, paired_bootstrap
from gflowtrl.metrics.exposed import EXPOSED_METRICS
from gflowtrl.policy import TreePolicy, check_exact, make_policy
from gflowtrl.recommender import Recommender
from gflowtrl.teachers import Teacher, TeacherModule, fingerprint, score_histories
from gflowtrl.trainer import candidate_log_probs
from gflowtrl.trainer.evaluation import by_length
from gflowtrl.trainer.exposed import unchecked_log_probs

from .evaluation import PER_USER_FILE
from .models import trained_model
from .run_data import RunData
from .stage import Record, RunContext, Stage


#: Prefix of the metrics of corrected scores: log-probabilities minus c log(count + 1).
CORRECTED = "corrected_"
EXPOSED_NAMES = [f"{prefix}{name}" for prefix in ("", CORRECTED) for name in EXPOSED_METRICS]
#: Histories and positions of candidates in the catalog `(B, C)`, to log-probabilities of the candidates `(B, C)`.
Scorer = Callable[[list[list[Item]], Tensor], Tensor]


@dataclass
class ExposedReport:
    """Metrics of one method on exposed items.

    Attributes:
        metrics: means over users: `"ndcg@5"`, `"recall@5"`, `"auc"`, and the same with `"corrected_"` in front.
        standard_errors: under the same names.
        per_user: double tensors `(U,)`, NaN for users for whom a metric is not defined.
    """

    metrics: dict[str, float]
    standard_errors: dict[str, float]
    per_user: dict[str, Tensor]


def policy_scorer(policy: TreePolicy, encoder: PromptEncoder) -> Scorer:
    """Score candidates by a policy; NaN if the model computes NaN.

    Raises:
        ValueError: the policy is not the model's own distribution (`check_exact`).
    """
    check_exact(policy, encoder)
    device = next(policy.model.parameters()).device

    def score(histories: list[list[Item]], candidates: Tensor) -> Tensor:
        prompts = {name: value.to(device) for name, value in encoder(histories).items()}
        return unchecked_log_probs(policy, prompts, candidates.to(device)).cpu()

    return score


def teacher_scorer(teacher: Teacher, max_history_items: int) -> Scorer:
    """Score candidates by a teacher whose columns are in the order of the catalog."""

    @torch.no_grad()
    def score(histories: list[list[Item]], candidates: Tensor) -> Tensor:
        log_probs = score_histories(teacher, histories, max_history_items).log_softmax(-1).cpu()
        return log_probs.gather(1, candidates.clamp(min=0))

    return score


def system_scorer(system: Recommender | Ensemble) -> Scorer:
    """Score candidates by a saved recommender, or by an ensemble."""
    if isinstance(system, Ensemble):
        return system.log_probs

    def score(histories: list[list[Item]], candidates: Tensor) -> Tensor:
        prompts = system.prompts(histories)
        return candidate_log_probs(system.policy, prompts, candidates.to(system.model.device)).cpu()

    return score


def rank_exposed(
    score: Scorer, rows: Dataset, catalog: ItemCatalog, orders: int = 1, batch_size: int = 256, progress: bool = True
) -> Tensor:
    """Return the log-probability of each candidate, `(U, C)`, in the order of `rows`; anything for padding.

    Args:
        score: the method.
        rows: from `exposed_rows`.
        catalog: gives the positions of the candidates.
        orders: average the probabilities over so many orders of each history: the one of the data, and random ones.
        batch_size: users that are scored together.
        progress: show a progress bar.
    """
    if not len(rows):  # of a process, if there are fewer rows than processes
        return torch.zeros(0, 0, dtype=torch.double)
    ordered, order = by_length(rows)
    histories, row_ids = ordered["history"], ordered["row_id"]
    candidates = padded_columns(ordered, catalog)[0]
    parts = []
    for start in tqdm(range(0, len(rows), batch_size), desc="Exposed items", disable=not progress):
        part = slice(start, start + batch_size)
        views = [reordered(histories[part], row_ids[part], number) for number in range(orders)]
        scores = torch.stack([score(view, candidates[part]).double() for view in views])
        parts.append(scores.logsumexp(0) - torch.tensor(orders).double().log())
    found = torch.cat(parts)
    return torch.empty_like(found).index_copy_(0, order, found)


def padded_columns(rows: Dataset, catalog: ItemCatalog) -> tuple[Tensor, Tensor]:
    """Return positions of the candidates in the catalog and likes, both `(U, C)`, padded as by `ExposedCollator`."""
    batch = ExposedCollator.columns(rows["candidates"], rows["liked"], catalog)
    return batch["candidates"], batch["liked"]


def report_exposed(scores: Tensor, rows: Dataset, catalog: ItemCatalog, penalty: Tensor) -> ExposedReport:
    """Measure scores `(U, C)`, as they are and corrected.

    Args:
        scores: from `rank_exposed`.
        rows: from `exposed_rows`.
        catalog: gives the positions of the candidates.
        penalty: `(items,)` what the correction subtracts.
    """
    candidates, liked = padded_columns(rows, catalog)
    per_user = exposed_metrics(scores, liked)
    corrected = exposed_metrics(scores - penalty.double()[candidates.clamp(min=0)], liked)
    per_user |= {f"{CORRECTED}{name}": values for name, values in corrected.items()}
    return ExposedReport(*mean_over_users(per_user), per_user)


def exposure_penalty(counts: Tensor, strength: float) -> Tensor:
    """Return what corrected scores lack: `strength * log(count + 1)`, `(items,)`."""
    return strength * torch.log1p(counts.double())


# -------------------------------------------------------------------------------------------------------- in a run
def measure_exposed(
    run: RunContext, data: RunData, trained: Mapping[str, Stage], teacher: TeacherModule | None, teacher_key: Any
) -> dict[str, Stage]:
    """Measure all methods of a run on the exposed items; {} if the data have none. The processes share the policies'
    work."""
    if data.exposed is None:
        return {}
    run.log(f"Exposed items: {data.exposed}.")
    stages = {}
    if teacher is not None:
        scorer = teacher_scorer(teacher, data.encoder.max_history_items)
        stages["teacher"] = _measure(run, data, data.exposed, "teacher", teacher_key, lambda: scorer)
    for method, stage in trained.items():

        def scorer(stage: Stage = stage) -> Scorer:
            return policy_scorer(make_policy(trained_model(stage), data.catalog), data.encoder)

        stages[method] = _measure(run, data, data.exposed, method, stage.fingerprint, scorer)
    return stages


def _measure(
    run: RunContext, data: RunData, exposed: ExposedRows, method: str, key: Any, scorer: Callable[[], Scorer]
) -> Stage:
    measure, rows, state = data.recipe.evaluation, exposed.rows, run.state
    inputs = {"orders": measure.exposed_orders, "correction": measure.exposed_correction}
    inputs |= {"rows": fingerprint([rows[name][:] for name in rows.column_names])}
    stage = run.stage(f"exposed-{method}", {"data": data.fingerprint, "of": key, **inputs})

    def work(folder: Path) -> Record:
        mine = torch.arange(len(rows)).tensor_split(state.num_processes)[state.process_index].tolist()
        orders, size = measure.exposed_orders, measure.batch_size
        part = rank_exposed(scorer(), rows.select(mine), data.catalog, orders, size, run.shows_progress)
        widest = max(map(len, rows["candidates"]))
        parts = gather_object([torch.nn.functional.pad(part, (0, widest - part.shape[1]))])
        if any(bool(each.isnan().any()) for each in parts):
            raise NonFiniteError(f"The probabilities of {method} on exposed items are NaN; its activations overflow.")
        if not run.is_main:
            return {}
        penalty = exposure_penalty(data.splits.exposure_counts, measure.exposed_correction)
        report = report_exposed(torch.cat(parts), rows, data.catalog, penalty)
        save_file({**report.per_user, "row_id": torch.tensor(rows["row_id"])}, folder / PER_USER_FILE)
        return {name: value for name, value in asdict(report).items() if name != "per_user"}

    stage.run(f"ranking the exposed items of {len(rows):,} users", work)
    return stage


def collect_exposed(data: RunData, stages: Mapping[str, Stage], samples: int) -> Record:
    """Return what `results.json` holds about exposed items."""
    rows = data.exposed
    found = {
        "users": len(rows.rows),
        "own_items_left_out": rows.own_items,
        "users_without_log": rows.users_without_log,
        "correction": data.recipe.evaluation.exposed_correction,
        "counts": "interactions" if data.splits.impression_counts is None else "impressions",
        "methods": {
            method: {name: stage.record[name] for name in ("metrics", "standard_errors")}
            | {"folder": str(stage.folder)}
            for method, stage in stages.items()
        },
    }
    if {"gflownet", "control"} <= stages.keys():
        ours, theirs = (read_tensors(stages[method].folder / PER_USER_FILE) for method in ("gflownet", "control"))
        known = found["methods"]["control"]["metrics"]
        found["gflownet_minus_control"] = {
            name: paired_difference(ours[name], theirs[name], samples) for name in EXPOSED_NAMES if name in known
        }
    return found


def paired_difference(ours: Tensor, theirs: Tensor, samples: int = 10_000) -> dict[str, float]:
    """Return the `paired_bootstrap` over the users for whom the metric is defined."""
    known = ~ours.isnan()
    return paired_bootstrap(ours[known], theirs[known], samples=samples)


def exposed_lines(metrics: Mapping[str, float], errors: Mapping[str, float]) -> list[str]:
    """Return the cells of one row of a table: each metric with its standard error; "" if it is defined for nobody."""
    return [f"{metrics[name]:.4f} ± {errors[name]:.4f}" if name in metrics else "" for name in EXPOSED_NAMES]


def exposed_headings() -> list[str]:
    """Return the headings of `exposed_lines`."""
    return list(map(exposed_title, EXPOSED_NAMES))


def exposed_title(name: str) -> str:
    """Return the name of a metric in tables: "NDCG@5", "AUC, corrected"."""
    bare = name.removeprefix(CORRECTED)
    title = bare.replace("ndcg", "NDCG").replace("recall", "Recall").replace("auc", "AUC")
    return title if bare == name else f"{title}, corrected"
