"""`GFlowNetTrainer`: draw trajectories, reward them, score them, balance."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from datasets import Dataset, IterableDataset
from peft import PeftConfig
from torch import Tensor, nn
from transformers import EvalPrediction, PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled
from trl.trainer.callbacks import SyncRefModelCallback

from gflowtrl.catalog import Item, ItemCatalog
from gflowtrl.data import PromptEncoder, Step, count_repeats
from gflowtrl.losses import LossInputs, LossSpec, group_advantages, normalized_flows
from gflowtrl.policy import StepScores, TreePolicy, make_policy
from gflowtrl.rewards import (
    AnyReward,
    CompositeReward,
    DenseReward,
    LikelihoodReward,
    PosteriorReward,
    RewardModel,
    StepReward,
)
from gflowtrl.rewards.reward_model import resolve_rewards
from gflowtrl.samplers import Feedback, Sampler, Trajectories

from .folder import Parts, loading_kwargs, model_kwargs
from .gflownet_config import GFlowNetConfig
from .group import Group
from .reference import ReferencePrior, build_prior
from .training_state import REFERENCE_FILE, load_reference, save_reference
from .tree_policy_trainer import TreePolicyTrainer
from .weighting import source_table, weights_by_reward, weights_by_source


logger = logging.getLogger(__name__)
REPEATS = 0.001  # exclude_history="auto" excludes items of the history if a smaller share of the targets are repeats


class GFlowNetTrainer(TreePolicyTrainer):
    """Fine-tunes a generative recommender to recommend items in proportion to their reward.

    For every prompt, the sampler draws K trajectories, the rewards and (in one packed forward) the policy score them,
    and the losses of `args.loss_type` balance them. Derives from the base class of TRL's SFTTrainer and DPOTrainer,
    with their argument names. **One difference**: `per_device_train_batch_size` counts prompts, not completions.

    Args:
        model: a causal language model or an encoder-decoder, or its name or folder.
        reward_funcs: one reward or a list. Any callable with TRL's signature `(prompts, completions, completion_ids,
            **dataset_columns) -> list[float | None]`, which also gets `items`; one of `gflowtrl.rewards`; or a
            sequence classifier, or its name or folder (`RewardModel`). Not needed for `loss_type=["sft"]`.
        args: the configuration.
        sampler: source of the trajectories: a name (`"on_policy"`, `"reward"`, ...), a mixture
            `{"ground_truth": 1, "on_policy": 3}`, or a `Sampler`. Default: the observed target and K - 1 on-policy
            draws; for `exact_flow` alone, K draws from the reward.
        ref_model: the reference model (or its name or folder) of the target pi_ref^ref_weight * R, and of the losses
            that compare the policy with one (`sdpo`, `grpo` and others). It is never trained. Default, if a reference
            is needed: the model before training. With `peft_config` this is the trained model with its adapters
            disabled, otherwise a copy.
        **options: `train_dataset`, `eval_dataset`, `processing_class`, `catalog`, `peft_config`, `item_counts`,
            `item_titles`, `prompt_encoder`, `callbacks`, `optimizers`, `compute_metrics`, `quantization_config`,
            `optimizer_cls_and_kwargs`, `model_init`; see `TreePolicyTrainer`. `reward_processing_classes`: the
            tokenizers of the classifiers among the rewards, `None` for those of their folders.

    Attributes:
        reward_funcs: the rewards, as a list.
        ref_model: the reference model.

    Example:
        ```python
        trainer = GFlowNetTrainer(
            model="sft_checkpoint",
            reward_funcs=[GroundTruthReward(), CollaborativeReward(teacher)],
            args=GFlowNetConfig(output_dir="out", loss_type="vargrad", reward_weights=[0.7, 0.3]),
            train_dataset=splits.train,
            eval_dataset=splits.validation,
            sampler={"ground_truth": 1, "on_policy": 7},
        )
        trainer.train()
        ```
    """

    _tag_names = ["gflowtrl", "gflownet"]
    _name = "GFlowNet"
    args: GFlowNetConfig

    def __init__(
        self,
        model: str | PreTrainedModel | None = None,
        reward_funcs: AnyReward | str | nn.Module | Sequence[AnyReward | str | nn.Module] | None = None,
        args: GFlowNetConfig | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        catalog: ItemCatalog | None = None,
        sampler: str | Mapping | Sampler | Callable | None = None,
        ref_model: str | PreTrainedModel | None = None,
        peft_config: PeftConfig | None = None,
        item_counts: Tensor | None = None,
        item_titles: Mapping[Item, str] | None = None,
        prompt_encoder: PromptEncoder | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple = (None, None),
        compute_metrics: Callable[[EvalPrediction], dict[str, float]] | None = None,
        quantization_config: Any = None,
        optimizer_cls_and_kwargs: tuple[type[torch.optim.Optimizer], dict[str, Any]] | None = None,
        model_init: Callable[..., str | PreTrainedModel] | None = None,
        reward_processing_classes: PreTrainedTokenizerBase | list[PreTrainedTokenizerBase | None] | None = None,
        **unsupported: Any,
    ):
        args = GFlowNetConfig("gflownet-output") if args is None else args
        if not isinstance(args, GFlowNetConfig):
            raise TypeError(f"args is a {type(args).__name__}, but GFlowNetTrainer needs a GFlowNetConfig.")
        if model is not None:
            loading_kwargs(model, args, quantization_config)  # its checks, before classifiers are loaded
        self._given_reference = ref_model
        self.reward_funcs = resolve_rewards(reward_funcs, reward_processing_classes, model_kwargs(args))
        super().__init__(
            model, args, train_dataset, eval_dataset, processing_class, catalog, sampler, peft_config, item_counts,
            item_titles, prompt_encoder, callbacks, optimizers, compute_metrics, quantization_config,
            optimizer_cls_and_kwargs, model_init, **unsupported,
        )  # fmt: skip
        self._prepare_models()
        if args.sync_ref_model:
            self._check_moving_reference()
            self.add_callback(SyncRefModelCallback(self.ref_model, self.accelerator))

    @property
    def ref_model(self) -> Any:
        """The reference model; None without a reference, or if it is the trained model without its adapters."""
        return None if self.reference is None else self.reference.model

    def _prepare_models(self) -> None:
        """Move the reference and the reward models to the device, or shard the reference, as TRL does."""
        for reward in self.reward_funcs:
            if isinstance(reward, RewardModel):
                reward.model.to(self.accelerator.device)
        if self.reference is not None:
            self.reference.prepare(self.accelerator)

    @property
    def _moving_reference(self) -> Any:
        """The reference model if a callback changes it during training, so that checkpoints contain it."""
        moves = any(isinstance(callback, SyncRefModelCallback) for callback in self.callback_handler.callbacks)
        return self.accelerator.unwrap_model(self.ref_model) if moves and self.ref_model is not None else None

    def _has_reference_shapes(self) -> bool:
        shapes = [[value.shape for value in each.parameters()] for each in (self.ref_model, self.model) if each]
        return len(shapes) < 2 or shapes[0] == shapes[1]

    def _check_moving_reference(self) -> None:
        sharded = self.is_fsdp_enabled or (self.is_deepspeed_enabled and is_deepspeed_zero3_enabled())
        for wrong, what in (
            (self.reference is None, "there is no reference model; set ref_weight"),
            (self.ref_model is None, "the reference is the model without its adapters, which does not move"),
            (self.model_init is not None, "model_init makes another reference for each training"),
            (sharded, "the models are sharded"),
            (self._learns_flows, "the policy has flow heads"),
            (not self._has_reference_shapes(), "the reference has parameters of other shapes than the model"),
        ):
            if wrong:
                raise ValueError(f"sync_ref_model is True, but {what}. Leave sync_ref_model out.")

    def call_model_init(self, trial: Any = None) -> nn.Module:
        model = super().call_model_init(trial)
        self._prepare_models()
        for callback in self.callback_handler.callbacks:
            if isinstance(callback, SyncRefModelCallback):
                callback.ref_model = self.ref_model  # the new one
        return model

    def _set_up_objective(self, parts: Parts, args: GFlowNetConfig, adapted: bool) -> None:
        self._source_table = source_table(args.weight_per_source, self.sampler.source_names)
        self._exact = args.needs_all_rewards
        self._needs_reference = any(loss.needs_reference for loss in self.losses.values())
        self.rewards: CompositeReward | None = None
        if self.reward_funcs:
            exclude = excludes_history(args.exclude_history, self._first_rows[0])
            self.rewards = composite_reward(self.reward_funcs, args, parts.catalog, parts.tokenizer, exclude)
        elif any(loss.needs_rewards for loss in self.losses.values()):
            raise ValueError(f"loss_type {args.loss_type} needs a reward; give reward_funcs (see gflowtrl.rewards).")
        if self._exact and self.rewards is not None:
            _check_exact(self.rewards, args)
        self.reference: ReferencePrior | None = build_prior(
            args.ref_weight, parts.catalog, self._given_reference, parts.model, adapted, self._needs_reference,
            **model_kwargs(args),
        )  # fmt: skip
        self.prior = self.reference if args.ref_weight else None

    def _frozen_policies(self) -> list[TreePolicy]:
        rewards = [] if self.rewards is None else self.rewards.rewards.values()
        policies = [r.policy for r in rewards if isinstance(r, LikelihoodReward) and r.policy is not None]
        if self.ref_model is not None:
            policies.append(make_policy(self.ref_model, self._catalog))
        return policies

    @property
    def _learns_flows(self) -> bool:
        return self.args.flows == "learned" and super()._learns_flows

    def _default_sampler(self, args: GFlowNetConfig) -> str | dict[str, float]:
        losses = self.losses.values()
        if not any(loss.needs_rewards for loss in losses):
            return super()._default_sampler(args)
        if all(loss.needs_all_rewards or loss.uses_target for loss in losses):
            return "reward"
        return {"ground_truth": 1, "on_policy": args.num_generations - 1}

    def models_of_step(self) -> dict[str, nn.Module]:
        more = {} if self.ref_model is None else {"The reference model": self.ref_model}
        return super().models_of_step() | more

    # ---------------------------------------------------------------------------------------------------------- step
    def _reward(self, step: Step, policy: TreePolicy) -> StepReward | None:
        """Return R of the step's prompts, including the prior. Exact flows need the prior of every leaf."""
        if self.rewards is None:
            return None
        with self._timed("reward"):
            reward = self.rewards.of(step, policy, self.state)
        if self.prior is None:
            return reward
        if self._exact and isinstance(reward, DenseReward):
            with self._timed("reference"):
                return reward.with_prior(self.prior.score_all(policy.model, step.prompts))
        return PosteriorReward(reward, partial(self._log_prior, self.prior, step, policy))

    def _log_prior(self, prior: ReferencePrior, step: Step, policy: TreePolicy, leaves: Tensor) -> Tensor:
        with self._timed("reference"):
            return prior.score(policy.model, step.prompts, leaves)

    def _score(self, step: Step, policy: TreePolicy, drawn: Trajectories) -> tuple[Tensor, StepScores]:
        leaves, scores = super()._score(step, policy, drawn)
        if self._needs_reference and self.reference is not None:
            with self._timed("reference"):
                ref = self.reference.token_scores(policy.model, step.prompts, leaves, self._vocabulary)
            scores = replace(scores, ref_log_probs=ref.log_probs, ref_vocabulary_log_probs=ref.vocabulary_log_probs)
        return leaves, scores

    def _score_rewards(self, group: Group) -> None:
        reward, leaves = group.reward, group.drawn.leaves
        if reward is None:
            return
        with self._timed("reward"):
            # A reward can be the policy's likelihood, which is known at this point.
            group.rewards = reward.score(leaves, group.scores.trajectory_log_probs.detach())
            if self._exact:
                group.log_z = reward.log_flows(torch.zeros_like(leaves[:, :1]))[:, 0]  # of the root
        group.prior_weight = 0.0 if self.prior is None else self.prior.weight
        if self.args.trajectory_weighting == "source":
            group.weights = weights_by_source(self._source_table, group.drawn.source)
        elif self.args.trajectory_weighting == "reward":
            group.weights = weights_by_reward(group.rewards.log_rewards)

    def _inputs(self, loss: LossSpec, group: Group) -> LossInputs:
        inputs = super()._inputs(loss, group)
        if group.reward is None or group.rewards is None:
            return inputs
        flows = group.reward.log_flows(group.scores.child_nodes) if loss.needs_all_rewards else None
        log_rewards = group.rewards.log_rewards
        if loss.needs_flow_heads and not self._learns_flows:
            log_flows, ends = self._known_flows(group.reward, group.drawn.leaves)
            inputs = replace(inputs, log_z=group.log_z, log_flows=log_flows)
            log_rewards = ends if "log_flows" in loss.inputs else log_rewards
        return replace(
            inputs,
            log_rewards=log_rewards,
            rewards=group.rewards.rewards,
            advantages=group_advantages(group.rewards.rewards) if "advantages" in loss.inputs else None,
            child_target_log_probs=None if flows is None else normalized_flows(flows),
        )

    def _known_flows(self, reward: StepReward, leaves: Tensor) -> tuple[Tensor, Tensor]:
        """Return log F of the states s_0 .. s_{L-1} of each trajectory, `(B, K, L)`, 0 after the end of an id, and log
        F of its leaf, `(B, K)`: log R, or the mean of the others for a leaf that is not among the best (`TopKReward`).
        """
        nodes = self._catalog.tree.walk(leaves)
        flows, lengths = reward.log_flows(nodes), (nodes[..., 1:] >= 0).sum(2, keepdim=True)
        return flows[..., :-1].masked_fill(nodes[..., 1:] < 0, 0.0), flows.gather(2, lengths)[..., 0]

    @torch.no_grad()
    def _observe(self, group: Group) -> None:
        """Pass the results of the trajectories to the sampler, then log."""
        if group.rewards is not None:
            log_rewards, log_pi = group.rewards.log_rewards, group.scores.trajectory_log_probs
            residuals = group.residuals(log_rewards)[1].detach()
            if group.rewards.excluded is not None:
                log_rewards = log_rewards.masked_fill(group.rewards.excluded, -torch.inf)  # nothing to replay
            feedback = Feedback(log_rewards, residuals, log_pi.detach())
            self.sampler.observe(group.step, group.drawn, feedback)
        super()._observe(group)

    def _extra_state_files(self, checkpoint: str) -> list[str]:
        moving = [] if self._moving_reference is None else [REFERENCE_FILE]
        return super()._extra_state_files(checkpoint) + moving

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        if self._moving_reference is not None and self.args.should_save:
            save_reference(self._moving_reference, output_dir)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None and self._moving_reference is not None:
            load_reference(self._moving_reference, checkpoint)

    def card_settings(self) -> dict[str, Any]:
        """Return the training settings for the model card."""
        settings = super().card_settings()
        if self.rewards is not None:
            settings["rewards"] = ", ".join(
                f"{w:g} x {name}" for name, w in zip(self.rewards.names, self.rewards.weights, strict=True)
            )
            settings["trajectories"] = f"{self.num_generations} per prompt from {', '.join(self.sampler.source_names)}"
            if self.rewards.exclude_history:
                settings["items of the history"] = "no reward"
        if self.prior is not None:
            settings["reference model"] = f"prior to the power of {self.prior.weight:g}"
        if self.args.trajectory_weighting is not None:
            settings["weights of trajectories"] = f"by {self.args.trajectory_weighting}"
        return settings


def _check_exact(rewards: CompositeReward, args: GFlowNetConfig) -> None:
    """Check that every reward can score all items, and warn if the table of all leaves is too large."""
    needs = [name for name, loss in args.losses.items() if loss.needs_all_rewards or loss.needs_flow_heads]
    name = needs[0] if args.flows == "learned" else f"{needs[0]} with known flows"
    rewards.check_scores_all(f"{name} needs the reward of every leaf")
    leaves = rewards.catalog.tree.num_leaves
    table = args.per_device_train_batch_size * leaves
    if table <= args.max_exact_elements:
        return
    size = f"{args.per_device_train_batch_size} prompts x {leaves} leaves = {table} numbers"
    if args.ref_weight:
        raise ValueError(
            f"{name} with a reference model needs its probability of every leaf, a table of {size}, but "
            f"max_exact_elements is {args.max_exact_elements}. Lower per_device_train_batch_size, raise "
            f"max_exact_elements, or use loss_type='vargrad'."
        )
    warnings.warn(
        f"{name} would need a table of {size}, more than max_exact_elements={args.max_exact_elements}: only "
        f"the exact_top_items={args.exact_top_items} best leaves of each prompt keep their own reward, and all "
        f"others share the rest of the mass evenly.",
        stacklevel=5,
    )


def excludes_history(setting: str, rows: Dataset | IterableDataset | None) -> bool:
    """Return whether items of the history get no reward.

    Args:
        setting: `exclude_history` of the configuration.
        rows: training rows, for "auto".
    """
    if setting != "auto":
        return setting == "yes"
    if isinstance(rows, IterableDataset):
        logger.warning(
            "exclude_history is auto, but streamed rows cannot be counted: items of the history keep theirs."
        )
    if not isinstance(rows, Dataset):
        return False
    repeats = count_repeats(rows)
    rare = repeats < REPEATS * len(rows)
    logger.info(
        f"exclude_history is auto: {repeats} of {len(rows)} training targets ({repeats / len(rows):.2%}) are items of "
        f"their user's history, so these items get {'no' if rare else 'their'} reward."
    )
    return rare


def composite_reward(
    reward_funcs: AnyReward | Sequence[AnyReward],
    args: GFlowNetConfig,
    catalog: ItemCatalog,
    tokenizer: PreTrainedTokenizerBase,
    exclude_history: bool,
) -> CompositeReward:
    """Create R from a trainer's arguments; `exclude_history` from `excludes_history`."""
    return CompositeReward(
        reward_funcs, catalog, tokenizer, args.reward_weights, args.reward_transform, args.reward_beta,
        args.reward_floor, args.leaf_reduction, args.max_exact_elements,
        args.exact_top_items if args.needs_all_rewards else None, exclude_history,
    )  # fmt: skip
