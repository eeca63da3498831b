"""Which metric chooses checkpoints, stops early and lowers the learning rate, where the user names none."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from transformers import EarlyStoppingCallback, SchedulerType, TrainerCallback, TrainingArguments

from gflowtrl.metrics import primary_cutoff


logger = logging.getLogger(__name__)
# Of all that `metrics.summarize` knows, what a training log can hold and stay readable.
LOGGED_METRICS = ("recall", "ndcg", "coverage", "entropy", "gini", "long_tail")
DIRECTIONS = {"recall": True, "ndcg": True, "gini": False}  # whether more is better
FOLLOWING = ("reduce_lr_on_plateau", "greedy")  # the schedulers that look at a metric


def metric_names(ks: Sequence[int], datasets: Iterable[str] = ()) -> list[str]:
    """What `evaluate()` reports: `eval_ndcg@10`, ...; of several data sets `eval_<name>_ndcg@10`, ..."""
    prefixes = [f"eval_{name}_" for name in datasets] or ["eval_"]
    return [f"{prefix}{metric}@{k}" for prefix in prefixes for metric in LOGGED_METRICS for k in ks]


def is_wanted(args: TrainingArguments) -> bool:
    """Whether something follows a metric."""
    return (
        bool(args.load_best_model_at_end)
        or str(getattr(args.save_strategy, "value", args.save_strategy)) == "best"
        or _scheduled(args)
    )


def fill_in_metric(args: TrainingArguments, ks: Sequence[int]) -> None:
    """Before `transformers` fills in a loss that is not evaluated: the NDCG, and the direction of a named metric."""
    if args.metric_for_best_model is None and is_wanted(args):
        args.metric_for_best_model = _default(ks)
    if args.metric_for_best_model is not None and args.greater_is_better is None:
        args.greater_is_better = more_is_better(args.metric_for_best_model) is not False


def check_metric(args: TrainingArguments, ks: Sequence[int]) -> None:
    """What a configuration can know of its metric; gives a scheduler that follows it its direction, in place.

    The trainer checks the name: a subclass may report metrics of its own.

    Raises:
        ValueError: a loss, which is not evaluated, or a direction that contradicts the metric.
    """
    if args.metric_for_best_model is None:
        return
    if args.metric_for_best_model in ("loss", "eval_loss"):
        _refuse(args.metric_for_best_model, metric_names(ks))
    _check_direction(args)


def settle_metric(
    args: TrainingArguments,
    ks: Sequence[int],
    eval_dataset: object = None,
    callbacks: Iterable[TrainerCallback | type[TrainerCallback]] = (),
    reports_more: bool = False,
) -> None:
    """Fill in `metric_for_best_model`, its direction and that of a scheduler which follows it, in place.

    Where none is named it is the NDCG at the primary cut-off, of the first data set where there are several.

    Args:
        args: of any trainer with `RankingEvaluationMixin`; "loss" counts as none, since `transformers` puts it there
            and no loss is evaluated.
        ks: cut-offs of the evaluation.
        eval_dataset: the trainer's; of a mapping the names are part of the metrics' names.
        callbacks: the user's; one may stop early.
        reports_more: the trainer reports further metrics, so that any name will do.

    Raises:
        ValueError: a metric that `evaluate()` will not report, or a direction that contradicts it.
    """
    datasets = list(eval_dataset) if isinstance(eval_dataset, Mapping) else []
    named = args.metric_for_best_model
    if named is None and not is_wanted(args) and not any(map(_is_early_stopping, callbacks)):
        return
    if named in (None, "loss", _default(ks)):
        args.metric_for_best_model = _default(ks, datasets)
        if named != _default(ks):
            args.greater_is_better = True
        if len(datasets) > 1:
            logger.warning(
                f"There are {len(datasets)} evaluation data sets, and metric_for_best_model does not say which one "
                f"counts: it is {args.metric_for_best_model}."
            )
    name, known = str(args.metric_for_best_model), metric_names(ks, datasets)
    if name not in known and f"eval_{name}" not in known and not reports_more:
        _refuse(name, known)
    _check_direction(args)


def _default(ks: Sequence[int], datasets: Sequence[str] = ()) -> str:
    prefix = f"eval_{datasets[0]}_" if datasets else "eval_"
    return f"{prefix}ndcg@{primary_cutoff(ks)}"


def _refuse(name: str, known: Sequence[str]) -> None:
    raise ValueError(
        f"metric_for_best_model is {name!r}, which evaluate() does not report; choose from {', '.join(known)}. "
        f"The cut-offs are eval_ks."
    )


def more_is_better(name: str) -> bool | None:
    """Whether more of a metric is better; None where that is a matter of taste."""
    stem = name.rpartition("@")[0]
    return next((rises for metric, rises in DIRECTIONS.items() if stem.endswith(metric)), None)


def _check_direction(args: TrainingArguments) -> None:
    name, greater = str(args.metric_for_best_model), bool(args.greater_is_better)
    if more_is_better(name) not in (None, greater):
        raise ValueError(
            f"greater_is_better is {greater}, but metric_for_best_model is {name!r}, of which "
            f"{'less' if greater else 'more'} is better. Set greater_is_better to {not greater}."
        )
    if not _scheduled(args):
        return
    options: Any = args.lr_scheduler_kwargs or {}
    mode, given = "max" if greater else "min", dict(options)
    if given.setdefault("mode", mode) != mode:
        raise ValueError(
            f"lr_scheduler_kwargs has mode {given['mode']!r}, but greater_is_better is {greater} for {name!r}: the "
            f"learning rate would fall while the model gets better. Leave mode out."
        )
    args.lr_scheduler_kwargs = given


def _scheduled(args: TrainingArguments) -> bool:
    return SchedulerType(args.lr_scheduler_type).value in FOLLOWING


def _is_early_stopping(callback: TrainerCallback | type[TrainerCallback]) -> bool:
    return isinstance(callback, EarlyStoppingCallback) or callback is EarlyStoppingCallback
