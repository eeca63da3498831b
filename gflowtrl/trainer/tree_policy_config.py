"""What the configurations of all gflowtrl trainers have in common."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar

import torch

from gflowtrl.checks import COUNT, POSITIVE, SHARE, Bound, check_choice, check_finite, check_number
from gflowtrl.compat import TRLConfig
from gflowtrl.losses import LOSSES, LossSpec, get_loss

from .arguments import check_training_arguments
from .best_metric import check_metric, fill_in_metric
from .processes import check_processes


def computes_in_bf16(use_cpu: bool) -> bool:
    """Whether training is in bf16 mixed precision where nobody says otherwise."""
    return not use_cpu and torch.cuda.is_available() and torch.cuda.is_bf16_supported()


def listed(value: Any) -> list:
    """A YAML or command line value as a list: `vargrad`, `[vargrad, sft]` and `vargrad,sft` all work."""
    if isinstance(value, str):
        return [part.strip() for part in value.split(",")]
    return list(value) if isinstance(value, list | tuple) else [value]


def option(default: Any, help: str, choices: Sequence[str] | None = None) -> Any:
    """A field of a configuration, with what the command line says about it."""
    metadata = {"help": help} | ({} if choices is None else {"choices": list(choices)})
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass
class TreePolicyConfig(TRLConfig):
    r"""
    Configuration of [`TreePolicyTrainer`], beside everything in `transformers.TrainingArguments`.

    `per_device_train_batch_size` counts **prompts**; each brings `num_generations` trajectories, which are never split
    across processes.

    Parameters:
        > Parameters that control trajectories

        num_generations (`int`, *optional*, defaults to `8`):
            K, trajectories per prompt, the observed target included (N in GFlowGR, arXiv 2506.16114).
        temperature (`float`, *optional*, defaults to `1.0`):
            Divides the logits while trajectories are drawn on policy. It changes what is explored, not the target.
        epsilon (`float`, *optional*, defaults to `0.0`):
            Probability of a uniform child at each step of an on-policy draw.

        > Parameters that control the loss

        loss_type (`str` or `list[str]`, *optional*, defaults to `["sft"]`):
            One or more of the losses that `gflowtrl.losses` knows, those of `register_loss` among them.
        loss_weights (`list[float]`, *optional*):
            A weight for each of `loss_type`; 1 each by default.
        loss_kwargs (`dict[str, dict]` or `str`, *optional*):
            Options of the losses, each under its loss's name: `{"vargrad": {"huber_delta": 1.0}}`. They are the
            parameters with a default of the loss function, and are checked when the configuration is made. On the
            command line as JSON.
        loss_reduction (`str`, *optional*, defaults to `"mean"`):
            How the trajectories of a prompt are reduced: `"mean"`, or `"sum"` as in GFlowGR. Prompts are averaged.
        log_z_learning_rate (`float`, *optional*, defaults to `1e-2`):
            Learning rate of the flow head (log F of every state, log Z of the root) of losses that need one:
            `trajectory_balance`, `detailed_balance` and `subtrajectory_balance`; 10 to 100 times the policy's works
            well (Malkin et al., arXiv 2201.13259). Also that of its group in an optimizer of your own.
        label_space (`str`, *optional*, defaults to `"tree"`):
            Of the losses on the target (`sft`, `prefix_*`, `sdpo`; its reference too): probabilities over the children
            in the tree, as in decoding, or over the whole `"vocabulary"`, as TRL and APAO have them. All other losses
            are always over the tree.

        > Parameters that control adapters

        train_item_tokens (`bool`, *optional*, defaults to `True`):
            Under `peft_config`, train the embeddings of the catalog's tokens too, at input and output (PEFT's
            `trainable_token_indices`). A `peft_config` that names the embeddings itself is followed instead.

        > Parameters that control data and evaluation

        max_history_items (`int`, *optional*):
            Items of the history that a prompt holds at most, the last ones. In training a longer sequence is cut into
            windows, in which a target sees at least half as many (`gflowtrl.data.user_windows`). By default what the
            folder of `model` or the given `prompt_encoder` says, 20 where there is neither. A value overrides the
            folder's, and must be the given encoder's.
        eval_num_beams (`int`, *optional*, defaults to `20`):
            Width of the constrained beam search of `evaluate()`.
        eval_ks (`list[int]`, *optional*, defaults to `[5, 10, 20]`):
            Cut-offs of the evaluation's lists.
        log_completions (`bool`, *optional*, defaults to `False`):
            Print a group of trajectories with its rewards at every logging step.
        model_init_kwargs (`dict` or `str`, *optional*):
            Keyword arguments of `from_pretrained` where the model is given by name.

        > Other defaults than `TrainingArguments`: learning rate 5e-4, gradient checkpointing off, bf16 only on a
        > device that has it, `train_sampling_strategy="group_by_length"`, `remove_unused_columns=False`,
        > `logging_nan_inf_filter=False`; `metric_for_best_model` is `"eval_ndcg@10"` (or at the largest of `eval_ks`).
    """

    # Parameters that control trajectories
    num_generations: int = option(8, "Trajectories per prompt (K), the target included.")
    temperature: float = option(1.0, "Temperature of on-policy draws.")
    epsilon: float = option(0.0, "Probability of a uniform step in on-policy draws.")

    # Parameters that control the loss
    loss_type: list[str] = option(["sft"], "One or more losses that gflowtrl.losses knows.")
    loss_weights: list[float] | None = option(None, "A weight for each of `loss_type`.")
    loss_kwargs: dict[str, Any] | str | None = option(
        None, 'Options under the names of their losses: {"vargrad": {"huber_delta": 1.0}}.'
    )
    loss_reduction: str = option("mean", "Reduction over a prompt's trajectories.", ["mean", "sum"])
    log_z_learning_rate: float = option(1e-2, "Learning rate of the flow head.")
    label_space: str = option("tree", "Probabilities of the losses on the target.", ["tree", "vocabulary"])

    # Parameters that control adapters
    train_item_tokens: bool = option(True, "Under adapters, train the embeddings of the items' tokens too.")

    # Parameters that control data and evaluation
    max_history_items: int | None = option(
        None, "Items of the history that a prompt holds; by default the model folder's, or 20."
    )
    eval_num_beams: int = option(20, "Beam width of evaluate().")
    eval_ks: list[int] = option([5, 10, 20], "Cut-offs of evaluate().")
    log_completions: bool = option(False, "Print a group of trajectories when logging.")
    model_init_kwargs: dict[str, Any] | str | None = option(
        None, "Keyword arguments of from_pretrained where the model is given by name."
    )

    # Other defaults than TrainingArguments
    learning_rate: float = option(5e-4, "The initial learning rate of the policy.")
    gradient_checkpointing: bool | None = option(
        None, "Trade compute for memory; off unless asked for, unlike in TRL."
    )
    bf16: bool | None = option(None, "bfloat16 mixed precision; by default where the device has it.")
    train_sampling_strategy: str = option(
        "group_by_length",
        "Order of the training rows: windows together, those of like length in one batch, or plain random.",
        ["group_by_length", "random", "sequential", "batch_rebalance"],
    )
    remove_unused_columns: bool = option(False, "Must stay False: rewards see all columns.")
    logging_nan_inf_filter: bool = option(False, "Must stay False: a loss that is not finite ends the training.")

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
            self.dataloader_pin_memory = False  # pinning without a device only warns
        self._check_unused()
        check_finite(self)
        self.eval_ks = [int(k) for k in listed(self.eval_ks)]
        if self.eval_ks:
            fill_in_metric(self, self.eval_ks)
        super().__post_init__()
        check_processes()
        check_training_arguments(self)
        self.loss_type = [str(name) for name in listed(self.loss_type)]
        if self.loss_weights is not None:
            self.loss_weights = [float(weight) for weight in listed(self.loss_weights)]
        check_finite(self)  # also what was text or JSON
        self._check_values()
        check_metric(self, self.eval_ks)
        self._check_losses()
        self._check_loss_kwargs()

    @property
    def losses(self) -> dict[str, LossSpec]:
        """What `loss_type` names."""
        return {name: get_loss(name) for name in self.loss_type}

    @property
    def weight_of(self) -> dict[str, float]:
        """The weight of each loss."""
        return dict(zip(self.loss_type, self.loss_weights or [], strict=True))

    def loss_options(self, name: str) -> dict[str, Any]:
        """What is set of the options of one of the losses."""
        return dict(self.loss_kwargs.get(name, {})) if isinstance(self.loss_kwargs, dict) else {}

    @property
    def policy_temperature(self) -> float | None:
        """What a loss says that the policy's logits are divided by; None where none does."""
        set_by = [name for name, loss in self.losses.items() if loss.sets_temperature]
        found = [self.loss_options(name).get("temperature") for name in set_by]
        return next((float(temperature) for temperature in found if temperature is not None), None)

    def _check_unused(self) -> None:
        """Arguments of the Trainer that these trainers would stumble over, or not look at."""
        for name, needed, reason in (
            ("batch_eval_metrics", False, "breadth is a property of all lists"),
            ("eval_do_concat_batches", True, "metrics are of all lists together"),
            ("remove_unused_columns", False, "that would drop histories and targets"),
            ("logging_nan_inf_filter", False, "it would log 0.0 in the place of NaN"),
            ("label_smoothing_factor", 0, "no loss of gflowtrl smooths labels: it would change nothing"),
        ):
            if getattr(self, name) != needed:
                raise ValueError(f"{name} is {getattr(self, name)}, but {reason}; leave it at {needed}.")
        if "inputs" in self.include_for_metrics:
            raise ValueError("include_for_metrics names 'inputs', but metrics are of lists and targets; leave it out.")

    def _check_losses(self) -> None:
        if not self.loss_type:
            raise ValueError("loss_type is empty; name at least one loss, for example ['vargrad'].")
        if self.loss_weights is None:
            self.loss_weights = [1.0] * len(self.loss_type)
        if len(self.loss_weights) != len(self.loss_type):
            raise ValueError(
                f"loss_weights has {len(self.loss_weights)} entries and loss_type {len(self.loss_type)} "
                f"({', '.join(self.loss_type)}); give one weight for each loss."
            )
        if not any(self.loss_weights):
            raise ValueError(f"loss_weights is {self.loss_weights}; weights must not be all 0.")
        if len(self.losses) < len(self.loss_type):
            raise ValueError(f"loss_type {self.loss_type} names a loss twice; name it once, with its whole weight.")
        for name, loss in self.losses.items():
            if self.num_generations < loss.min_generations:
                raise ValueError(
                    f"num_generations is {self.num_generations}, but the loss {name!r} needs at least "
                    f"{loss.min_generations} trajectories per prompt. Raise num_generations or choose another "
                    f"loss_type."
                )
        if self.label_space == "vocabulary" and not any(loss.any_label_space for loss in self.losses.values()):
            able = ", ".join(name for name, loss in LOSSES.items() if loss.any_label_space)
            raise ValueError(
                f"label_space is 'vocabulary', but the losses {self.loss_type} are always over the tree; those that "
                f"can be over the vocabulary are {able}. Leave it out."
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
                    f"loss_kwargs has options for {name!r}, but loss_type is {self.loss_type}: they would change "
                    f"nothing. Leave them out or add the loss."
                )
            if not isinstance(options, dict):
                raise TypeError(f"loss_kwargs[{name!r}] is {options!r}; give options by name, like {example}.")
            try:
                self.loss_kwargs[name] = get_loss(name).check_options(options)
            except (TypeError, ValueError) as error:
                raise type(error)(f"loss_kwargs[{name!r}]: {error}") from None

    def _check_values(self) -> None:
        """Each field by itself: one of its choices, within its bounds."""
        for entry in fields(self):
            if entry.name in TRLConfig.__dataclass_fields__:
                continue  # transformers checks its own
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
                f"eval_num_beams is {self.eval_num_beams}, but eval_ks asks for lists of {max(self.eval_ks)}. "
                f"Raise eval_num_beams or shorten eval_ks."
            )
