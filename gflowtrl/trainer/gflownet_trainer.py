"""`GFlowNetTrainer`: draw trajectories, reward them, score them, balance."""

from __future__ import annotations

import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from datasets import Dataset
from peft import PeftConfig
from torch import Tensor, nn
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback, set_seed

from gflowtrl.catalog import Item, ItemCatalog
from gflowtrl.data import GroupCollator, PromptEncoder
from gflowtrl.losses import LossSpec, get_loss, node_flows, normalised_flows
from gflowtrl.policy import (
    StatelessNoise,
    StepScores,
    TreePolicy,
    attach_flow_heads,
    load_backbone,
    make_policy,
    merge_tied_embeddings,
)
from gflowtrl.policy.heads import split_heads
from gflowtrl.recommender import read_encoder
from gflowtrl.rewards import RewardFusion, RewardResult, rewards_by_rows, top_rewards
from gflowtrl.samplers import Sampler, TrajectoryBatch, build_sampler, validate_trajectories

from .adapters import add_adapters
from .base import BaseTrainer
from .checks import check_encoder, check_model, check_rows, check_trainable, item_counts_of
from .folder import folder_details
from .gflownet_config import GFlowNetConfig
from .group import Group, group_metrics, print_group
from .prefixes import PrefixWeights, load_prefix_weights, save_prefix_weights
from .reference import build_prior
from .sampler_state import load_sampler, save_sampler
from .weighting import source_table, weights_by_reward, weights_by_source


