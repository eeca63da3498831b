"""The test split: metrics of each method, and of each user for paired comparisons."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from datasets import Dataset
from safetensors.torch import save_file
from torch import Tensor
from tqdm.auto import tqdm

from gflowtrl.catalog import Item, ItemCatalog, SeenItems
from gflowtrl.data import InteractionData
from gflowtrl.ensemble import Ensemble
from gflowtrl.files import read_tensors
from gflowtrl.metrics import RankingReport, inverse_propensities, summarize, summarize_items
from gflowtrl.metrics.exposed import estimates_of
from gflowtrl.metrics.ranking_report import UNSEEN
from gflowtrl.policy import make_policy
from gflowtrl.recommender import Recommender
from gflowtrl.teachers import Teacher, TeacherModule, score_histories, top_items
from gflowtrl.trainer import rank_both

from .models import trained_model
from .run_data import RunData
from .stage import Record, RunContext, Stage, if_set


PER_USER_FILE = "per_user.safetensors"
TEACHER_BATCH = 1024  # users whose lists of a teacher are made together


def earlier_items(data: InteractionData, rows: Dataset) -> list[list[Item]]:
    """All items before the target of each row of `leave_one_out(data)`, also if the rows' histories were cut."""
    ends, found = list(accumulate(map(len, data.sequences))), []
    for row_id in rows["row_id"]:
        sequence = data.sequences[user := bisect_right(ends, row_id)]
        found.append(sequence[: row_id - ends[user] + len(sequence)])
    return found


def both_columns(
    leaves: Tensor, unseen: Tensor, rows: Dataset, seen: SeenItems, catalog: ItemCatalog, item_counts: Tensor,
    ks: Sequence[int],
) -> RankingReport:  # fmt: skip
    """Metrics of the two rankings of `rank_both`; those without seen items begin with `unseen_`. The catalog moves
    to the CPU."""
    targets, catalog = catalog.leaf_of(rows["target"]).cpu(), catalog.to("cpu")
    report = summarize(leaves, targets, catalog, item_counts, ks)
    return report.with_unseen(summarize(unseen, targets, catalog, item_counts, ks, seen))


def both_item_columns(
    items: Tensor, unseen: Tensor, targets: Tensor, item_counts: Tensor, ks: Sequence[int]
) -> RankingReport:
    """Metrics of two rankings of items; those without seen items begin with `unseen_`."""
    report = summarize_items(items, targets, item_counts, ks)
    return report.with_unseen(summarize_items(unseen, targets, item_counts, ks))


def measure_saved(
    system: Recommender | Ensemble, rows: Dataset, earlier: Sequence[Sequence[Item]],
    counts: Mapping[Item, int], ks: Sequence[int], num_beams: int, batch_size: int = 256,
) -> RankingReport:  # fmt: skip
    """Both columns of a saved recommender, which ranks semantic ids, or of an ensemble, which ranks items.

    Args:
        system: the recommender or ensemble.
        rows: histories and targets.
        earlier: all items that each user has had (`earlier_items`).
        counts: numbers of training interactions; 0 for items that are not there.
        ks: cutoffs.
        num_beams: beam width.
        batch_size: histories that are decoded together.
    """
    item_counts = torch.tensor([counts.get(item, 0) for item in system.catalog.items])
    if isinstance(system, Ensemble):
        items, unseen = system.rank_both(rows, earlier, max(ks), num_beams, batch_size)
        return both_item_columns(items, unseen, system.catalog.index_of(rows["target"]), item_counts, ks)
    seen = system.catalog.seen_items(earlier, rows["target"])
    leaves, unseen = rank_both(system.policy, system.encoder, rows, seen, num_beams, batch_size)
    return both_columns(leaves, unseen, rows, seen, system.catalog, item_counts, ks)


def both_lists(
    teacher: Teacher, catalog: ItemCatalog, rows: Dataset, earlier: Sequence[Sequence[Item]], k: int, longest: int
) -> tuple[Tensor, Tensor]:
    """A teacher's `k` best items for each row `(U, k)`, and its `k` best items that the user has not had.

    Args:
        teacher: scores the items in the order of the catalog.
        catalog: the items.
        rows: histories and targets.
        earlier: all items that each user has had.
        k: length of the lists; -1 where there are no more items.
        longest: how many items of a history the teacher sees.
    """
    lists, unseen, histories, targets = [], [], rows["history"], rows["target"]
    for start in range(0, len(rows), TEACHER_BATCH):
        part = slice(start, start + TEACHER_BATCH)
        seen = catalog.seen_items(earlier[part], targets[part])
        ranked = top_items(teacher, histories[part], k + seen.most, max_history_items=longest)
        lists.append(ranked[:, :k])
        unseen.append(seen.without(ranked, k))
    return torch.cat(lists), torch.cat(unseen)


