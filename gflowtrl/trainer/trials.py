"""Trainers that make a new model for each training: `model_init` and the search for hyperparameters."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from .best_metric import searched_metric
from .checkpoints import TrainerBase


class TrialsMixin(TrainerBase):
    """Mixin: `model_init` makes the model of each `train()`, and everything that follows from it is new too.

    A trial of `hyperparameter_search` may set every field of the configuration. Rewards, sampler, losses, reference,
    adapters and flow heads follow it.
    """

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
        return super().call_model_init()

    def call_model_init(self, trial: Any = None) -> nn.Module:
        """Make a new model with new rewards, sampler, adapters and heads, by the trial's hyperparameters."""
        if trial is not None:
            self._apply(trial)
        made: Any = super().call_model_init(trial)  # a model, its name or its folder
        return self._build(made)

    def _apply(self, trial: Any) -> None:
        """Set the trial's values in the configuration, and check it.

        Raises:
            ValueError: the configuration has no such field, or a value is invalid.
        """
        values = self.hp_space(trial) if self.hp_search_backend == "optuna" else dict(trial)
        values.pop("wandb", None)
        for name, value in values.items():
            if not hasattr(self.args, name):
                raise ValueError(f"hp_space sets {name!r}, which is not a field of {type(self.args).__name__}.")
            setattr(self.args, name, value)
        args: Any = self.args
        args.check()

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
        args: Any = self.args
        metric, greater = searched_metric(args, args.eval_ks, self.eval_dataset)
        if compute_objective is None:
            compute_objective = operator.itemgetter(metric)
            direction = ("maximize" if greater else "minimize") if direction is None else direction
        direction = "maximize" if direction is None else direction
        return super().hyperparameter_search(hp_space, compute_objective, n_trials, direction, **options)
