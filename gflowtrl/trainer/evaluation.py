"""Evaluation by what counts: the quality and breadth of constrained beam search, independent of any reward."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor, nn
from torch.utils.data import SequentialSampler
from tqdm.auto import tqdm
from transformers import EvalPrediction, TrainingArguments

from gflowtrl.catalog import ItemCatalog
from gflowtrl.data import GroupCollator, PromptEncoder, Step, history_lengths
from gflowtrl.finite import NonFiniteError, bad_ranking, check_ranked, describe
from gflowtrl.metrics import binned_by_target, jensen_shannon, summarize, total_variation
from gflowtrl.policy import TreePolicy, check_exact, make_policy
from gflowtrl.rewards import CompositeReward

from .best_metric import LOGGED_METRICS, settle_metric
from .checkpoints import TrainerBase
from .finite_steps import nonfinite_weight
from .reference import ReferencePrior


def rows_per_step(args: TrainingArguments) -> int:
    """Training rows (prompts) that one optimizer step reads, over all micro-batches and processes."""
    return args.train_batch_size * args.gradient_accumulation_steps * args.world_size


class RankingEvaluationMixin(TrainerBase):
    """Gives any `transformers.Trainer` (also TRL's SFTTrainer) ranking and breadth metrics of constrained beam search.

    Call `set_up_ranking` after the constructor. `evaluate()` then takes rows `{"row_id", "history", "target", ...}`
    and returns `eval_recall@10`, `eval_ndcg@10`, `eval_coverage@10`, ... through the Trainer's own evaluation loop, so
    that `metric_for_best_model="eval_ndcg@10"`, early stopping and sharded engines work as ever.
    """

    _policies_are_checked = False

    def set_up_ranking(
        self,
        catalog: ItemCatalog,
        encoder: PromptEncoder,
        item_counts: Tensor,
        num_beams: int = 20,
        ks: Sequence[int] = (5, 10, 20),
    ) -> None:
        """Say what to rank and how.

        Args:
            catalog, encoder: the items, and what makes prompts of histories.
            item_counts: `(items,)` training interactions, for popularity groups, novelty and the long tail.
            num_beams: beam width; must reach the largest cut-off.
            ks: cut-offs of the lists.

        Raises:
            ValueError: counts of another catalog, or a `metric_for_best_model` that will not be reported.
        """
        if item_counts.shape != (len(catalog),):
            raise ValueError(
                f"item_counts has shape {tuple(item_counts.shape)}, but the catalog has {len(catalog)} items; give "
                f"one number for each, in the order of catalog.items."
            )
        self._catalog, self._item_counts = catalog, item_counts
        self._num_beams, self._ks = num_beams, tuple(ks)
        self._ranking_collator = GroupCollator(encoder)
        self.compute_metrics = self._ranking_metrics
        self.args.remove_unused_columns = False  # histories and targets are no argument of the model's forward
        self._settle_metric()

    def _settle_metric(self) -> None:
        own = [getattr(type(self), name).__module__.partition(".")[0] for name in ("evaluate", "evaluation_loop")]
        more = not {*own} <= {"gflowtrl", "transformers", "trl"}  # a subclass that adds metrics
        settle_metric(self.args, self._ks, self.eval_dataset, self.callback_handler.callbacks, more)

    def train(self, *args: Any, **kwargs: Any):
        """As ever; a callback that was added meanwhile may need a metric."""
        self._settle_metric()
        return super().train(*args, **kwargs)

    def policy_of(self, model: nn.Module) -> TreePolicy:
        """The (wrapped) model read as a policy; the first time it is compared with the model's own distribution."""
        policy = make_policy(model, self._catalog)
        if not self._policies_are_checked:
            self._policies_are_checked = True
            dtype = torch.bfloat16 if self.args.bf16 else torch.float16 if self.args.fp16 else None
            for each in [policy, *self._frozen_policies()]:
                check_exact(each, self._ranking_collator.encoder, dtype)
        return policy

    def _frozen_policies(self) -> list[TreePolicy]:
        """Other policies that the training reads."""
        return []

    def card_settings(self) -> dict[str, Any]:
        """What the model card says about the training."""
        return {"rows per step": rows_per_step(self.args)}

    def card_methods(self) -> list[str]:
        """Whose methods these are: keys of `model_card.PAPERS`."""
        return []

    def get_eval_dataloader(self, eval_dataset: str | Dataset | None = None):
        """The evaluation rows, longest histories first (less padding, and memory runs out at once or never)."""
        rows: Any = eval_dataset
        if not isinstance(eval_dataset, Dataset):
            own_rows: Any = self.eval_dataset
            rows = own_rows if eval_dataset is None else own_rows[eval_dataset]
        if rows is None:
            raise ValueError("There is nothing to evaluate on; give the trainer an eval_dataset, or evaluate() rows.")
        own, self.data_collator = self.data_collator, self._ranking_collator
        drop_last, self.args.dataloader_drop_last = self.args.dataloader_drop_last, False  # nobody is left out
        try:
            ordered: Any = by_length(rows)[0]
            return super().get_eval_dataloader(ordered)
        finally:
            self.data_collator, self.args.dataloader_drop_last = own, drop_last

    def _get_eval_sampler(self, eval_dataset: Dataset) -> SequentialSampler:
        return SequentialSampler(eval_dataset)  # sorted already

    def evaluation_loop(self, *args: Any, **kwargs: Any):
        """The Trainer's loop; a model that computes NaN is refused, by all processes alike."""
        self._bad_rankings = torch.zeros((), dtype=torch.bool)
        model: Any = self.model
        if (weight := nonfinite_weight(self, model)) is not None:
            raise NonFiniteError(f"{describe(model)} cannot be evaluated: its weight {weight!r} is not finite.")
        output = super().evaluation_loop(*args, **kwargs)
        bad: Any = self.accelerator.gather(self._bad_rankings.to(self.args.device).int()[None])
        if bool(bad.any()):
            raise NonFiniteError(
                f"{describe(model)} cannot be evaluated: its log-probabilities are NaN, although its weights are "
                f"finite. Its numbers overflow: evaluate in bf16 or float32."
            )
        return output

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        """Ranked leaves `(B, beams)` as predictions, target leaves `(B,)` as labels; there is no loss."""
        batch: Any = self._prepare_inputs(inputs)
        leaves, log_probs = self.policy_of(model).beam_search(batch["prompts"], self._num_beams)
        self._bad_rankings = self._bad_rankings.to(leaves.device) | bad_ranking(leaves, log_probs)
        return None, leaves, self._catalog.leaf_of(batch["rows"].columns["target"]).to(leaves.device)

    def _ranking_metrics(self, prediction: EvalPrediction) -> dict[str, float]:
        leaves, targets = torch.as_tensor(prediction.predictions), torch.as_tensor(prediction.label_ids)
        metrics = summarize(leaves, targets, self._catalog, self._item_counts, self._ks).metrics
        return {name: value for name, value in metrics.items() if name.split("@")[0] in LOGGED_METRICS}


def by_length(rows: Dataset) -> tuple[Dataset, Tensor]:
    """Rows sorted by falling history length, and the order: `rows[order[i]]` is row i of the result."""
    order = torch.argsort(history_lengths(rows), descending=True, stable=True)
    return rows.select(order.tolist()), order


def rank_rows(
    policy: TreePolicy,
    encoder: PromptEncoder,
    rows: Dataset,
    num_beams: int = 20,
    batch_size: int = 256,
    progress: bool = True,
) -> Tensor:
    """Constrained beam search for every row, in one process.

    Returns:
        `(rows, num_beams)` leaves in the order of `rows`, best first, -1 where the catalog has fewer leaves.

    Raises:
        ValueError: the policy is not the model's own distribution (`check_exact`).
        NonFiniteError: the model computes NaN.
    """
    check_exact(policy, encoder)
    device = next(policy.model.parameters()).device
    ordered, order = by_length(rows)
    histories = ordered["history"]
    ranked = torch.empty(len(rows), num_beams, dtype=torch.long)
    for start in tqdm(range(0, len(rows), batch_size), desc="Ranking", disable=not progress):
        prompts = {k: v.to(device) for k, v in encoder(histories[start : start + batch_size]).items()}
        leaves, log_probs = policy.beam_search(prompts, num_beams)
        check_ranked(leaves, log_probs, policy.model)
        ranked[order[start : start + batch_size]] = leaves.cpu()
    return ranked


@torch.no_grad()
def compare_with_rewards(
    policy: TreePolicy,
    rewards: CompositeReward,
    encoder: PromptEncoder,
    rows: Dataset,
    batch_size: int = 16,
    progress: bool = True,
    bins: bool = False,
    prior: ReferencePrior | None = None,
) -> dict[str, Tensor]:
    """How far the policy is from R / Z, exactly, over all leaves: what a GFlowNet promises to make small.

    The whole distribution costs about as much as one token for every inner node of the tree and row: meant for some
    hundred rows of a catalog of thousands.

    Args:
        policy: of a model in evaluation mode.
        rewards: all of them with `score_items`; `trainer.rewards` of a `GFlowNetTrainer`.
        encoder: makes prompts of histories.
        rows: with the columns that the rewards read.
        batch_size: rows at once.
        progress: show a bar.
        bins: also sum both up over leaves of like target, for a reliability diagram.
        prior: of a target pi_ref^weight * R / Z: `trainer.prior` of a `GFlowNetTrainer` with a `ref_weight`.

    Returns:
        `"total_variation"` in [0, 1] and `"jensen_shannon"` in nats, each `(rows,)`, in double precision; with `bins`
        also what `metrics.binned_by_target` gives, each `(rows, bins)`.

    Raises:
        ValueError: a reward scores drawn leaves only.
    """
    collate, device = GroupCollator(encoder), next(policy.model.parameters()).device
    found: list[dict[str, Tensor]] = []
    for start in tqdm(range(0, len(rows), batch_size), desc="Comparing with R / Z", disable=not progress):
        batch = collate([rows[i] for i in range(start, min(start + batch_size, len(rows)))])
        batch["prompts"] = {name: value.to(device) for name, value in batch["prompts"].items()}
        step = Step.from_batch(batch, policy.catalog)
        log_probs = policy.leaf_log_probs(step.prompts)
        check_ranked(torch.zeros_like(log_probs), log_probs, policy.model)
        probs = log_probs.double().exp()
        log_target = rewards.dense(step).result.log_rewards.double()
        if prior is not None:
            log_target = log_target + prior.score_all(policy.model, step.prompts)
        target = log_target.softmax(1)
        part = {"total_variation": total_variation(probs, target), "jensen_shannon": jensen_shannon(probs, target)}
        found.append(part | (binned_by_target(probs, target) if bins else {}))
    return {name: torch.cat([part[name] for part in found]).cpu() for name in found[0]}