def measure_policy(run: RunContext, data: RunData, trained: Stage) -> Stage:
    """Measure the model of a training stage by beam search on the test split, which the processes share."""

    def recommend() -> tuple[RankingReport, dict[str, Tensor], Callable[[list], Tensor]]:
        model, rows, measure = trained_model(trained), data.test, data.recipe.evaluation
        policy, encoder, state = make_policy(model, data.catalog), data.encoder, run.state
        earlier, targets = earlier_items(data.interactions, rows), rows["target"]
        mine = torch.arange(len(rows)).tensor_split(state.num_processes)[state.process_index].tolist()
        part = data.catalog.seen_items([earlier[i] for i in mine], [targets[i] for i in mine])
        beams, size = measure.num_beams, measure.batch_size
        ranked = rank_both(policy, encoder, rows.select(mine), part, beams, size, run.shows_progress)
        leaves, unseen = map(torch.cat, zip(*gather_object([ranked]), strict=True))
        seen = data.catalog.seen_items(earlier, targets)
        report = both_columns(leaves, unseen, rows, seen, data.catalog, data.item_counts, measure.ks)

        def distribution(histories: list) -> Tensor:
            prompts = {name: value.to(model.device) for name, value in encoder(histories).items()}
            leaf_probs = policy.leaf_log_probs(prompts).exp() / data.catalog.leaf_sizes
            return leaf_probs[:, data.catalog.item_leaf].cpu()

        return report, {"leaves": leaves, f"{UNSEEN}leaves": unseen}, distribution

    return _test(run, data, trained.name, trained.fingerprint, recommend, main_only=False)


def measure_teacher(run: RunContext, data: RunData, teacher: TeacherModule, key: Any) -> Stage:
    """Measure the teacher's own recommendations on the test split; `key`: all that the teacher depends on."""

    def recommend() -> tuple[RankingReport, dict[str, Tensor], Callable[[list], Tensor]]:
        rows, measure, longest = data.test, data.recipe.evaluation, data.encoder.max_history_items
        earlier, catalog = earlier_items(data.interactions, rows), data.catalog
        items, unseen = both_lists(teacher, catalog, rows, earlier, max(measure.num_beams, *measure.ks), longest)
        targets = catalog.index_of(rows["target"])
        report = both_item_columns(items, unseen, targets, data.item_counts, measure.ks)
        item_leaf = catalog.item_leaf.cpu()
        own = torch.where(unseen >= 0, item_leaf[unseen], -1)
        leaves = {"leaves": item_leaf[items], f"{UNSEEN}leaves": own}

        def distribution(histories: list) -> Tensor:
            return score_histories(teacher, histories, longest).softmax(-1).cpu()

        return report, leaves, distribution

    return _test(run, data, "teacher", key, recommend, main_only=True)


def per_user(stage: Stage) -> dict[str, Tensor]:
    """Metrics of each test user `(U,)`, and `leaves` `(U, beams)`, in the order of the test rows; both also with seen
    items removed, under names that begin with `unseen_`."""
    return read_tensors(stage.folder / PER_USER_FILE)


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
        tensors = {**report.per_user, "row_id": torch.tensor(rows["row_id"])}
        tensors |= {name: ranked.int() for name, ranked in leaves.items()}
        metrics, errors = dict(report.metrics), dict(report.standard_errors)
        for name, (value, error) in _debiased(data, report.per_user).items():
            metrics[name], errors[name] = value, error
        if data.truth is not None:
            parts = range(0, len(rows), measure.batch_size)
            bar = tqdm(parts, desc="Comparing with the truth", disable=not run.shows_progress)
            probs = [distribution(rows[start : start + measure.batch_size]["history"]) for start in bar]
            truth = data.truth.per_user(rows["user"], torch.cat(probs))
            tensors |= truth
            metrics |= {name: float(values.mean()) for name, values in truth.items()}
        own = {name: tensor.clone(memory_format=torch.contiguous_format) for name, tensor in tensors.items()}
        save_file(own, folder / PER_USER_FILE)
        return {"users": len(rows), "metrics": metrics, "standard_errors": errors}

    inputs = {"num_beams": measure.num_beams, "ks": measure.ks, "seen": "both", **if_set(users=measure.users)}
    inputs |= {} if data.splits.impression_counts is None else {"debiased": True}
    stage = run.stage(f"test-{method}", {"data": data.fingerprint, "of": key, "evaluation": inputs})
    stage.run(f"recommending to {len(rows):,} test users", work, main_only)
    return stage


def _debiased(data: RunData, per_user: Mapping[str, Tensor]) -> dict[str, tuple[float, float]]:
    """What the main metrics would be if the log had shown all items equally often, estimated from its impressions."""
    if data.splits.impression_counts is None:
        return {}
    weights = inverse_propensities(data.splits.impression_counts)[data.catalog.index_of(data.test["target"])]
    k = data.recipe.evaluation.primary_k
    return estimates_of(per_user, [f"item_recall@{k}", f"item_ndcg@{k}"], weights)
