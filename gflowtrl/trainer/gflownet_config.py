"""Configuration of `GFlowNetTrainer`."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from gflowtrl.losses import get_loss

from .base import BaseConfig
from .prefixes import VARIANTS


def _listed(value: Any) -> list:
    """A YAML or command line value as a list: `vargrad`, `[vargrad, sft]` and `vargrad,sft` all work."""
    if isinstance(value, str):
        return [part.strip() for part in value.split(",")]
    return list(value) if isinstance(value, list | tuple) else [value]


@dataclass
class GFlowNetConfig(BaseConfig):
    r"""
    Configuration of [`GFlowNetTrainer`], beside everything in `transformers.TrainingArguments`.

    `per_device_train_batch_size` counts **prompts**; each brings `num_generations` trajectories, which are never split
    across processes.

    Parameters:
        > Parameters that control trajectories

        num_generations (`int`, *optional*, defaults to `8`):
            K, trajectories a prompt, the observed target included (N in GFlowGR, arXiv 2506.16114).
        temperature (`float`, *optional*, defaults to `1.0`):
            Divides the logits while trajectories are drawn on policy. It changes what is explored, not the target.
        epsilon (`float`, *optional*, defaults to `0.0`):
            Probability of a uniform child at each step of an on-policy draw.

        > Parameters that control the loss

        loss_type (`str` or `list[str]`, *optional*, defaults to `["vargrad"]`):
            One or more of `vargrad`, `contrastive_balance`, `trajectory_balance`, `detailed_balance`,
            `subtrajectory_balance`, `exact_flow`, `sft`, `prefix_pointwise`, `prefix_pairwise` (APAO's, arXiv
            2603.02730), and for comparison `msl`, `sdpo`, `grpo`. GFlowGR's full loss is
            `["sft", "trajectory_balance"]` (or `"detailed_balance"`) with `loss_weights=[1.0, lambda]`.
        loss_weights (`list[float]`, *optional*):
            A weight for each of `loss_type`; 1 each by default.
        loss_reduction (`str`, *optional*, defaults to `"mean"`):
            How the trajectories of a prompt are reduced: `"mean"`, or `"sum"` as in the paper. Prompts are averaged.
        huber_delta (`float`, *optional*):
            Huber instead of squared residuals, linear beyond this residual. Keeps the fixed point. Of `vargrad`,
            `trajectory_balance`, `detailed_balance` and `subtrajectory_balance`.
        contrastive_delta (`float`, *optional*, defaults to `1.0`):
            The same for `contrastive_balance`, whose residuals are differences of pairs; `None` squares all of them.
        subtb_lambda (`float`, *optional*, defaults to `0.9`):
            lambda of `subtrajectory_balance`: a sub-path of n tokens weighs lambda^n (Madan et al., arXiv 2209.12782).
        log_z_learning_rate (`float`, *optional*, defaults to `1e-2`):
            Learning rate of the flow head (log F of every state, log Z of the root) of `trajectory_balance`,
            `detailed_balance` and `subtrajectory_balance`; 10 to 100 times the policy's works well (Malkin et al.,
            arXiv 2201.13259).
        label_space (`str`, *optional*, defaults to `"tree"`):
            Of the losses on the target (`sft`, `prefix_*`): probabilities over the children in the tree, as in
            decoding, or over the whole `"vocabulary"`, as TRL and APAO have them. Balance is always over the tree.
        sft_reduction (`str`, *optional*, defaults to `"sum"`):
            `sft` as the sum over an id's tokens, or their `"mean"`.
        prefix_eta (`float`, *optional*, defaults to `1e-4`):
            eta of APAO: how fast the weights of prefixes follow their losses.
        prefix_variant (`str`, *optional*, defaults to `"paper"`):
            `"paper"`, or as the authors' releases of `"2025"` and `"kdd"` do it ([`trainer.prefixes.PrefixWeights`]).
        msl_temperature (`float`, *optional*, defaults to `1.0`):
            Temperature of `msl`, cross entropy over the legal tokens.
        sdpo_beta (`float`, *optional*, defaults to `1.0`):
            beta of `sdpo`, the target against the group's other items relative to the reference model.
        kl_coef (`float`, *optional*, defaults to `1e-3`):
            Weight of the KL divergence to the reference model in `grpo`.
        trajectory_weighting (`str`, *optional*):
            Weights of a prompt's trajectories in the balance losses (the "heuristic weighting" of GFlowGR's abstract),
            of mean 1 within the prompt: `"source"`, by `source_weights`; `"reward"`, in proportion to R. All are
            positive, so a policy that can reach R / Z still ends there; what changes is the speed, and the compromise
            of a policy that cannot (docs/objectives.md).
        source_weights (`dict[str, float]`, *optional*):
            Under `trajectory_weighting="source"` the weight of each of the sampler's sources, > 0; 1 for those that
            are not named.

        > Parameters that control the reward

        reward_weights (`list[float]`, *optional*):
            A weight for each reward function; 1 each by default.
        reward_transform (`str`, *optional*, defaults to `"power"`):
            `"power"`: log R = beta * log max(r, floor), r >= 0. `"exp"`: log R = beta * r, any sign.
        reward_beta (`float`, *optional*, defaults to `1.0`):
            The exponent or inverse temperature beta. Larger is greedier.
        reward_floor (`float`, *optional*, defaults to `1e-3`):
            Least reward under `"power"`, as a share of the prompt's mean reward.
        leaf_reduction (`str`, *optional*, defaults to `"sum"`):
            A leaf's reward from the rewards of its items: `"sum"` or `"max"`.
        max_exact_elements (`int`, *optional*, defaults to `50_000_000`):
            Largest table, prompts x leaves, of one micro-batch. Where a micro-batch needs a larger one, `exact_flow`
            falls back to the `exact_top_items` best leaves of each prompt; other losses then score the drawn
            trajectories only, and `reward_floor` refers to the group's mean.
        exact_top_items (`int`, *optional*, defaults to `1000`):
            How many leaves of each prompt keep their own reward in that fallback; the others share the rest of the
            mass evenly, so that Z stays what it is.

        > Parameters that control adapters

        train_item_tokens (`bool`, *optional*, defaults to `True`):
            Under `peft_config`, train the embeddings of the catalogue's tokens too, at input and output (PEFT's
            `trainable_token_indices`). A `peft_config` that names the embeddings itself is followed instead.

        > Parameters that control the reference model

        ref_weight (`float`, *optional*, defaults to `0.0`):
            Exponent a of the reference model in the target pi_ref^a * R: log R + a log pi_ref(leaf) takes the place of
            log R in every balance loss. 0: no reference model.

        > Parameters that control data and evaluation

        max_history_items (`int`, *optional*):
            Items of the history that a prompt holds, the last ones. By default what the folder of `model` or the given
            `prompt_encoder` says, 20 where there is neither. A value overrides the folder's, and must be the given
            encoder's.
        max_shared_prompts (`int`, *optional*, defaults to `1`):
            Above 1, up to so many rows of one user are scored on one prompt, whose beginnings theirs are: the same
            loss and gradient from fewer tokens. Causal models only. Attention over a row grows with the square of what
            hangs on it: 6 is a fair number at K = 1, 2 at K of 4 and more. The rows of a user then come in one batch.
        eval_num_beams (`int`, *optional*, defaults to `20`):
            Width of the constrained beam search of `evaluate()`.
        eval_ks (`list[int]`, *optional*, defaults to `[5, 10, 20]`):
            Cut-offs of the evaluation's lists.
        log_completions (`bool`, *optional*, defaults to `False`):
            Print a group of trajectories with its rewards at every logging step.
        model_init_kwargs (`dict` or `str`, *optional*):
            Keyword arguments of `from_pretrained` where the model is given by name.

        > Other defaults than `TrainingArguments`: learning rate 5e-4, gradient checkpointing off, bf16 only on a
        > device that has it, `train_sampling_strategy="group_by_length"`, `remove_unused_columns=False`.
    """

    # Parameters that control trajectories
    num_generations: int = field(default=8, metadata={"help": "Trajectories per prompt (K), the target included."})
    temperature: float = field(default=1.0, metadata={"help": "Temperature of on-policy draws."})
    epsilon: float = field(default=0.0, metadata={"help": "Probability of a uniform step in on-policy draws."})

    # Parameters that control the loss
    loss_type: list[str] = field(
        default_factory=lambda: ["vargrad"],
        metadata={
            "help": "One or more of vargrad, contrastive_balance, trajectory_balance, detailed_balance, "
            "subtrajectory_balance, exact_flow, sft, prefix_pointwise, prefix_pairwise, msl, sdpo, grpo."
        },
    )
    loss_weights: list[float] | None = field(default=None, metadata={"help": "A weight for each of `loss_type`."})
    loss_reduction: str = field(
        default="mean",
        metadata={"help": "Reduction over a prompt's trajectories.", "choices": ["mean", "sum"]},
    )
    huber_delta: float | None = field(default=None, metadata={"help": "Huber residuals with this delta."})
    contrastive_delta: float | None = field(default=1.0, metadata={"help": "The same for `contrastive_balance`."})
    subtb_lambda: float = field(default=0.9, metadata={"help": "Weight of a longer sub-path to a shorter by one."})
    log_z_learning_rate: float = field(default=1e-2, metadata={"help": "Learning rate of the flow head."})
    label_space: str = field(
        default="tree",
        metadata={"help": "Probabilities of the losses on the target.", "choices": ["tree", "vocabulary"]},
    )
    sft_reduction: str = field(
        default="sum", metadata={"help": "Over the tokens of an id, in `sft`.", "choices": ["sum", "mean"]}
    )
    prefix_eta: float = field(default=1e-4, metadata={"help": "How fast prefix weights follow their losses."})
    prefix_variant: str = field(
        default="paper", metadata={"help": "Form of the prefix losses.", "choices": ["paper", "2025", "kdd"]}
    )
    msl_temperature: float = field(default=1.0, metadata={"help": "Temperature of `msl`."})
    sdpo_beta: float = field(default=1.0, metadata={"help": "beta of `sdpo`."})
    kl_coef: float = field(default=1e-3, metadata={"help": "Weight of the KL divergence in `grpo`."})
    trajectory_weighting: str | None = field(
        default=None,
        metadata={"help": "Weights of a prompt's trajectories in balance losses.", "choices": ["source", "reward"]},
    )
    source_weights: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "Weight of each source of the sampler, 1 where none is given."}
    )

    # Parameters that control the reward
    reward_weights: list[float] | None = field(default=None, metadata={"help": "A weight for each reward function."})
    reward_transform: str = field(
        default="power",
        metadata={"help": "From combined reward to log R.", "choices": ["power", "exp"]},
    )
    reward_beta: float = field(default=1.0, metadata={"help": "Exponent (power) or inverse temperature (exp) of R."})
    reward_floor: float = field(
        default=1e-3, metadata={"help": "Least reward under `power`, as a share of the prompt's mean reward."}
    )
    leaf_reduction: str = field(
        default="sum",
        metadata={"help": "A leaf's reward from its items' rewards.", "choices": ["sum", "max"]},
    )
    max_exact_elements: int = field(
        default=50_000_000, metadata={"help": "Largest table of rewards, prompts x leaves, of a micro-batch."}
    )

    exact_top_items: int = field(
        default=1000, metadata={"help": "Leaves with a reward of their own where that table would be too large."}
    )

    # Parameters that control the reference model
    ref_weight: float = field(default=0.0, metadata={"help": "Exponent of the reference model in the target."})

    # Parameters that control adapters
    train_item_tokens: bool = field(
        default=True, metadata={"help": "Under adapters, train the embeddings of the items' tokens too."}
    )

    # Parameters that control data and evaluation
    max_history_items: int | None = field(
        default=None,
        metadata={"help": "Items of the history that a prompt holds; by default the model folder's, or 20."},
    )
    eval_num_beams: int = field(default=20, metadata={"help": "Beam width of evaluate()."})
    eval_ks: list[int] = field(default_factory=lambda: [5, 10, 20], metadata={"help": "Cut-offs of evaluate()."})
    log_completions: bool = field(default=False, metadata={"help": "Print a group of trajectories when logging."})
    model_init_kwargs: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "Keyword arguments of from_pretrained where the model is given by name."}
    )

    # Other defaults than TrainingArguments
    learning_rate: float = field(default=5e-4, metadata={"help": "The initial learning rate of the policy."})
    train_sampling_strategy: str = field(
        default="group_by_length",
        metadata={
            "help": "Order of the training rows: histories of like length together, or plain random.",
            "choices": ["group_by_length", "random", "sequential", "batch_rebalance"],
        },
    )
    remove_unused_columns: bool = field(default=False, metadata={"help": "Must stay False: rewards see all columns."})

    _VALID_DICT_FIELDS = BaseConfig._VALID_DICT_FIELDS + ["model_init_kwargs", "source_weights"]

    def __post_init__(self):
        super().__post_init__()
        self.loss_type = [str(name) for name in _listed(self.loss_type)]
        self.eval_ks = [int(k) for k in _listed(self.eval_ks)]
        for name in ("loss_weights", "reward_weights"):
            if getattr(self, name) is not None:
                setattr(self, name, [float(weight) for weight in _listed(getattr(self, name))])
        self._check_losses()
        self._check_weighting()
        self._check_numbers()
        if self.remove_unused_columns:
            raise ValueError("remove_unused_columns=True would drop histories and targets; leave it False.")

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
        if not all(map(math.isfinite, self.loss_weights)) or not any(self.loss_weights):
            raise ValueError(f"loss_weights is {self.loss_weights}; weights must be finite and not all 0.")
        for name in self.loss_type:
            least = get_loss(name).min_generations
            if self.num_generations < least:
                raise ValueError(
                    f"num_generations is {self.num_generations}, but the loss {name!r} needs at least {least} "
                    f"trajectories a prompt. Raise num_generations or choose another loss_type."
                )
        if self.num_generations < 1:
            raise ValueError(f"num_generations is {self.num_generations}; at least 1 trajectory a prompt is needed.")

    def _check_weighting(self) -> None:
        """What weighs trajectories and their rewards must have something to weigh."""
        losses = [get_loss(name) for name in self.loss_type]
        weighed = any(loss.rewards for loss in losses)
        for name, used in (("trajectory_weighting", weighed), ("ref_weight", any(loss.balances for loss in losses))):
            if getattr(self, name) and not used:
                raise ValueError(
                    f"{name} is {getattr(self, name)!r}, but no loss of {self.loss_type} balances rewards: it would "
                    f"change nothing. Leave it out or add a balance loss to loss_type."
                )
        if self.label_space == "vocabulary" and not any(loss.any_label_space for loss in losses):
            raise ValueError(
                f"label_space is 'vocabulary', but the losses {self.loss_type} are always over the tree; only sft and "
                f"the prefix losses can be over the vocabulary. Leave it out."
            )
        if self.huber_delta is not None and not any("huber_delta" in loss.options for loss in losses):
            raise ValueError(
                f"huber_delta is {self.huber_delta}, but no loss of {self.loss_type} has a residual that it would "
                f"bound (contrastive_balance has contrastive_delta). Leave it out."
            )
        if self.trajectory_weighting not in (None, "source", "reward"):
            raise ValueError(
                f"trajectory_weighting is {self.trajectory_weighting!r}; choose 'source', 'reward' or None."
            )
        if (self.trajectory_weighting == "source") != bool(self.source_weights):
            raise ValueError(
                f"trajectory_weighting is {self.trajectory_weighting!r} and source_weights {self.source_weights}; "
                f"source_weights belong to trajectory_weighting='source', which needs them."
            )
        for name, weight in (self.source_weights or {}).items():
            if not (isinstance(weight, int | float) and 0 < weight < math.inf):
                raise ValueError(
                    f"The weight of source {name!r} is {weight!r}; it must be a number greater than 0. Leave a source "
                    f"out of the sampler to do without it."
                )

    def _check_numbers(self) -> None:
        for name, choices in (
            ("loss_reduction", ("mean", "sum")), ("reward_transform", ("power", "exp")),
            ("leaf_reduction", ("sum", "max")), ("label_space", ("tree", "vocabulary")),
            ("sft_reduction", ("sum", "mean")), ("prefix_variant", VARIANTS),
        ):  # fmt: skip
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} is {getattr(self, name)!r}; choose {' or '.join(map(repr, choices))}.")
        for name in (
            "temperature",
            "reward_beta",
            "log_z_learning_rate",
            "subtb_lambda",
            "msl_temperature",
            "sdpo_beta",
        ):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be greater than 0, and finite.")
        for name in ("huber_delta", "contrastive_delta"):
            delta = getattr(self, name)
            if delta is not None and not delta > 0:
                raise ValueError(f"{name} is {delta}; it must be greater than 0, or None for squares.")
        if not 0 <= self.ref_weight < math.inf:
            raise ValueError(f"ref_weight is {self.ref_weight}; it must be a number of at least 0 (0: no reference).")
        if not 0 <= self.kl_coef < math.inf:
            raise ValueError(f"kl_coef is {self.kl_coef}; it must be a number of at least 0.")
        if not 0 <= self.prefix_eta < math.inf:
            raise ValueError(
                f"prefix_eta is {self.prefix_eta}; it must be at least 0 (0: weights stay as they begin)."
            )
        if not 0 <= self.epsilon <= 1:
            raise ValueError(f"epsilon is {self.epsilon}; it is a probability and must lie in [0, 1].")
        if not 0 <= self.reward_floor < 1:
            raise ValueError(f"reward_floor is {self.reward_floor}; it is a share and must lie in [0, 1).")
        if not self.eval_ks or min(self.eval_ks) < 1:
            raise ValueError(f"eval_ks is {self.eval_ks}; give list lengths of at least 1, for example [5, 10].")
        if self.eval_num_beams < max(self.eval_ks):
            raise ValueError(
                f"eval_num_beams is {self.eval_num_beams}, but eval_ks asks for lists of {max(self.eval_ks)}. "
                f"Raise eval_num_beams or shorten eval_ks."
            )
        if self.exact_top_items < 1:
            raise ValueError(f"exact_top_items is {self.exact_top_items}; at least 1 leaf must keep its reward.")
        if self.max_history_items is not None and self.max_history_items < 1:
            raise ValueError(f"max_history_items is {self.max_history_items}; a prompt needs at least 1 item.")
