"""Default and checks of `metric_for_best_model`, used for best checkpoints, early stopping and schedulers."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from datasets import Dataset
from transformers import EarlyStoppingCallback, TrainerCallback, TrainingArguments

from gflowtrl.data import has_exposed_rows
from gflowtrl.metrics import primary_cutoff


logger = logging.getLogger(__name__)
# The subset of the metrics of `metrics.summarize` that keeps a training log readable.
LOGGED_METRICS = ("recall", "ndcg", "coverage", "entropy", "gini", "long_tail")
GREATER_IS_BETTER = {"recall": True, "ndcg": True, "gini": False}
METRIC_SCHEDULERS = ("reduce_lr_on_plateau", "greedy")  # the schedulers that depend on a metric


def metric_names(ks: Sequence[int], datasets: Iterable[str] = ()) -> list[str]:
    """Return the metrics of `evaluate()`: `eval_ndcg@10`, ...; for several datasets `eval_<name>_ndcg@10`, ..."""
    prefixes = [f"eval_{name}_" for name in datasets] or ["eval_"]
    return [f"{prefix}{metric}@{k}" for prefix in prefixes for metric in LOGGED_METRICS for k in ks]


def uses_metric(args: TrainingArguments) -> bool:
    """Return whether checkpoints or the learning rate depend on a metric."""
    scheduled = args.lr_scheduler_type in METRIC_SCHEDULERS
    return bool(args.load_best_model_at_end) or args.save_strategy == "best" or scheduled


def fill_in_metric(args: TrainingArguments, ks: Sequence[int]) -> None:
    """Set the default metric (NDCG) and the direction, before `transformers` sets a loss that is not evaluated."""
    if args.metric_for_best_model is None and uses_metric(args):
        args.metric_for_best_model = _default(ks)
    if args.metric_for_best_model is not None and args.greater_is_better is None:
        args.greater_is_better = more_is_better(args.metric_for_best_model) is not False


def check_metric(args: TrainingArguments, ks: Sequence[int]) -> None:
    """Check the metric of a configuration, and set the direction of a scheduler that depends on it, in place.

    The trainer checks the name later, because a subclass may report other metrics.

    Raises:
        ValueError: the metric is a loss, which is not evaluated, or the direction contradicts the metric.
    """
    if args.metric_for_best_model in ("loss", "eval_loss"):
        raise _unknown_metric(args.metric_for_best_model, metric_names(ks))
    if args.metric_for_best_model is not None:
        _check_direction(args)


def resolve_metric(
    args: TrainingArguments,
    ks: Sequence[int],
    eval_dataset: object = None,
    callbacks: Iterable[TrainerCallback | type[TrainerCallback]] = (),
    reports_more: bool = False,
    adds_metrics: bool = False,
) -> None:
    """Set `metric_for_best_model`, its direction and that of a scheduler that depends on it, in place.

    The default is the NDCG at the primary cutoff, of the first dataset if there are several.

    Args:
        args: arguments of any trainer with `RankingEvaluationMixin`. "loss" counts as unset, because `transformers`
            sets it and no loss is evaluated.
        ks: cutoffs of the evaluation.
        eval_dataset: the trainer's evaluation data; the names in a mapping are part of the metrics' names. Exposed
            items choose no model.
        callbacks: the trainer's callbacks; early stopping needs a metric.
        reports_more: the trainer reports other metrics too, so every name is valid.
        adds_metrics: `compute_metrics` adds metrics, so every name that begins with the dataset's is valid.

    Raises:
        ValueError: `evaluate()` does not report the metric, the direction contradicts it, or all evaluation data are
            exposed items.
    """
    datasets, given, exposed = [], [eval_dataset], []
    if isinstance(eval_dataset, Mapping):
        exposed = [name for name, rows in eval_dataset.items() if _are_exposed(rows)]
        given = [rows for rows in eval_dataset.values() if not _are_exposed(rows)]
        datasets = [name for name, rows in eval_dataset.items() if not _are_exposed(rows)]
    configured = args.metric_for_best_model
    stops_early = any(each is EarlyStoppingCallback or isinstance(each, EarlyStoppingCallback) for each in callbacks)
    if configured is None and not uses_metric(args) and not stops_early:
        return
    if not given or _are_exposed(given[0]):
        raise _exposed_chooses()
    if configured in (None, "loss", _default(ks)):
        args.metric_for_best_model = _default(ks, datasets)
        if configured != _default(ks):
            args.greater_is_better = True
        if len(datasets) > 1:
            logger.warning(
                f"There are {len(datasets)} evaluation datasets, and metric_for_best_model does not name one of them. "
                f"{args.metric_for_best_model} is used."
            )
    for hidden in exposed:
        if str(args.metric_for_best_model).removeprefix("eval_").startswith(f"{hidden}_"):
            raise _exposed_chooses()
    name, known = str(args.metric_for_best_model), metric_names(ks, datasets)
    if not reports_more and f"eval_{name.removeprefix('eval_')}" not in known:
        if not adds_metrics:
            raise _unknown_metric(name, known)
        if datasets and not any(name.removeprefix("eval_").startswith(f"{dataset}_") for dataset in datasets):
            raise _without_dataset(name, datasets)
    _check_direction(args)


def searched_metric(args: TrainingArguments, ks: Sequence[int], eval_dataset: object) -> tuple[str, bool]:
    """Return the metric that a search for hyperparameters improves, and whether larger values are better.

    It is `metric_for_best_model`, by default the NDCG of the first evaluation rows that are not of exposed items.
    """
    if args.metric_for_best_model not in (None, "loss"):
        return f"eval_{args.metric_for_best_model.removeprefix('eval_')}", bool(args.greater_is_better)
    parts = eval_dataset if isinstance(eval_dataset, Mapping) else {"": eval_dataset}
    names = [name for name, rows in parts.items() if not _are_exposed(rows)]
    if not names:
        raise _exposed_chooses()
    return _default(ks, names if isinstance(eval_dataset, Mapping) else ()), True


def _exposed_chooses() -> ValueError:
    return ValueError(
        "The best model must not be chosen by exposed items, which are the truth that the evaluation measures on. "
        "Give validation rows too, and choose by them: eval_dataset={'validation': ..., 'exposed': ...}."
    )


def _are_exposed(rows: object) -> bool:
    return isinstance(rows, Dataset) and has_exposed_rows(rows)


def _default(ks: Sequence[int], datasets: Sequence[str] = ()) -> str:
    prefix = f"eval_{datasets[0]}_" if datasets else "eval_"
    return f"{prefix}ndcg@{primary_cutoff(ks)}"


def _unknown_metric(name: str, known: Sequence[str]) -> ValueError:
    return ValueError(
        f"metric_for_best_model is {name!r}, which evaluate() does not report; choose from {', '.join(known)}. "
        f"The cutoffs are set by eval_ks."
    )


def _without_dataset(name: str, datasets: Sequence[str]) -> ValueError:
    choices = [f"eval_{dataset}_{name.removeprefix('eval_')}" for dataset in datasets]
    return ValueError(
        f"metric_for_best_model is {name!r}, but eval_dataset is a dictionary, and the name of a metric begins with "
        f"that of its dataset; choose from {', '.join(choices)}."
    )


def more_is_better(name: str) -> bool | None:
    """Return whether a larger value of a metric is better; None if that depends on the application."""
    stem = name.rpartition("@")[0]
    return next((greater for metric, greater in GREATER_IS_BETTER.items() if stem.endswith(metric)), None)


def _check_direction(args: TrainingArguments) -> None:
    name, greater = str(args.metric_for_best_model), bool(args.greater_is_better)
    if more_is_better(name) not in (None, greater):
        raise ValueError(
            f"greater_is_better is {greater}, but {'lower' if greater else 'higher'} values of metric_for_best_model "
            f"{name!r} are better. Set greater_is_better to {not greater}."
        )
    if args.lr_scheduler_type not in METRIC_SCHEDULERS:
        return
    mode, kwargs = "max" if greater else "min", args.lr_scheduler_kwargs
    options: dict[str, Any] = {"mode": mode} | (kwargs if isinstance(kwargs, dict) else {})
    if options["mode"] != mode:
        raise ValueError(
            f"lr_scheduler_kwargs has mode {options['mode']!r}, but greater_is_better is {greater} for {name!r}: the "
            f"learning rate would fall while the model improves. Leave mode out."
        )
    args.lr_scheduler_kwargs = options