class GFlowNetTrainer(BaseTrainer):
    """Fine-tunes a generative recommender so that it recommends items in proportion to their reward.

    For every prompt K trajectories are drawn by the sampler, rewarded, scored by the policy in one packed forward, and
    balanced by the losses of `args.loss_type`. Derives from the base class of TRL's SFTTrainer and DPOTrainer, with
    their argument names; **one difference**: `per_device_train_batch_size` counts prompts, not completions.

    Args:
        model: a causal language model or an encoder-decoder, or the name or folder of one.
        reward_funcs: one reward or a list. Any callable with TRL's signature `(prompts, completions, completion_ids,
            **dataset_columns) -> list[float | None]`, which also gets `items`; or one of `gflowtrl.rewards`. Not
            needed for `loss_type=["sft"]`.
        args: the configuration.
        train_dataset, eval_dataset: rows `{"row_id", "history", "target", ...}` as `gflowtrl.data.leave_one_out` makes
            them; further columns reach the rewards.
        processing_class: the tokenizer; by default that of `model`'s folder.
        catalog: the items; by default that of `model`'s folder.
        sampler: where trajectories come from: a name (`"on_policy"`, `"reward"`, ...), a mixture
            `{"ground_truth": 1, "on_policy": 3}`, or a `Sampler`. By default the observed target and K - 1 on policy;
            under `exact_flow` alone, K from the reward itself.
        ref_model: the reference model of the target pi_ref^ref_weight * R, and of the losses that compare with one
            (`sdpo`, `grpo`), or its name or folder; never trained. Where one is asked for and none is given, it is the
            model as it is before training: under `peft_config` the trained one with its adapters switched off, else a
            copy.
        peft_config: a PEFT configuration; adapters are trained instead of the model, and with them the embeddings of
            the items' tokens (`args.train_item_tokens`).
        item_counts: `(items,)` training interactions in the order of `catalog.items`, for the breadth metrics; by
            default those of `model`'s folder, else counted in the training targets.
        item_titles: what items are called, for the answers of the saved recommender and for `log_completions`; by
            default those of `model`'s folder.
        prompt_encoder: what makes prompts of histories; by default that of `model`'s folder, else the plain one
            (`gflowtrl.data.TextPromptEncoder` writes prompts in words).
        callbacks, optimizers: as in `transformers.Trainer`.

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

    def __init__(
        self,
        model: str | PreTrainedModel,
        reward_funcs: Callable | Sequence[Callable] | None = None,
        args: GFlowNetConfig | None = None,
        train_dataset: Dataset | None = None,
        eval_dataset: Dataset | dict[str, Dataset] | None = None,
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
    ):
        args = GFlowNetConfig("gflownet-output") if args is None else args
        model_kwargs = args.model_init_kwargs or {}
        if isinstance(model, str):
            processing_class = processing_class or AutoTokenizer.from_pretrained(model)
            catalog = catalog or ItemCatalog.from_pretrained(model)
            if prompt_encoder is None:
                prompt_encoder = read_encoder(model, catalog, processing_class)
                prompt_encoder.max_history_items = args.max_history_items or prompt_encoder.max_history_items
            known = folder_details(model, catalog)
            item_titles = known.get("titles") if item_titles is None else item_titles
            item_counts = known.get("item_counts") if item_counts is None else item_counts
            model = load_backbone(model, **model_kwargs)
        elif args.model_init_kwargs:
            raise ValueError("model_init_kwargs was given, but the model is built already; pass its name or folder.")
        if processing_class is None or catalog is None:
            raise ValueError("processing_class and catalog are needed where the model is not given by its folder.")
        check_model(model, catalog, args.max_shared_prompts)
        check_trainable(model, peft_config is not None)
        self.losses = [(name, get_loss(name), w) for name, w in zip(args.loss_type, args.loss_weights, strict=True)]
        self._needs_rewards = any(loss.rewards for _, loss, _ in self.losses)
        self._exact = any(loss.all_leaf_rewards for _, loss, _ in self.losses)
        # L_m over the vocabulary, and cross entropy, are of the target; balance is always over the tree.
        self._vocabulary = args.label_space == "vocabulary" and any(loss.any_label_space for _, loss, _ in self.losses)
        self._set_up_rewards(reward_funcs, args, catalog, processing_class)
        self._set_up_sampler(sampler, args)
        for dataset in [train_dataset, *(eval_dataset.values() if isinstance(eval_dataset, dict) else [eval_dataset])]:
            check_rows(dataset, catalog)
        self._compares = any(loss.reference for _, loss, _ in self.losses)
        self.reference = build_prior(
            args.ref_weight, catalog, ref_model, model, peft_config is not None, self._compares, **model_kwargs
        )
        self.prior = self.reference if args.ref_weight else None
        set_seed(args.seed)  # heads and adapters begin at random
        if peft_config is None:
            merge_tied_embeddings(model)
        else:
            model = add_adapters(model, peft_config, catalog, args.train_item_tokens)
        if any(loss.heads for _, loss, _ in self.losses):
            # After the adapters, which would freeze or adapt the head.
            attach_flow_heads(model.get_base_model() if hasattr(model, "get_base_model") else model)
        if prompt_encoder is None:
            prompt_encoder = PromptEncoder(catalog, processing_class, args.max_history_items or 20)
        check_encoder(prompt_encoder, catalog, args.max_shared_prompts, args.max_history_items)
        self._encoder, self._item_titles = prompt_encoder, item_titles
        self.noise = StatelessNoise(args.seed)
        self._seconds: Counter[str] = Counter()
        super().__init__(
            model=model,
            args=args,
            data_collator=GroupCollator(self._encoder, args.max_shared_prompts),
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            callbacks=callbacks,
            optimizers=optimizers,
        )
        if self.reference is not None:
            self.reference.prepare(self.accelerator)
        self.prefix_weights = {
            name: PrefixWeights(catalog.tree.max_depth, args.prefix_eta, args.prefix_variant, self._total)
            for name, loss, _ in self.losses
            if loss.per_prefix
        }
        counts = item_counts_of(train_dataset, catalog) if item_counts is None else item_counts
        self.set_up_ranking(catalog, self._encoder, counts, args.eval_num_beams, args.eval_ks)
        if self.is_world_process_zero():
            prompts = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
            print(
                f"{type(self).__name__}: {prompts} prompts a step (per_device_train_batch_size counts prompts), "
                f"{self.num_generations} trajectories each, loss {' + '.join(args.loss_type)}."
            )

    def _set_up_rewards(self, reward_funcs, args: GFlowNetConfig, catalog, tokenizer) -> None:
        self.rewards: RewardFusion | None = None
        if reward_funcs is not None and reward_funcs != []:
            self.rewards = fuse_rewards(reward_funcs, args, catalog, tokenizer)
        if self._needs_rewards and self.rewards is None:
            raise ValueError(f"loss_type {args.loss_type} needs a reward; give reward_funcs (see gflowtrl.rewards).")
        if not self._exact:
            return
        if not self.rewards.can_score_all:
            lacking = ", ".join(map(repr, self.rewards.sampled_only))
            raise ValueError(
                f"exact_flow needs the reward of every leaf, but {lacking} scores only given completions. Give it "
                f"a method score_items(batch) -> Tensor (B, items), or use loss_type='vargrad'."
            )
        table = args.per_device_train_batch_size * catalog.tree.num_leaves
        if table <= args.max_exact_elements:
            return
        where = f"{args.per_device_train_batch_size} prompts x {catalog.tree.num_leaves} leaves = {table} numbers"
        if args.ref_weight:
            raise ValueError(
                f"exact_flow with a reference model needs its probability of every leaf, a table of {where}, but "
                f"max_exact_elements is {args.max_exact_elements}. Lower per_device_train_batch_size, raise "
                f"max_exact_elements, or use loss_type='vargrad'."
            )
        warnings.warn(
            f"exact_flow would need a table of {where}, more than max_exact_elements={args.max_exact_elements}: only "
            f"the exact_top_items={args.exact_top_items} best leaves of each prompt keep their own reward, and all "
            f"others share the rest of the mass evenly.",
            stacklevel=3,
        )

    def _set_up_sampler(self, sampler, args: GFlowNetConfig) -> None:
        self.num_generations = args.num_generations
        if not self._needs_rewards and sampler is None:
            if any(loss.against_group for _, loss, _ in self.losses):
                sampler = {"ground_truth": 1, "uniform": args.num_generations - 1}
            else:
                sampler, self.num_generations = "ground_truth", 1
        elif sampler is None and all(loss.all_leaf_rewards or loss.on_target for _, loss, _ in self.losses):
            sampler = "reward"
        elif sampler is None:
            sampler = {"ground_truth": 1, "on_policy": args.num_generations - 1}
        self.sampler = build_sampler(sampler, temperature=args.temperature, epsilon=args.epsilon)
        self._source_table = source_table(args.source_weights or {}, self.sampler.source_names)

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """The Trainer's optimizer, in which the flow head has parameter groups, and a learning rate, of its own."""
        if self.optimizer is not None:
            return self.optimizer
        optimizer = super().create_optimizer(model)
        heads = split_heads(dict((self.model if model is None else model).named_parameters()))[1]
        own = {id(parameter) for parameter in heads.values()}
        for group in list(optimizer.param_groups):
            moved = [parameter for parameter in group["params"] if id(parameter) in own]
            if moved:
                group["params"] = [parameter for parameter in group["params"] if id(parameter) not in own]
                optimizer.add_param_group({**group, "params": moved, "lr": self.args.log_z_learning_rate})
        return optimizer

    # ---------------------------------------------------------------------------------------------------------- step
    def training_step(self, *args, **kwargs) -> Tensor:
        """Forward and backward of a micro-batch; records how long it and its parts took."""
        with self._timed("step"):
            loss = super().training_step(*args, **kwargs)
        self.record({f"seconds/{part}": seconds for part, seconds in self._seconds.items()})
        self._seconds.clear()
        if self.accelerator.sync_gradients:
            for weights in self.prefix_weights.values():
                weights.step()
        return loss

    def _total(self, tensor: Tensor) -> Tensor:
        return self.accelerator.reduce(tensor, "sum")

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """Draw, reward, score, balance. Returns the loss, a mean over the micro-batch's prompts."""
        batch = dict(inputs, cache={}, progress=self._progress())
        self._catalog.to(batch["row_id"].device)
        batch["target_leaf"] = self._catalog.leaf_of(batch["target"])
        policy = batch["policy"] = make_policy(model, self._catalog)
        self._reward_all(model, batch)
        with self._timed("sample"):
            trajectories = self._draw(policy, batch)
        with self._timed("score"):
            target_first, leaves = self._with_targets(batch, trajectories.leaves)
            scores = policy.score(batch["prompts"], leaves, self._vocabulary)
        if self._compares:
            with self._timed("reference"):
                ref_log_probs = self.reference.token_log_probs(model, batch["prompts"], leaves)
            scores = replace(scores, ref_log_probs=ref_log_probs)
        drawn = scores.of_trajectories(slice(target_first, None))
        # A reward may be the policy's own likelihood, which is known now.
        batch |= {"policy_leaves": trajectories.leaves, "policy_log_probs": drawn.trajectory_log_probs.detach()}
        rewards, log_prior = self._reward(model, batch, trajectories.leaves)
        weight = 0.0 if self.prior is None else self.prior.weight
        group = Group(batch, trajectories, drawn, rewards, log_prior, weight, self._flows(batch))
        group.weights = self._weights(group)
        loss = self._balance(group, scores, leaves)
        self.record(group_metrics(group, self.sampler.source_names))
        self._tell_sampler(group)
        if self.args.log_completions:
            self._last_group = group
        return (loss, {"loss": loss}) if return_outputs else loss

    def _progress(self) -> float:
        """The share of the training that is done, in [0, 1)."""
        return self.state.global_step / self.state.max_steps if self.state.max_steps else 0.0

    def _reward_all(self, model: nn.Module, batch: dict[str, Any]) -> None:
        """Put log R of all leaves into the batch where it can be known; under `exact_flow` with the prior.

        Where the table would be too large, `exact_flow` gets the best leaves of each prompt instead.
        """
        if self.rewards is None:
            return
        if not self.rewards.scores_all(len(batch["target"])):
            if self._exact:
                with self._timed("reward"):
                    batch["top_rewards"] = top_rewards(self.rewards, batch, self.args.exact_top_items)
            return
        with self._timed("reward"):
            batch["leaf_log_rewards"] = self.rewards.leaf_log_rewards(batch)
        if self._exact and self.prior is not None:
            with self._timed("reference"):
                batch["leaf_log_prior"] = self.prior.score_all(model, batch["prompts"])
            batch["leaf_log_rewards"] = batch["leaf_log_rewards"] + batch["leaf_log_prior"]

    def _reward(
        self, model: nn.Module, batch: dict[str, Any], leaves: Tensor
    ) -> tuple[RewardResult | None, Tensor | None]:
        """Rewards of the trajectories with the prior in log R, and the prior `(B, K)`."""
        if self.rewards is None:
            return None, None
        log_prior = None
        with self._timed("reward"):
            if "top_rewards" in batch:
                rewards = rewards_by_rows(self.rewards, batch, leaves)
            else:
                rewards = self.rewards.log_rewards(batch, leaves, self.state)
        if self.prior is not None:
            with self._timed("reference"):
                known = batch.get("leaf_log_prior")
                log_prior = (
                    self.prior.score(model, batch["prompts"], leaves) if known is None else known.gather(1, leaves)
                )
            rewards = replace(rewards, log_rewards=rewards.log_rewards + log_prior)
        return rewards, log_prior

    def _flows(self, batch: dict[str, Any]) -> Callable[[Tensor], Tensor] | None:
        """log F of any nodes, from the best leaves or from the table of all: what `exact_flow` balances towards."""
        if not self._exact:
            return None
        tree = self._catalog.tree
        if "top_rewards" in batch:
            return partial(batch["top_rewards"].log_flows, tree)
        with self._timed("reward"):
            return partial(node_flows, tree.log_flows(batch["leaf_log_rewards"]))

    def _draw(self, policy: TreePolicy, batch: dict[str, Any]) -> TrajectoryBatch:
        noise = self.noise.at(self.state.global_step, batch["row_id"])
        trajectories = self.sampler.sample(batch, policy, self.num_generations, noise)
        validate_trajectories(trajectories, len(batch["row_id"]), self.num_generations, self._catalog.tree.num_leaves)
        return trajectories

    def _with_targets(self, batch: dict[str, Any], leaves: Tensor) -> tuple[int, Tensor]:
        """Put the target before the group where a loss needs it and the group does not begin with it."""
        if not any(loss.on_target for _, loss, _ in self.losses):
            return 0, leaves
        if torch.equal(leaves[:, 0], batch["target_leaf"]):
            return 0, leaves
        return 1, torch.cat([batch["target_leaf"][:, None], leaves], 1)

    def _weights(self, group: Group) -> Tensor | None:
        """`(B, K)`, of mean 1 within a prompt, or None for equal ones."""
        if self.args.trajectory_weighting == "source":
            return weights_by_source(self._source_table, group.trajectories.source)
        if self.args.trajectory_weighting == "reward":
            return weights_by_reward(group.rewards.log_rewards)
        return None

    def _balance(self, group: Group, all_scores: StepScores, leaves: Tensor) -> Tensor:
        """The weighted sum of the losses; `all_scores` and `leaves` are those of the group, behind the observed target
        where a loss needs it."""
        options = vars(self.args) | {  # a loss picks those it has
            "delta": self.args.contrastive_delta, "lam": self.args.subtb_lambda,
            "token_mean": self.args.sft_reduction == "mean", "scale_negatives": self.args.prefix_variant == "2025",
        }  # fmt: skip
        target, tree = all_scores.of_trajectories(slice(0, 1)), self._catalog.tree
        total = 0.0
        for name, loss, weight in self.losses:
            scores = group.scores
            if loss.on_target:
                scores = all_scores if loss.against_group else target
            tensors = {
                "log_probs": self._target_log_probs(loss, scores),
                "child_log_probs": scores.child_log_probs,
                "lengths": scores.lengths,
                "log_z": scores.log_z,
                "log_flows": scores.log_flows,
                "log_rewards": None if group.rewards is None else group.rewards.log_rewards,
                "ref_log_probs": scores.ref_log_probs,
                "leaves": leaves,
            }
            if loss.all_leaf_rewards:
                tensors["child_target_log_probs"] = normalised_flows(group.flows(scores.child_nodes))
            if "advantages" in loss.inputs:
                tensors["advantages"] = normalised(group.rewards.rewards)
            if loss.per_prefix and loss.against_group:
                tensors["prefix_nodes"] = tree.walk(leaves)[:, :, 1:]
                tensors["nodes_per_depth"] = torch.tensor(tree.nodes_per_depth, device=leaves.device)
            per_trajectory = loss(tensors, **options)
            if loss.per_prefix:
                per_trajectory = self._over_prefixes(name, per_trajectory, target.lengths[:, 0])
            if group.weights is not None and not loss.on_target:
                per_trajectory = per_trajectory * group.weights
            reduced = per_trajectory.sum(1) if self.args.loss_reduction == "sum" else per_trajectory.mean(1)
            value = reduced.mean()
            self.record({f"loss/{name}": value})
            total = total + weight * value
        return total

    def _target_log_probs(self, loss: LossSpec, scores: StepScores) -> Tensor:
        return scores.vocabulary_log_probs if self._vocabulary and loss.any_label_space else scores.log_probs

    def _over_prefixes(self, name: str, losses: Tensor, lengths: Tensor) -> Tensor:
        """The weighted sum over the target's prefixes, `(B, L) -> (B, 1)`."""
        weights = self.prefix_weights[name].weigh(losses, lengths)
        for m, (loss, prefix_weight) in enumerate(zip(losses.mean(0), weights, strict=True), 1):
            self.record({f"{name}/loss_{m}": loss, f"{name}/weight_{m}": prefix_weight})
        return (losses * weights).sum(1, keepdim=True)

    # ------------------------------------------------------------------------------------------------------- metrics
    @torch.no_grad()
    def _tell_sampler(self, group: Group) -> None:
        """What became of its trajectories, to the sampler; and what it reports, to the log."""
        if group.rewards is not None:
            feedback = {
                "log_rewards": group.rewards.log_rewards,
                "residual": group.residuals()[1],
                "log_pi": group.scores.trajectory_log_probs,
            }
            feedback = {name: values.detach() for name, values in feedback.items()}
            self.sampler.observe(group.batch, group.trajectories, feedback)
        self.record({f"sampler/{name}": value for name, value in self.sampler.metrics().items()})

    @contextmanager
    def _timed(self, part: str) -> Iterator[None]:
        """Add up the seconds of a part of the step, as the host sees them."""
        start = time.perf_counter()
        yield
        self._seconds[part] += time.perf_counter() - start

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        super().log(logs, start_time)
        if self.args.log_completions and "loss" in logs and self.is_world_process_zero():
            sources, step = self.sampler.source_names, self.state.global_step
            print_group(self._last_group, self._catalog, sources, step, self._item_titles)

    # --------------------------------------------------------------------------------------------------- checkpoints
    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        save_sampler(self.sampler, output_dir, self.args.process_index, self.args.world_size)
        if self.args.should_save:
            save_prefix_weights(self.prefix_weights, output_dir)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None:
            load_sampler(self.sampler, checkpoint, self.args.process_index, self.args.world_size)
            load_prefix_weights(self.prefix_weights, checkpoint)

    def card_settings(self) -> dict[str, Any]:
        """What the model card says about the training."""
        settings = {"prompts per step": super().card_settings()["rows per step"]}
        settings["losses"] = ", ".join(f"{weight:g} x {name}" for name, _, weight in self.losses)
        if self.rewards is not None:
            settings["rewards"] = ", ".join(
                f"{w:g} x {name}" for name, w in zip(self.rewards.names, self.rewards.weights, strict=True)
            )
            settings["trajectories"] = f"{self.num_generations} a prompt from {', '.join(self.sampler.source_names)}"
        if self.prior is not None:
            settings["reference model"] = f"prior to the power of {self.prior.weight:g}"
        if self.args.trajectory_weighting is not None:
            settings["weights of trajectories"] = f"by {self.args.trajectory_weighting}"
        return settings

    def card_methods(self) -> list[str]:
        found = {"balance": any(loss.balances for _, loss, _ in self.losses)}
        found["prefix"] = any(loss.per_prefix for _, loss, _ in self.losses)
        return [method for method, used in found.items() if used]


def normalised(rewards: Tensor) -> Tensor:
    """Rewards `(B, K)` as GRPO's advantages: of mean 0 and deviation 1 within a group, 0 where all are equal."""
    return (rewards - rewards.mean(1, keepdim=True)) / (rewards.std(1, keepdim=True) + 1e-4)


def fuse_rewards(
    reward_funcs: Callable | Sequence[Callable],
    args: GFlowNetConfig,
    catalog: ItemCatalog,
    tokenizer: PreTrainedTokenizerBase,
) -> RewardFusion:
    """R as a trainer with these arguments computes it."""
    return RewardFusion(
        reward_funcs, catalog, tokenizer, args.reward_weights, args.reward_transform, args.reward_beta,
        args.reward_floor, args.leaf_reduction, args.max_exact_elements,
    )  # fmt: skip
