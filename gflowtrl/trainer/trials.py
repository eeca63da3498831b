"""Trainers that make a new model for each training: `model_init` and the search for hyperparameters."""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import fields
from typing import Any

from torch import nn
from transformers import PreTrainedModel, set_seed

from .best_metric import searched_metric
from .checkpoints import TrainerBase


#: Fields that a trial cannot change: the prompts and the evaluation are made with the trainer, and the number of
#: checkpoints that are kept is read before the trial's values are set.
FIXED = {"max_history_items", "eval_num_beams", "eval_ks", "sync_ref_model", "output_dir", "save_total_limit"}


class TrialsMixin(TrainerBase):
    """Mixin: `model_init` makes the model of each `train()`, and everything that follows from it is new too.

    A trial of `hyperparameter_search` may set every field of the configuration except `FIXED`. The combination of the
    rewards, sampler, losses, reference, adapters and flow heads follow it.
    """

    _configured: dict[str, Any] | None = None  # fields of the configuration before the first trial
    _trial_values: dict[str, Any]

    def _build(self, model: str | PreTrainedModel) -> nn.Module:
        """Set up what depends on the model and the configuration, and return the model to train."""
        raise NotImplementedError

    def _first_model(self, model: str | PreTrainedModel | None, model_init: Callable | None, optimizers: Any) -> Any:
        """Return the constructor's model, or the first one of `model_init`.

        Raises:
            ValueError: both or none was given, or an optimizer of a model that will be replaced.
        """
        if (model is None) == (model_init is None):
            raise ValueError(f"{'Both' if model else 'None'} of model and model_init was given; give one of them.")
        if model_init is None:
            return model
        if optimizers != (None, None):
            raise ValueError(
                "optimizers was given, but model_init makes a new model for each training. Give "
                "optimizer_cls_and_kwargs, or set optim in the configuration."
            )
        return self._new_model()

    def _new_model(self, trial: Any = None) -> Any:
        """Return a model, its name or its folder from `model_init`; its random weights follow the seed."""
        set_seed(self.args.seed)
        return super().call_model_init(trial)

    def call_model_init(self, trial: Any = None) -> nn.Module:
        """Make a new model with new rewards, sampler, adapters and heads, by the trial's hyperparameters."""
        if trial is not None:
            self._apply(trial)
        return self._build(self._new_model(trial))

    def _apply(self, trial: Any) -> None:
        """Set the trial's values in the configuration, without those of earlier trials, and check it.

        Raises:
            ValueError: the configuration has no such field, a value is invalid, or the field is fixed.
        """
        args: Any = self.args
        if self._configured is None:
            self._configured = {entry.name: getattr(args, entry.name) for entry in fields(args)}
        vars(args).update(self._configured)
        values = self.hp_space(trial) if self.hp_search_backend == "optuna" else dict(trial)
        values.pop("wandb", None)
        for name, value in values.items():
            if not hasattr(args, name):
                raise ValueError(f"hp_space sets {name!r}, which is not a field of {type(args).__name__}.")
            if name in FIXED:
                raise ValueError(f"hp_space sets {name!r}, which is fixed when the trainer is made. Leave it out.")
            setattr(args, name, value)
        args.check()
        self._trial_values = {name: getattr(args, name) for name in values}

    def _hp_search_setup(self, trial: Any) -> None:
        """Set up a trial as the Trainer does, which sets the values again: those that are checked."""
        if trial is None or self.hp_search_backend != "optuna":
            super()._hp_search_setup(trial)
            return
        space, values = self.hp_space, self._trial_values
        self.hp_space = lambda _: dict(values)
        try:
            super()._hp_search_setup(trial)
        finally:
            self.hp_space = space

    def hyperparameter_search(
        self,
        hp_space: Callable | None = None,
        compute_objective: Callable[[dict[str, float]], float] | None = None,
        n_trials: int = 20,
        direction: str | list[str] | None = None,
        **options: Any,
    ):
        """Train `n_trials` models and return the best one's hyperparameters, as in `transformers.Trainer`.

        Args:
            hp_space: function from a trial to values of the configuration. Default: that of transformers (learning
                rate, epochs, seed, batch size).
            compute_objective: function from the metrics of `evaluate()` to the objective. Default:
                `metric_for_best_model`, which is the NDCG if it is not set.
            n_trials: number of trainings.
            direction: `"minimize"` or `"maximize"`. Default: that of `metric_for_best_model`; for an objective of
                your own `"maximize"`.
            **options: as in `transformers.Trainer` (`backend`, `hp_name`, and those of the backend).

        Raises:
            RuntimeError: the trainer has no `model_init`, or no backend is installed (`pip install
                gflowtrl[tuning]`).
        """
        if self.eval_dataset is None:
            raise ValueError("A search compares models by their evaluation; give the trainer an eval_dataset.")
        args: Any = self.args
        metric, greater = searched_metric(args, args.eval_ks, self.eval_dataset)
        if compute_objective is None:
            compute_objective = operator.itemgetter(metric)
            direction = ("maximize" if greater else "minimize") if direction is None else direction
        direction = "maximize" if direction is None else direction
        return super().hyperparameter_search(hp_space, compute_objective, n_trials, direction, **options)
