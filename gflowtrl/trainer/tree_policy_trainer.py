"""`TreePolicyTrainer`: the base of all trainers, which draws, scores, evaluates and writes checkpoints."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, IterableDataset
from peft import PeftConfig
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import EvalPrediction, PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback, set_seed

from gflowtrl.catalog import Item, ItemCatalog
from gflowtrl.compat import TRLTrainer, tied_weights
from gflowtrl.data import GroupCollator, PromptEncoder, Step
from gflowtrl.data.recommender_files import write_recommender_files
from gflowtrl.files import read_tensors
from gflowtrl.losses import LossInputs, LossSpec, PrefixWeights
from gflowtrl.policy import StatelessNoise, StepScores, TreePolicy, attach_flow_heads, merge_tied_embeddings
from gflowtrl.policy.heads import is_head, load_heads, split_heads
from gflowtrl.policy.merging import update_adapter_files
from gflowtrl.policy.temperature import set_temperature
from gflowtrl.rewards import StepReward
from gflowtrl.samplers import Sampler, Trajectories, build_sampler, validate_trajectories

from .adapters import add_adapters
from .arguments import check_types, refuse_arguments
from .checkpoints import CompleteCheckpointsMixin
from .evaluation import RankingEvaluationMixin, rows_per_step
from .finite_steps import HEADS_FILE, FiniteMixin, group_parts
from .folder import Given, Parts, base_model_kwargs
from .group import Group, group_metrics, print_group
from .input_checks import check_datasets, check_parts, item_counts_of
from .model_card import write_model_card
from .optimizers import adopt_optimizer, split_head_group
from .recording import RecordingMixin
from .row_sources import as_rows, evaluation_rows
from .rows import TrainingRowsMixin
from .saved import check_saved
from .training_state import (
    extra_state_files,
    load_prefix_weights,
    load_sampler,
    loading_state,
    save_prefix_weights,
    save_sampler,
)
from .tree_policy_config import TreePolicyConfig
from .trials import TrialsMixin


logger = logging.getLogger(__name__)


class TreePolicyTrainer(
    TrialsMixin,
    RecordingMixin,
    CompleteCheckpointsMixin,
    FiniteMixin,
    TrainingRowsMixin,
    RankingEvaluationMixin,
    TRLTrainer,
):
    """Trains a generative recommender, as a policy on the prefix tree, with losses on drawn trajectories.

    For every prompt, the sampler draws K trajectories, the policy scores them in one packed forward together with the
    observed target, and the losses of `args.loss_type` are computed. Derives from the base class of TRL's SFTTrainer
    and DPOTrainer (telemetry is off), with their argument names. **One difference**: `per_device_train_batch_size`
    counts prompts, not completions. `GFlowNetTrainer` adds rewards; `APAOTrainer` implements APAO.

    Args:
        model: a causal language model or an encoder-decoder, or its name or folder.
        args: the configuration.
        train_dataset, eval_dataset: rows `{"row_id", "history", "target", ...}` as created by
            `gflowtrl.data.leave_one_out`; other columns are passed to samplers and rewards. Each is a dataset (also a
            streamed one), a list of dictionaries or a DataFrame; `eval_dataset` may also be a dictionary of such.
        processing_class: the tokenizer. Default: that of `model`'s folder.
        catalog: the items. Default: that of `model`'s folder.
        sampler: source of the trajectories: a name (`"on_policy"`, `"uniform"`, ...), a mixture
            `{"ground_truth": 1, "on_policy": 3}`, or a `Sampler`. Default: the observed target, with uniform negatives
            if a loss uses negatives.
        peft_config: a PEFT configuration. Adapters are trained instead of the model, together with the embeddings of
            the items' tokens (`args.train_item_tokens`).
        item_counts: `(items,)` training interactions in the order of `catalog.items`, for the breadth metrics.
            Default: those of `model`'s folder, else the counts of the training targets.
        item_titles: titles of the items, for the results of the saved recommender and for `log_completions`. Default:
            those of `model`'s folder.
        prompt_encoder: makes prompts from histories. Default: that of `model`'s folder, else a plain
            `gflowtrl.data.PromptEncoder` (`gflowtrl.data.TextPromptEncoder` makes prompts with text).
        callbacks, optimizers, optimizer_cls_and_kwargs: as in `transformers.Trainer`. A flow head is added to the
            optimizer as a separate group.
        compute_metrics: function that adds metrics to the evaluation's. Its `predictions` are the ranked items of each
            row, its `label_ids` the targets.
        quantization_config: quantization of a model that is given by name, as in TRL.
        model_init: function without arguments, or of a trial, that makes the model of each training, instead of
            `model`. `hyperparameter_search` needs it.

    Raises:
        ValueError, TypeError: arguments do not fit together, or are those of TRL's trainers that have no use here
            (docs/trl.md). This is checked before training starts.
    """

    loss_is_scaled_for_ga = False  # losses are means over a micro-batch; the Trainer divides by the accumulation steps
    _rows_are_checked = False
    args: TreePolicyConfig
    model: nn.Module
    train_dataset: Dataset | None

    def __init__(
        self,
        model: str | PreTrainedModel | None = None,
        args: TreePolicyConfig | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        catalog: ItemCatalog | None = None,
        sampler: str | Mapping | Sampler | Callable | None = None,
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
        **unsupported: Any,
    ):
        refuse_arguments(type(self).__name__, unsupported)
        check_types(locals())
        model = os.fspath(model) if isinstance(model, os.PathLike) else model
        self.args = TreePolicyConfig("gflowtrl-output") if args is None else args
        self._given = Given(
            processing_class, catalog, prompt_encoder, item_titles, item_counts, sampler, peft_config,
            quantization_config,
        )  # fmt: skip
        self._first_rows = as_rows(train_dataset, "train_dataset"), evaluation_rows(eval_dataset)
        self.model_init = model_init
        trained = self._build(self._first_model(model, model_init, optimizers))
        adopt_optimizer(optimizers, trained, self.args.log_z_learning_rate)
        parts, (rows, eval_rows) = self._parts, self._first_rows
        self._default_collator = GroupCollator(self._encoder)
        self._checked_rows = rows if isinstance(rows, Dataset) else None
        strategy = self.args.train_sampling_strategy  # without a meaning for a stream
        if isinstance(rows, IterableDataset):
            rows = self._streamed(rows)
        super().__init__(
            model=trained,
            args=self.args,
            data_collator=self._default_collator,
            train_dataset=rows,
            eval_dataset=eval_rows,
            processing_class=parts.tokenizer,
            callbacks=callbacks,
            optimizers=optimizers,
            optimizer_cls_and_kwargs=optimizer_cls_and_kwargs,
        )
        self.model_init, self.args.train_sampling_strategy = model_init, strategy
        counts = item_counts_of(rows, parts.catalog) if parts.item_counts is None else parts.item_counts
        beams, ks = self.args.eval_num_beams, self.args.eval_ks
        self.set_up_ranking(parts.catalog, self._encoder, counts, beams, ks, compute_metrics)
        self.check_start()
        if self.is_world_process_zero():
            logger.info(
                f"{type(self).__name__}: {rows_per_step(self.args)} prompts per step (per_device_train_batch_size "
                f"counts prompts), {self.num_generations} trajectories each, loss {' + '.join(self.args.loss_type)}."
            )

    def _build(self, model: str | PreTrainedModel) -> nn.Module:
        args, given = self.args, self._given
        self._start_recording()
        self._parts = parts = Parts.resolve(model, args, given)
        self._given = given.with_parts(parts)
        check_parts(parts, args.max_history_items, given.peft_config is not None)
        if not self._rows_are_checked:  # later models have the same catalog
            rows, eval_rows = self._first_rows
            check_datasets(rows, eval_rows.values() if isinstance(eval_rows, dict) else [eval_rows], parts.catalog)
            self._rows_are_checked = True
        self.losses: dict[str, LossSpec] = args.losses
        # Only for losses on the target, with or without negatives. Balance losses always use the tree.
        self._vocabulary = args.label_space == "vocabulary"
        self.num_generations = args.num_generations
        sampler = given.new_sampler() if self.model_init is not None else given.sampler
        sampler = self._default_sampler(args) if sampler is None else sampler
        self.sampler = build_sampler(sampler, temperature=args.temperature, epsilon=args.epsilon)
        if args.policy_temperature is not None:  # before the model is copied as its reference
            set_temperature(parts.model, args.policy_temperature)
        self._set_up_objective(parts, args, given.peft_config is not None)
        self._encoder, self._item_titles, self.noise = parts.encoder, parts.item_titles, StatelessNoise(args.seed)
        self.prefix_weights = self._make_prefix_weights(parts.catalog.tree.max_depth)
        self._policies_are_checked = False
        return self._trained_model(parts, args, given.peft_config)

    def _set_up_objective(self, parts: Parts, args: TreePolicyConfig, adapted: bool) -> None:
        """Set up rewards and the reference model before the model is changed. This class supports neither."""
        for name, loss in self.losses.items():
            if loss.needs_rewards or loss.needs_reference:
                raise ValueError(f"The loss {name!r} needs rewards or a reference model; use GFlowNetTrainer.")

    def _default_sampler(self, args: TreePolicyConfig) -> str | dict[str, float]:
        """Return the default sampler. Losses on the target alone need only one trajectory."""
        if any(loss.uses_negatives for loss in self.losses.values()):
            return {"ground_truth": 1, "uniform": args.num_generations - 1}
        self.num_generations = 1
        return "ground_truth"

    @property
    def _learns_flows(self) -> bool:
        """Whether the model gets a flow head."""
        return any(loss.needs_flow_heads for loss in self.losses.values())

    def _trained_model(self, parts: Parts, args: TreePolicyConfig, peft_config: PeftConfig | None) -> nn.Module:
        """Add adapters and a flow head to the model if they are needed, and return it."""
        model: Any = parts.model
        set_seed(args.seed)  # heads and adapters are initialized randomly
        if peft_config is None:
            merge_tied_embeddings(model)
        else:
            model = add_adapters(model, peft_config, parts.catalog, args.train_item_tokens)
        if self._learns_flows:
            # After the adapters, which would freeze or adapt the head.
            attach_flow_heads(model.get_base_model() if hasattr(model, "get_base_model") else model)
        return model

    def _make_prefix_weights(self, depth: int) -> dict[str, PrefixWeights]:
        """Create the prefix weights of the losses that use them."""
        weights = {
            name: loss.make_prefix_weights(depth, self._reduce_sum, self.args.loss_options(name))
            for name, loss in self.losses.items()
        }
        return {name: each for name, each in weights.items() if each is not None}

    def _send_telemetry(self) -> None:
        """Do nothing: gflowtrl sends no telemetry."""

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Create the Trainer's optimizer, with a separate parameter group and learning rate for the flow head."""
        exists = self.optimizer is not None
        optimizer: Any = super().create_optimizer(model)
        if not exists:
            split_head_group(optimizer, self.model if model is None else model, self.args.log_z_learning_rate)
        return optimizer

    # ---------------------------------------------------------------------------------------------------------- step
    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        """Run forward and backward of a micro-batch, then adapt the prefix weights after the last one of a step."""
        loss = super().training_step(*args, **kwargs)
        if self.accelerator.sync_gradients:
            for weights in self.prefix_weights.values():
                weights.step()
        return loss

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """Draw, score and balance trajectories. Return the loss, the mean over the micro-batch's prompts."""
        progress = self.state.global_step / self.state.max_steps if self.state.max_steps else 0.0
        step = Step.from_batch(inputs, self._catalog, progress)
        policy = self.policy_of(model)
        reward = self._reward(step, policy)
        drawn = self._draw(step, policy, reward)
        leaves, scores = self._score(step, policy, drawn)
        group = Group(step, drawn, leaves, scores, reward)
        self._score_rewards(group)
        loss = self._balance(group)
        self._observe(group)
        return (loss, {"loss": loss}) if return_outputs else loss

    def _reward(self, step: Step, policy: TreePolicy) -> StepReward | None:
        """Return R of the step's prompts; None without rewards."""
        return None

    def _draw(self, step: Step, policy: TreePolicy, reward: StepReward | None) -> Trajectories:
        noise = self.noise.at(self.state.global_step, step.row_ids)
        with self._timed("sample"):
            drawn = self.sampler.sample(step, policy, reward, self.num_generations, noise)
            leaves, sources = self._catalog.tree.num_leaves, len(self.sampler.source_names)
            validate_trajectories(drawn, len(step), self.num_generations, leaves, sources)
        return drawn

    def _score(self, step: Step, policy: TreePolicy, drawn: Trajectories) -> tuple[Tensor, StepScores]:
        """Score the drawn leaves, after the target if a loss uses it and it is not already the first leaf."""
        leaves = drawn.leaves
        with self._timed("score"):
            needed = any(loss.uses_target for loss in self.losses.values())
            if needed and not torch.equal(leaves[:, 0], step.target_leaves):
                leaves = torch.cat([step.target_leaves[:, None], leaves], 1)
            return leaves, policy.score(step.prompts, leaves, self._vocabulary)

    def _score_rewards(self, group: Group) -> None:
        """Add the rewards of the drawn trajectories to the group; nothing to do without rewards."""

    def _balance(self, group: Group) -> Tensor:
        """Return the weighted sum of the losses."""
        total = torch.zeros((), device=group.leaves.device)
        for name, loss in self.losses.items():
            per_trajectory = loss(self._inputs(loss, group), **loss.at_policy(self.args.loss_options(name)))
            if name in self.prefix_weights:
                per_trajectory = self._over_prefixes(name, per_trajectory, group.target.lengths[:, 0])
            if group.weights is not None and not loss.uses_target and not loss.per_prompt:
                per_trajectory = per_trajectory * group.weights
            reduced = per_trajectory.sum(1) if self.args.loss_reduction == "sum" else per_trajectory.mean(1)
            value = reduced.mean()
            self.record({f"loss/{name}": value})
            group.losses[name] = value
            total = total + self.args.weight_of[name] * value
        return total

    def _inputs(self, loss: LossSpec, group: Group) -> LossInputs:
        """Return the tensors of a loss: of the drawn trajectories, of the target, or of the target and negatives."""
        scores, leaves = group.scores, group.drawn.leaves
        if loss.uses_target:
            scores = group.all_scores if loss.uses_negatives else group.target
            leaves = group.leaves if loss.uses_negatives else group.leaves[:, :1]
        log_probs, ref_log_probs, tree = scores.log_probs, scores.ref_log_probs, self._catalog.tree
        if loss.any_label_space and scores.vocabulary_log_probs is not None:
            log_probs, ref_log_probs = scores.vocabulary_log_probs, scores.ref_vocabulary_log_probs
        prefixes = {"prefix_nodes", "nodes_per_depth"} & {*loss.inputs}
        return LossInputs(
            log_probs=log_probs,
            lengths=scores.lengths,
            child_log_probs=scores.child_log_probs,
            leaves=leaves,
            log_z=scores.log_z,
            log_flows=scores.log_flows,
            ref_log_probs=ref_log_probs,
            prefix_nodes=tree.walk(leaves)[:, :, 1:] if prefixes else None,
            nodes_per_depth=log_probs.new_tensor(tree.nodes_per_depth, dtype=torch.long) if prefixes else None,
        )

    def _over_prefixes(self, name: str, losses: Tensor, lengths: Tensor) -> Tensor:
        """Return the weighted sum over the target's prefixes, `(B, L) -> (B, 1)`."""
        weights = self.prefix_weights[name].weigh(losses, lengths)
        for m, (loss, prefix_weight) in enumerate(zip(losses.mean(0), weights, strict=True), 1):
            self.record({f"{name}/loss_{m}": loss, f"{name}/weight_{m}": prefix_weight})
        return (losses * weights).sum(1, keepdim=True)

    @torch.no_grad()
    def _observe(self, group: Group) -> None:
        """Record the metrics of the group and of the sampler."""
        self.note(group_parts(group))
        self.record(group_metrics(group, self.sampler.source_names))
        self.record({f"sampler/{name}": value for name, value in self.sampler.metrics().items()})
        if self.args.log_completions:
            self._last_group = group

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log the given values and the means of the recorded ones, and print a group if `log_completions` is set."""
        super().log(logs, start_time)
        if self.args.log_completions and "loss" in logs and self.is_world_process_zero():
            sources, step = self.sampler.source_names, self.state.global_step
            print_group(self._last_group, self._catalog, sources, step, self._item_titles)

    # --------------------------------------------------------------------------------------------------- checkpoints
    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write a complete recommender. Except for checkpoints, load the folder and compare it with the model."""
        super().save_model(output_dir, _internal_call)
        if not _internal_call:
            directory, kwargs = output_dir or str(self.args.output_dir), base_model_kwargs(self.args)
            check_saved(self, directory, self._catalog, self._encoder, **kwargs)

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        """Write a complete recommender. Flow heads get a separate file, so that `AutoModel` loads without warnings."""
        output_dir = output_dir or str(self.args.output_dir)
        state_dict, heads = split_heads(self.model.state_dict() if state_dict is None else state_dict)
        # DeepSpeed passes a copy of a tied weight under each of its names; it is saved under the first.
        for name, first in tied_weights(self.accelerator.unwrap_model(self.model)).items():
            if first in state_dict:
                state_dict.pop(name, None)
        super()._save(output_dir, state_dict)
        if not self.args.should_save:
            return
        if heads:
            save_file({name: value.contiguous().cpu() for name, value in heads.items()}, Path(output_dir, HEADS_FILE))
        write_recommender_files(output_dir, self._encoder, self._item_counts, self._item_titles)
        trained: Any = self.accelerator.unwrap_model(self.model)
        update_adapter_files(trained, output_dir)
        write_model_card(self, output_dir)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        save_sampler(self.sampler, output_dir, self.args.process_index, self.args.world_size)
        if self.args.should_save:
            save_prefix_weights(self.prefix_weights, output_dir)

    def _extra_state_files(self, checkpoint: str) -> list[str]:
        process, processes = self.args.process_index, self.args.world_size
        return extra_state_files(self.model, self.sampler, self.prefix_weights, checkpoint, process, processes)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None:
            load_sampler(self.sampler, checkpoint, self.args.process_index, self.args.world_size)
            load_prefix_weights(self.prefix_weights, checkpoint)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model=None) -> None:
        model = self.model if model is None else model
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        self._load_heads(resume_from_checkpoint, model)

    def _load_best_model(self) -> None:
        super()._load_best_model()
        self._load_heads(str(self.state.best_model_checkpoint), self.model)

    def _load_heads(self, directory: str, model) -> None:
        file = Path(directory, HEADS_FILE)
        if self.is_deepspeed_enabled:  # DeepSpeed's checkpoint contains the heads
            return
        if file.is_file():
            with loading_state(file):
                load_heads(model, read_tensors(file))
        elif HEADS_FILE in self._extra_state_files(directory):
            raise ValueError(
                f"{file} is missing: it contains the flow heads of the losses {self.args.loss_type}. Resume from "
                f"another checkpoint."
            )

    def _issue_warnings_after_load(self, load_result) -> None:
        """Warn as usual, except about flow heads, which are not in the model's file."""
        load_result.missing_keys[:] = [name for name in load_result.missing_keys if not is_head(name)]
        super()._issue_warnings_after_load(load_result)

    def create_model_card(
        self, model_name: str | None = None, dataset_name: str | None = None, tags: str | list[str] | None = None
    ) -> None:
        """Write `README.md` to the output folder (called by `push_to_hub`).

        Args:
            model_name, dataset_name: names that the card shows. Default: the folder's, and none.
            tags: tags in addition to those of the method.
        """
        if self.is_world_process_zero():
            os.makedirs(str(self.args.output_dir), exist_ok=True)
            write_model_card(self, str(self.args.output_dir), model_name, dataset_name, tags)

    def card_settings(self) -> dict[str, Any]:
        """Return the training settings for the model card."""
        losses = ", ".join(f"{weight:g} x {name}" for name, weight in self.args.weight_of.items())
        return {"prompts per step": rows_per_step(self.args), "losses": losses}

    def card_methods(self) -> list[str]:
        """Return the methods to cite in the model card: keys of `model_card.PAPERS`."""
        balances = any(loss.needs_log_rewards for loss in self.losses.values())
        methods = {"balance": balances, "prefix": bool(self.prefix_weights)}
        return [method for method, used in methods.items() if used]
