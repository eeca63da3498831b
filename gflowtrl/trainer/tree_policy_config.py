"""`TreePolicyConfig`: the common configuration of all gflowtrl trainers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar

import torch

from gflowtrl.checks import COUNT, POSITIVE, SHARE, Bound, check_choice, check_number, check_storable
from gflowtrl.compat import TRLConfig
from gflowtrl.losses import LOSSES, LossSpec, get_loss

from .arguments import check_training_arguments
from .best_metric import check_metric, fill_in_metric
from .processes import check_processes


def computes_in_bf16(use_cpu: bool) -> bool:
    """Return whether training uses bf16 mixed precision by default."""
    return not use_cpu and torch.cuda.is_available() and torch.cuda.is_bf16_supported()


def listed(value: Any) -> list:
    """Return a YAML or command-line value as a list: `vargrad`, `[vargrad, sft]` and `vargrad,sft` all work."""
    if isinstance(value, str):
        return [part.strip() for part in value.split(",")]
    return list(value) if isinstance(value, list | tuple) else [value]


def option(default: Any, help: str, choices: Sequence[str] | None = None) -> Any:
    """Create a configuration field with its help text for the command line."""
    metadata = {"help": help} | ({} if choices is None else {"choices": list(choices)})
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass
class TreePolicyConfig(TRLConfig):
    r"""
    Configuration of [`TreePolicyTrainer`]: `transformers.TrainingArguments` and the following fields.

    `per_device_train_batch_size` counts **prompts**. Each prompt has `num_generations` trajectories, which are never
    split across processes.

    Parameters:
        > Parameters that control trajectories

        num_generations (`int`, *optional*, defaults to `8`):
            K, trajectories per prompt, including the observed target (N in GFlowGR, arXiv 2506.16114).
        temperature (`float`, *optional*, defaults to `1.0`):
            Divides the logits when trajectories are drawn on policy. It changes the exploration, not the target.
        epsilon (`float`, *optional*, defaults to `0.0`):
            Probability of a uniform child at each step of an on-policy draw.

        > Parameters that control the loss

        loss_type (`str` or `list[str]`, *optional*, defaults to `["sft"]`):
            One or more of the losses of `gflowtrl.losses`, including those added by `register_loss`.
        loss_weights (`list[float]`, *optional*):
            A weight for each loss of `loss_type`. By default all weights are 1.
        loss_kwargs (`dict[str, dict]` or `str`, *optional*):
            Options of the losses, under the names of the losses: `{"vargrad": {"huber_delta": 1.0}}`. The options of a
            loss are the parameters of its function that have a default. They are checked when the configuration is
            created. Use JSON on the command line.
        loss_reduction (`str`, *optional*, defaults to `"mean"`):
            How the trajectories of a prompt are reduced: `"mean"`, or `"sum"` as in GFlowGR. Prompts are averaged.
        log_z_learning_rate (`float`, *optional*, defaults to `1e-2`):
            Learning rate of the flow head (log F of every state, log Z of the root), used by `trajectory_balance`,
            `detailed_balance`, `subtrajectory_balance` and `flowrl`. 10 to 100 times the policy's learning rate works
            well (Malkin et al., arXiv 2201.13259). It also applies to the head's group in a custom optimizer.
        label_space (`str`, *optional*, defaults to `"tree"`):
            Label space of the losses on the target (`sft`, `prefix_*`, `sdpo` and its reference): `"tree"` for
            probabilities over the children, as in decoding, or `"vocabulary"` for the whole vocabulary, as in TRL and
            APAO. All other losses always use the tree.

        > Parameters that control adapters

        train_item_tokens (`bool`, *optional*, defaults to `True`):
            With `peft_config`, also train the embeddings of the catalog's tokens, at input and output (PEFT's
            `trainable_token_indices`). Ignored if `peft_config` names the embeddings itself.

        > Parameters that control data and evaluation

        max_history_items (`int`, *optional*):
            Maximum number of history items in a prompt; the last ones are used. In training, a longer sequence is cut
            into windows in which a target sees at least half as many (`gflowtrl.data.user_windows`). Default: the
            value of `model`'s folder or of the given `prompt_encoder`, else 20. A value overrides that of the folder
            and must equal that of a given encoder.
        eval_num_beams (`int`, *optional*, defaults to `20`):
            Width of the constrained beam search of `evaluate()`.
        eval_ks (`list[int]`, *optional*, defaults to `[5, 10, 20]`):
            Cutoffs of the evaluation's lists.
        log_completions (`bool`, *optional*, defaults to `False`):
            Print a group of trajectories with its rewards at every logging step.
        model_init_kwargs (`dict` or `str`, *optional*):
            Keyword arguments of `from_pretrained` if the model is given by name, also for rewards that are given by
            name.

        > Defaults that differ from `TrainingArguments`: learning rate 5e-4, `logging_steps=10`, bf16 only on a device
        > that supports it, `train_sampling_strategy="group_by_length"`, `remove_unused_columns=False`,
        > `logging_nan_inf_filter=False`; `metric_for_best_model` is `"eval_ndcg@10"` (or at the largest of `eval_ks`).
        > Unlike in TRL, `gradient_checkpointing` is off.
    """

    # Parameters that control trajectories
    num_generations: int = option(8, "Trajectories per prompt (K), including the target.")
    temperature: float = option(1.0, "Temperature of on-policy draws.")
    epsilon: float = option(0.0, "Probability of a uniform step in on-policy draws.")

    # Parameters that control the loss
    loss_type: list[str] = option(["sft"], "One or more losses of gflowtrl.losses.")
    loss_weights: list[float] | None = option(None, "A weight for each loss of `loss_type`.")
    loss_kwargs: dict[str, Any] | str | None = option(
        None, 'Options of the losses, under their names: {"vargrad": {"huber_delta": 1.0}}.'
    )
    loss_reduction: str = option("mean", "Reduction over a prompt's trajectories.", ["mean", "sum"])
    log_z_learning_rate: float = option(1e-2, "Learning rate of the flow head.")
    label_space: str = option("tree", "Label space of the losses on the target.", ["tree", "vocabulary"])

    # Parameters that control adapters
    train_item_tokens: bool = option(True, "With adapters, also train the embeddings of the items' tokens.")

    # Parameters that control data and evaluation
    max_history_items: int | None = option(
        None, "Maximum number of history items in a prompt. Default: the value of the model's folder, or 20."
    )
    eval_num_beams: int = option(20, "Beam width of evaluate().")
    eval_ks: list[int] = option([5, 10, 20], "Cutoffs of evaluate().")
    log_completions: bool = option(False, "Print a group of trajectories when logging.")
    model_init_kwargs: dict[str, Any] | str | None = option(
        None, "Keyword arguments of from_pretrained if the model is given by name."
    )

    # Defaults that differ from TrainingArguments
    learning_rate: float = option(5e-4, "The initial learning rate of the policy.")
    gradient_checkpointing: bool | None = option(None, "Trade compute for memory. Off by default, unlike in TRL.")
    bf16: bool | None = option(None, "bfloat16 mixed precision. On by default if the device supports it.")
    train_sampling_strategy: str = option(
        "group_by_length",
        "Order of the training rows. group_by_length: rows of a window together, windows of similar length per batch.",
        ["group_by_length", "random", "sequential", "batch_rebalance"],
    )
    remove_unused_columns: bool = option(False, "Must be False: rewards use all columns.")
    logging_nan_inf_filter: bool = option(False, "Must be False: a loss that is not finite stops the training.")

    _equal_weights = False  # whether loss_weights was filled in
    _VALID_DICT_FIELDS = TRLConfig._VALID_DICT_FIELDS + ["model_init_kwargs", "loss_kwargs"]
    _bounds: ClassVar[dict[str, Bound]] = {
        "num_generations": COUNT,
        "temperature": POSITIVE,
        "epsilon": SHARE,
        "max_history_items": COUNT,
        "log_z_learning_rate": POSITIVE,
    }

    def __post_init__(self):
        if self.bf16 is None:
            self.bf16 = not self.fp16 and computes_in_bf16(self.use_cpu)
        if not torch.cuda.is_available():
            self.dataloader_pin_memory = False  # pinning without a device only gives a warning
        self._check_unused()
        check_storable(self)
        self.eval_ks = [int(k) for k in listed(self.eval_ks)]
        if self.eval_ks:
            fill_in_metric(self, self.eval_ks)
        super().__post_init__()
        check_processes()
        check_training_arguments(self)
        self.check()

    def check(self) -> None:
        """Check the fields of this library, and convert text of the command line. A search repeats it for its trials.

        Raises:
            ValueError, TypeError: a value is invalid or contradicts another one.
        """
        self.loss_type = [str(name) for name in listed(self.loss_type)]
        if self.loss_weights is not None:
            self.loss_weights = [float(weight) for weight in listed(self.loss_weights)]
        check_storable(self)  # again, for values that were text or JSON
        self._check_values()
        check_metric(self, self.eval_ks)
        self._check_losses()
        self._check_loss_kwargs()

    @property
    def losses(self) -> dict[str, LossSpec]:
        """The losses of `loss_type`."""
        return {name: get_loss(name) for name in self.loss_type}

    @property
    def weight_of(self) -> dict[str, float]:
        """The weight of each loss."""
        return dict(zip(self.loss_type, self.loss_weights or [], strict=True))

    def loss_options(self, name: str) -> dict[str, Any]:
        """Return the options that are set for a loss."""
        return dict(self.loss_kwargs.get(name, {})) if isinstance(self.loss_kwargs, dict) else {}

    @property
    def policy_temperature(self) -> float | None:
        """The temperature of the policy's logits, if a loss sets one."""
        options = [self.loss_options(name) for name, loss in self.losses.items() if loss.sets_temperature]
        return next((float(each["temperature"]) for each in options if each.get("temperature") is not None), None)

    def _check_unused(self) -> None:
        """Raise an error for arguments of the Trainer that these trainers do not support."""
        for name, needed, reason in (
            ("batch_eval_metrics", False, "breadth is a property of all lists"),
            ("eval_do_concat_batches", True, "metrics are computed from all lists together"),
            ("remove_unused_columns", False, "histories and targets would be removed"),
            ("logging_nan_inf_filter", False, "0.0 would be logged instead of NaN"),
            ("label_smoothing_factor", 0, "labels are smoothed by loss_kwargs={'sft': {'label_smoothing': 0.1}}"),
        ):
            if getattr(self, name) != needed:
                raise ValueError(f"{name} is {getattr(self, name)}, but {reason}. Leave it at {needed}.")
        if "inputs" in self.include_for_metrics:
            raise ValueError(
                "include_for_metrics contains 'inputs', but metrics are computed from lists and targets. Leave it out."
            )

    def _check_losses(self) -> None:
        if not self.loss_type:
            raise ValueError("loss_type is empty; name at least one loss, for example ['vargrad'].")
        if self.loss_weights is None or (self._equal_weights and len(self.loss_weights) != len(self.loss_type)):
            self._equal_weights = True  # so that a trial may change loss_type alone
            self.loss_weights = [1.0] * len(self.loss_type)
        if len(self.loss_weights) != len(self.loss_type):
            raise ValueError(
                f"loss_weights has {len(self.loss_weights)} entries, but loss_type has {len(self.loss_type)} "
                f"({', '.join(self.loss_type)}). Give one weight per loss."
            )
        if not any(self.loss_weights):
            raise ValueError(f"loss_weights is {self.loss_weights}; at least one weight must not be 0.")
        if len(self.losses) < len(self.loss_type):
            raise ValueError(f"loss_type {self.loss_type} names a loss twice; name it once, with the total weight.")
        for name, loss in self.losses.items():
            if self.num_generations < loss.min_generations:
                raise ValueError(
                    f"num_generations is {self.num_generations}, but the loss {name!r} needs at least "
                    f"{loss.min_generations} trajectories per prompt. Raise num_generations or choose another "
                    f"loss_type."
                )
        if self.label_space == "vocabulary" and not any(loss.any_label_space for loss in self.losses.values()):
            supported = ", ".join(name for name, loss in LOSSES.items() if loss.any_label_space)
            raise ValueError(
                f"label_space is 'vocabulary', but the losses {self.loss_type} always use the tree; the losses that "
                f"can use the vocabulary are {supported}. Leave it out."
            )

    def _check_loss_kwargs(self) -> None:
        example = "{'vargrad': {'huber_delta': 1.0}}"
        if self.loss_kwargs is None:
            return
        if not isinstance(self.loss_kwargs, dict):
            raise TypeError(f"loss_kwargs is {self.loss_kwargs!r}; give options under loss names, like {example}.")
        self.loss_kwargs = dict(self.loss_kwargs)
        for name, options in self.loss_kwargs.items():
            if name not in self.loss_type:
                raise ValueError(
                    f"loss_kwargs has options for {name!r}, but loss_type is {self.loss_type}, so they have no "
                    f"effect. Leave them out or add the loss."
                )
            if not isinstance(options, dict):
                raise TypeError(f"loss_kwargs[{name!r}] is {options!r}; give options by name, like {example}.")
            try:
                self.loss_kwargs[name] = get_loss(name).check_options(options)
            except (TypeError, ValueError) as error:
                raise type(error)(f"loss_kwargs[{name!r}]: {error}") from None
        if self.label_space == "vocabulary" and self.loss_options("sft").get("label_smoothing"):
            raise ValueError(
                "loss_kwargs['sft']: label_smoothing spreads over the children of a state, but label_space is "
                "'vocabulary'. Leave one of them out."
            )

    def _check_values(self) -> None:
        """Check the choices and bounds of each field."""
        for entry in fields(self):
            if entry.name in TRLConfig.__dataclass_fields__:
                continue  # checked by transformers
            value, choices = getattr(self, entry.name), entry.metadata.get("choices")
            if choices is not None and not (value is None and entry.default is None):
                check_choice(entry.name, value, choices)
        for name, bound in self._bounds.items():
            if getattr(self, name) is not None:
                check_number(name, getattr(self, name), bound)
        if not self.eval_ks or min(self.eval_ks) < 1:
            raise ValueError(f"eval_ks is {self.eval_ks}; give list lengths of at least 1, for example [5, 10].")
        if self.eval_num_beams < max(self.eval_ks):
            raise ValueError(
                f"eval_num_beams is {self.eval_num_beams}, but eval_ks needs lists of {max(self.eval_ks)} items. "
                f"Raise eval_num_beams or lower eval_ks."
            )
