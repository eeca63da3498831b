"""`APAOTrainer`: cross entropy and adaptive prefix losses, which train the prefixes that beam search must keep."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from transformers import PreTrainedModel

from gflowtrl.checks import COUNT, NOT_NEGATIVE, check_choice, check_number
from gflowtrl.losses.prefix_weights import VARIANTS
from gflowtrl.samplers import Sampler

from .tree_policy_config import TreePolicyConfig, option
from .tree_policy_trainer import TreePolicyTrainer


METHODS = ("pointwise", "pairwise")


@dataclass
class APAOConfig(TreePolicyConfig):
    r"""
    Configuration of [`APAOTrainer`]: cross entropy + beta * sum over prefixes of w_m L_m (arXiv 2603.02730).

    It adds the following to [`TreePolicyConfig`] and sets the fields for trajectories and losses itself.

    Parameters:
        method (`str`, *optional*, defaults to `"pointwise"`):
            L_m: `"pointwise"` is the mean negative log-likelihood of the prefix; `"pairwise"` compares the prefix with
            the prefixes of negatives drawn uniformly from the catalog.
        beta (`float`, *optional*, defaults to `0.3`):
            Weight of the prefix losses. The paper's best values for pointwise are .3 (T5) and .4 (Llama) on Office, .1
            and .3 on Beauty; for pairwise .2 and .1 (T5).
        num_negatives (`int`, *optional*, defaults to `100`):
            Negatives per prompt for `"pairwise"`.
        prefix_eta (`float`, *optional*, defaults to `1e-4`):
            Rate at which the weights w_m adapt to L_m. The paper tries 5e-6 to 5e-4.
        prefix_variant (`str`, *optional*, defaults to `"paper"`):
            `"2025"` and `"kdd"` are the authors' releases, which differ from the paper ([`losses.PrefixWeights`]).
            Their ids end with a special token; the ids of gflowtrl do not.
        label_space (`str`, *optional*, defaults to `"vocabulary"`):
            Probabilities over the whole vocabulary as in the paper, or over the children in the `"tree"` (a variant of
            gflowtrl).
        loss_type (`list[str]`, *optional*):
            Follows from `method`; other values are errors.
        loss_kwargs (`dict[str, dict]` or `str`, *optional*):
            Cross entropy is the mean over an id's tokens. Use `{"sft": {"token_mean": False}}` for the sum.
    """

    method: str = option("pointwise", "Type of the prefix losses.", list(METHODS))
    beta: float = option(0.3, "Weight of the prefix losses.")
    num_negatives: int = option(100, "Negatives per prompt for `pairwise`.")
    prefix_eta: float = option(1e-4, "Rate at which prefix weights adapt to their losses.")
    prefix_variant: str = option("paper", "Variant of the prefix losses.", list(VARIANTS))
    label_space: str = option("vocabulary", "Label space of the losses on the target.", ["tree", "vocabulary"])
    loss_type: list[str] | None = option(None, "Follows from `method`.")
    loss_weights: list[float] | None = field(default=None, init=False)  # follow from beta
    num_generations: int = field(default=1, init=False)  # follows from num_negatives
    log_z_learning_rate: float = field(default=1e-2, init=False)  # unused: APAO has no flow head

    _bounds = TreePolicyConfig._bounds | {"beta": NOT_NEGATIVE, "num_negatives": COUNT, "prefix_eta": NOT_NEGATIVE}

    def __post_init__(self):
        check_choice("method", self.method, METHODS)
        losses = ["sft", f"prefix_{self.method}"]
        if self.loss_type not in (None, losses):
            raise ValueError(
                f"loss_type is {self.loss_type!r}, but APAO's follows from method. To combine prefix losses with a "
                f"balance loss, use GFlowNetTrainer with loss_type=['exact_flow', {losses[1]!r}]."
            )
        super().__post_init__()

    def check(self) -> None:
        check_choice("method", self.method, METHODS)
        check_number("num_negatives", self.num_negatives, COUNT)
        prefix = f"prefix_{self.method}"
        self.loss_type, self.loss_weights = ["sft", prefix], [1.0, self.beta]
        self.num_generations = 1 + self.num_negatives if self.method == "pairwise" else 1
        super().check()
        if prefix in (self.loss_kwargs or {}):
            raise ValueError(f"loss_kwargs has options for {prefix!r}; set prefix_eta and prefix_variant instead.")

    def loss_options(self, name: str) -> dict[str, Any]:
        defaults = {"token_mean": True} if name == "sft" else {"eta": self.prefix_eta, "variant": self.prefix_variant}
        return defaults | super().loss_options(name)


class APAOTrainer(TreePolicyTrainer):
    """Trains a generative recommender to be robust under beam search (APAO, arXiv 2603.02730).

    It uses no rewards. Evaluation, checkpoints, adapters and sharding work as in every `TreePolicyTrainer`, and
    `per_device_train_batch_size` counts prompts. All negatives of a prompt are scored in one forward of the prompt.

    Args:
        model: a causal language model or an encoder-decoder, or its name or folder.
        args: the configuration.
        sampler: source of the negatives of `method="pairwise"`, as for `GFlowNetTrainer`. Default: uniform.
        **options: `train_dataset`, `eval_dataset`, `processing_class`, `catalog`, `peft_config`, ...; see
            `TreePolicyTrainer`. `reward_funcs` and `ref_model` are not accepted.

    Example:
        ```python
        args = APAOConfig(output_dir="out", method="pairwise", beta=0.3, eval_strategy="epoch")
        APAOTrainer("sft_checkpoint", args, train_dataset=splits.train, eval_dataset=splits.validation).train()
        ```
    """

    _tag_names = ["gflowtrl", "apao"]
    _name = "APAO"

    def __init__(
        self,
        model: str | PreTrainedModel | None = None,
        args: APAOConfig | None = None,
        sampler: str | Mapping | Sampler | Callable | None = None,
        **options: Any,
    ):
        if unsupported := {"reward_funcs", "ref_model"} & options.keys():
            raise ValueError(f"APAOTrainer does not use {' and '.join(sorted(unsupported))}; use GFlowNetTrainer.")
        args = APAOConfig("apao-output") if args is None else args
        if not isinstance(args, APAOConfig):
            raise TypeError(f"args is a {type(args).__name__}, but APAOTrainer needs an APAOConfig.")
        super().__init__(model, args, sampler=sampler, **options)
