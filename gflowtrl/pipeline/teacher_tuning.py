"""Temperature and popularity correction of a teacher's distribution, chosen on the validation split."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from gflowtrl.metrics import summarize_items
from gflowtrl.teachers import TeacherModule, as_teacher, score_histories

from .run_data import RunData


TEMPERATURES = (0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 1.2, 1.5, 2.0)
CORRECTIONS = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0)
BATCH = 256  # users scored together


@dataclass
class Setting:
    """One cell of the table: a distribution, and what it is worth on the validation split.

    Attributes:
        temperature, popularity_correction: options of `CollaborativeReward`.
        log_likelihood: mean over the users of the log-probability of the target.
        ndcg, ndcg_error, recall, coverage: of the top items, with the standard error of the NDCG (0 for one user).
            They do not depend on the temperature.
    """

    temperature: float
    popularity_correction: float
    log_likelihood: float
    ndcg: float
    ndcg_error: float
    recall: float
    coverage: float


@dataclass
class Tuning:
    """Result of `tune_teacher`.

    Attributes:
        settings: all cells, by correction, then by temperature.
        best: the chosen cell (`choose`).
        k: cutoff of the metrics.
        users: number of validation users.
        unreachable: users whose target is in their history and excluded; their likelihood is not counted.
        exclude_history: whether items of the history were excluded.
    """

    settings: list[Setting]
    best: Setting
    k: int
    users: int
    unreachable: int
    exclude_history: bool

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def choose(settings: list[Setting]) -> Setting:
    """Return the setting to use.

    The popularity correction is the largest one whose NDCG is at most one standard error below the best NDCG, because
    the breadth that it adds costs nothing that these users could show. The temperature is then the one with the
    highest likelihood.
    """
    best = max(settings, key=lambda setting: setting.ndcg)
    good = [setting for setting in settings if setting.ndcg >= best.ndcg - best.ndcg_error]
    correction = max(setting.popularity_correction for setting in good)
    candidates = [setting for setting in good if setting.popularity_correction == correction]
    return max(candidates, key=lambda setting: setting.log_likelihood)


@torch.no_grad()
def tune_teacher(data: RunData, teacher: TeacherModule, item_counts: Tensor, exclude_history: bool = False) -> Tuning:
    """Measure `softmax((score - c * log(count + 1)) / temperature)` on the validation split, for a grid of both.

    Args:
        data: the data of the run. Its test split is not read.
        teacher: the fitted teacher.
        item_counts: `(items,)`, training counts in the order of the catalog.
        exclude_history: give items of the history a probability of 0.

    Raises:
        ValueError: all targets are excluded.
    """
    rows, k, longest = data.validation, data.recipe.evaluation.primary_k, data.recipe.data.max_history_items
    aligned, targets = as_teacher(teacher, data.catalog.items), data.catalog.index_of(rows["target"])
    penalty, log_likelihoods, tops = torch.log1p(item_counts.float().cpu()), [], []
    for start in range(0, len(rows), BATCH):
        part = slice(start, start + BATCH)
        histories = rows[part]["history"]
        scores = score_histories(aligned, histories, longest).float().cpu()
        if exclude_history:
            seen = data.catalog.seen_items(histories)
            scores[seen.rows, seen.items] = -torch.inf
        corrected = [scores - correction * penalty for correction in CORRECTIONS]
        tops.append(torch.stack([logits.topk(min(k, scores.shape[1])).indices for logits in corrected]))
        log_likelihoods.append(torch.stack([_log_likelihoods(logits, targets[part]) for logits in corrected]))
    lists, values = torch.cat(tops, 1), torch.cat(log_likelihoods, 2).double()
    reached = values[0, 0].isfinite()
    if not reached.any():
        raise ValueError("All validation targets are items of their histories: use --keep_history.")
    settings = []
    for correction, items, by_temperature in zip(CORRECTIONS, lists, values, strict=True):
        report = summarize_items(items, targets, item_counts, [k])
        ndcg = report.metrics[f"ndcg@{k}"]
        error = report.standard_errors[f"ndcg@{k}"] if len(rows) > 1 else 0.0
        recall, coverage = report.metrics[f"recall@{k}"], report.metrics[f"coverage@{k}"]
        for temperature, logs in zip(TEMPERATURES, by_temperature, strict=True):
            mean = float(logs[reached].mean())
            settings.append(Setting(temperature, correction, mean, ndcg, error, recall, coverage))
    unreachable = int((~reached).sum())
    return Tuning(settings, choose(settings), k, len(rows), unreachable, exclude_history)


def _log_likelihoods(logits: Tensor, targets: Tensor) -> Tensor:
    """Return the log-probability of the targets at each temperature: `(temperatures, B)`."""
    logs = [(logits / temperature).log_softmax(-1) for temperature in TEMPERATURES]
    return torch.stack([values.gather(1, targets[:, None]).squeeze(1) for values in logs])
