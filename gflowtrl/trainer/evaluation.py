"""Evaluation of the quality and breadth of constrained beam search, independent of any reward."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor, nn
from torch.utils.data import SequentialSampler
from tqdm.auto import tqdm
from transformers import EvalPrediction, TrainingArguments

from gflowtrl.catalog import ItemCatalog, SeenItems
from gflowtrl.data import ExposedCollator, GroupCollator, PromptEncoder, Step, has_exposed_rows, history_lengths
from gflowtrl.finite import NonFiniteError, bad_ranking, check_ranked, describe
from gflowtrl.metrics import (
    binned_by_target,
    exposed_metrics,
    jensen_shannon,
    mean_over_users,
    summarize,
    total_variation,
)
from gflowtrl.policy import TreePolicy, check_exact, make_policy
from gflowtrl.rewards import CompositeReward

from .best_metric import LOGGED_METRICS, resolve_metric
from .checkpoints import TrainerBase
from .exposed import unchecked_log_probs
from .finite_steps import nonfinite_weight
from .input_checks import check_rows
from .reference import ReferencePrior
from .row_sources import evaluation_rows


def rows_per_step(args: TrainingArguments) -> int:
    """Return the number of training rows (prompts) per optimizer step, over all micro-batches and processes."""
    return args.train_batch_size * args.gradient_accumulation_steps * args.world_size


class RankingEvaluationMixin(TrainerBase):
    """Mixin for any `transformers.Trainer` (also TRL's SFTTrainer): ranking and breadth metrics of constrained beam
    search.

    Call `set_up_ranking` after the constructor. `evaluate()` then takes rows `{"row_id", "history", "target", ...}`
    and returns `eval_recall@10`, `eval_ndcg@10`, `eval_coverage@10`, ... It uses the Trainer's evaluation loop, so
    `metric_for_best_model="eval_ndcg@10"`, early stopping and sharded engines work as usual.

    With rows of exposed items (`gflowtrl.data.exposed_rows`) it returns `eval_ndcg@5`, `eval_recall@5` and `eval_auc`
    of their ranking by the policy, means over the users for whom each one is defined.

    `predict()` takes the same rows. Its `predictions` are the ranked leaves `(rows, beams)` and its `label_ids` the
    positions of the targets in `catalog.items`; for exposed items the log-probabilities and the likes of the
    candidates, both `(rows, C)`; the likes of padding are -100.
    """

    _policies_are_checked = False

    def set_up_ranking(
        self,
        catalog: ItemCatalog,
        encoder: PromptEncoder,
        item_counts: Tensor,
        num_beams: int = 20,
        ks: Sequence[int] = (5, 10, 20),
        compute_metrics: Callable[[EvalPrediction], dict[str, float]] | None = None,
    ) -> None:
        """Set what is ranked and how.

        Args:
            catalog, encoder: the items, and the encoder that makes prompts from histories.
            item_counts: `(items,)` training interactions, for popularity groups, novelty and the long tail.
            num_beams: beam width; at least the largest cutoff.
            ks: cutoffs of the lists.
            compute_metrics: function that adds metrics. Its `predictions` are the ranked items of each row, best
                first, as lists; its `label_ids` are the targets. It is not called for exposed items.

        Raises:
            ValueError: the counts do not fit the catalog, or `metric_for_best_model` will not be reported.
        """
        catalog.check_counts(item_counts)
        self._catalog, self._item_counts = catalog, item_counts
        self._num_beams, self._ks, self._more_metrics = num_beams, tuple(ks), compute_metrics
        self._ranking_collator = GroupCollator(encoder)
        self.compute_metrics = self._ranking_metrics
        self.args.remove_unused_columns = False  # the model's forward has no arguments for histories and targets
        self._resolve_metric()

    def _resolve_metric(self) -> None:
        packages = {getattr(type(self), name).__module__.partition(".")[0] for name in ("evaluate", "evaluation_loop")}
        more = not packages <= {"gflowtrl", "transformers", "trl"}  # a subclass may report other metrics, too
        callbacks, adds = self.callback_handler.callbacks, self._more_metrics is not None
        resolve_metric(self.args, self._ks, self.eval_dataset, callbacks, more, adds)

    def train(self, *args: Any, **kwargs: Any):
        """Train as usual; a callback added after the constructor may need a metric."""
        self._resolve_metric()
        return super().train(*args, **kwargs)

    def policy_of(self, model: nn.Module) -> TreePolicy:
        """Return the (wrapped) model as a policy. The first call compares it with the model's plain forward."""
        policy = make_policy(model, self._catalog)
        if not self._policies_are_checked:
            self._policies_are_checked = True
            dtype = torch.bfloat16 if self.args.bf16 else torch.float16 if self.args.fp16 else None
            for each in [policy, *self._frozen_policies()]:
                check_exact(each, self._ranking_collator.encoder, dtype)
        return policy

    def _frozen_policies(self) -> list[TreePolicy]:
        """Return the other policies that training uses."""
        return []

    def card_settings(self) -> dict[str, Any]:
        """Return the training settings for the model card."""
        return {"rows per step": rows_per_step(self.args)}

    def card_methods(self) -> list[str]:
        """Return the methods to cite in the model card: keys of `model_card.PAPERS`."""
        return []

    def get_eval_dataloader(self, eval_dataset: Any = None):
        """Return the evaluation rows, longest histories first: less padding, and memory runs out early or never."""
        datasets: Any = self.eval_dataset
        if isinstance(eval_dataset, str):
            if eval_dataset not in (names := list(datasets) if isinstance(datasets, dict) else []):
                raise ValueError(f"eval_dataset is {eval_dataset!r}, which is not one of the trainer's, {names}.")
            rows: Any = datasets[eval_dataset]
        else:
            rows = datasets if eval_dataset is None else evaluation_rows(eval_dataset)
        if rows is None:
            raise ValueError("There are no evaluation rows. Pass eval_dataset to the trainer or rows to evaluate().")
        if rows is not datasets and not isinstance(eval_dataset, str):  # the others were checked by the constructor
            check_rows(rows, self._catalog)
        return self._ranking_loader(super().get_eval_dataloader, by_length(rows)[0])

    def get_test_dataloader(self, test_dataset: Any):
        """Return the rows of `predict`, in their order, also those of exposed items."""
        rows = evaluation_rows(test_dataset, "test_dataset")
        if not isinstance(rows, Dataset):
            kind = type(rows).__name__
            raise TypeError(f"predict takes one dataset of rows, not a {kind}; call it for each dataset.")
        check_rows(rows, self._catalog)
        return self._ranking_loader(super().get_test_dataloader, rows)

    def _ranking_loader(self, load: Callable[[Any], Any], rows: Dataset):
        """Return `load(rows)` with the collator of the rows, and with every row."""
        args, encoder, collator = self.args, self._ranking_collator.encoder, self.data_collator
        kept = args.dataloader_drop_last, args.dataloader_persistent_workers
        self.data_collator = ExposedCollator(encoder) if has_exposed_rows(rows) else self._ranking_collator
        # The Trainer keeps one loader with persistent workers for all evaluation rows, whichever they are.
        args.dataloader_drop_last = args.dataloader_persistent_workers = False
        try:
            return load(rows)
        finally:
            self.data_collator = collator
            args.dataloader_drop_last, args.dataloader_persistent_workers = kept

    def _get_eval_sampler(self, eval_dataset: Dataset) -> SequentialSampler:
        return SequentialSampler(eval_dataset)  # already sorted

    def evaluation_loop(self, *args: Any, **kwargs: Any):
        """Run the Trainer's loop. If the model computes NaN, all processes raise an error."""
        self._bad_rankings = torch.zeros((), dtype=torch.bool)
        model: Any = self.model
        if (weight := nonfinite_weight(self, model)) is not None:
            raise NonFiniteError(f"{describe(model)} cannot be evaluated: its weight {weight!r} is not finite.")
        output = super().evaluation_loop(*args, **kwargs)
        bad: Any = self.accelerator.gather(self._bad_rankings.to(self.args.device).int()[None])
        if bool(bad.any()):
            raise NonFiniteError(
                f"{describe(model)} cannot be evaluated: its log-probabilities are NaN, although its weights are "
                f"finite. The activations overflow: evaluate in bf16 or float32."
            )
        return output

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        """Return no loss, the ranked leaves `(B, beams)` as predictions, and as labels the positions `(B,)` of the
        targets in `catalog.items`; for exposed items their log-probabilities and likes, both `(B, C)`."""
        batch: Any = self._prepare_inputs(inputs)
        if "candidates" in batch:
            scores = unchecked_log_probs(self.policy_of(model), batch["prompts"], batch["candidates"])
            self._bad_rankings = self._bad_rankings.to(scores.device) | bad_ranking(batch["candidates"], scores)
            return None, scores, batch["liked"]
        leaves, log_probs = self.policy_of(model).beam_search(batch["prompts"], self._num_beams)
        self._bad_rankings = self._bad_rankings.to(leaves.device) | bad_ranking(leaves, log_probs)
        return None, leaves, self._catalog.index_of(batch["rows"].columns["target"]).to(leaves.device)

    def _ranking_metrics(self, prediction: EvalPrediction) -> dict[str, float]:
        leaves, targets = torch.as_tensor(prediction.predictions), torch.as_tensor(prediction.label_ids)
        if targets.dim() == 2:
            if bool(leaves[targets >= 0].isnan().any()):
                return {}  # `evaluation_loop` raises an error
            return mean_over_users(exposed_metrics(leaves, targets))[0]
        catalog = self._catalog
        metrics = summarize(leaves, catalog.item_leaf.cpu()[targets], catalog, self._item_counts, self._ks).metrics
        logged = {name: value for name, value in metrics.items() if name.split("@")[0] in LOGGED_METRICS}
        if self._more_metrics is None:
            return logged
        more = self._more_metrics(ranked_items(catalog, leaves, targets))
        if taken := logged.keys() & {name.removeprefix("eval_") for name in more}:
            raise ValueError(f"compute_metrics returns {', '.join(sorted(taken))}, which exist. Rename them.")
        return logged | more


def ranked_items(catalog: ItemCatalog, leaves: Tensor, targets: Tensor) -> EvalPrediction:
    """Return ranked leaves `(B, R)`, padded with -1, and the positions of targets `(B,)` as lists of items."""
    lists = [[item for leaf in row if leaf >= 0 for item in catalog.items_of(leaf)] for row in leaves.tolist()]
    items: Any = lists, [catalog.items[position] for position in targets.tolist()]
    return EvalPrediction(*items)


def by_length(rows: Dataset) -> tuple[Dataset, Tensor]:
    """Return rows sorted by decreasing history length, and the order: `rows[order[i]]` is row i of the result."""
    order = torch.argsort(history_lengths(rows), descending=True, stable=True)
    return rows.select(order.tolist()), order


def rank_rows(
    policy: TreePolicy,
    encoder: PromptEncoder,
    rows: Dataset,
    num_beams: int = 20,
    batch_size: int = 256,
    progress: bool = True,
    excluded: Tensor | None = None,
) -> Tensor:
    """Run constrained beam search for every row, in one process.

    Args:
        policy, encoder: the policy, and the encoder that makes prompts from histories.
        rows: rows with a `history`.
        num_beams: beam width.
        batch_size: rows that are decoded together.
        progress: show a progress bar.
        excluded: `(rows, X)` leaves that the search leaves out, padded with -1.

    Returns:
        `(rows, num_beams)` leaves in the order of `rows`, best first; -1 if the catalog has fewer leaves.

    Raises:
        ValueError: the policy is not the model's own distribution (`check_exact`).
        NonFiniteError: the model computes NaN.
    """
    return _rank(policy, encoder, rows, num_beams, batch_size, progress, [excluded])[0]


def rank_both(
    policy: TreePolicy,
    encoder: PromptEncoder,
    rows: Dataset,
    seen: SeenItems,
    num_beams: int = 20,
    batch_size: int = 256,
    progress: bool = True,
) -> tuple[Tensor, Tensor]:
    """Rank among all leaves and, with the same computation of the prompts, among those with an unseen item.

    Args:
        seen: what the user of each row has had, from `catalog.seen_items`. Other arguments are those of `rank_rows`.

    Returns:
        Two results of `rank_rows`: nothing removed, seen items removed.
    """
    ranked, unseen = _rank(policy, encoder, rows, num_beams, batch_size, progress, [None, seen.leaves])
    return ranked, unseen


def _rank(
    policy: TreePolicy, encoder: PromptEncoder, rows: Dataset, num_beams: int, batch_size: int, progress: bool,
    searches: Sequence[Tensor | None],
) -> list[Tensor]:  # fmt: skip
    """Return the ranked leaves of every row, once for each tensor of excluded leaves."""
    check_exact(policy, encoder)
    device = next(policy.model.parameters()).device
    ordered, order = by_length(rows)
    histories = ordered["history"]
    ranked = [torch.empty(len(rows), num_beams, dtype=torch.long) for _ in searches]
    for start in tqdm(range(0, len(rows), batch_size), desc="Ranking", disable=not progress):
        batch = order[start : start + batch_size]
        prompts = {k: v.to(device) for k, v in encoder(histories[start : start + batch_size]).items()}
        with policy.computed_once(prompts):
            for found, excluded in zip(ranked, searches, strict=True):
                left_out = None if excluded is None else excluded[batch].to(device)
                leaves, log_probs = policy.beam_search(prompts, num_beams, excluded=left_out)
                check_ranked(leaves, log_probs, policy.model)
                found[batch] = leaves.cpu()
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
    """Compute the exact distance between the policy and R / Z over all leaves, which a GFlowNet minimizes.

    The full distribution costs about one token per inner node of the tree and row. Meant for a few hundred rows of a
    catalog of thousands of items.

    Args:
        policy: policy of a model in evaluation mode.
        rewards: rewards that all have `score_items`; `trainer.rewards` of a `GFlowNetTrainer`.
        encoder: makes prompts from histories.
        rows: rows with the columns that the rewards use.
        batch_size: rows per batch.
        progress: show a progress bar.
        bins: also sum both distributions over leaves with similar targets, for a reliability diagram.
        prior: prior of the target pi_ref^weight * R / Z: `trainer.prior` of a `GFlowNetTrainer` with a `ref_weight`.

    Returns:
        `"total_variation"` in [0, 1] and `"jensen_shannon"` in nats, each `(rows,)`, in double precision. With `bins`
        also the results of `metrics.binned_by_target`, each `(rows, bins)`.

    Raises:
        ValueError: a reward can only score drawn leaves.
    """
    collate, device = GroupCollator(encoder), next(policy.model.parameters()).device
    parts: list[dict[str, Tensor]] = []
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
        parts.append(part | (binned_by_target(probs, target) if bins else {}))
    return {name: torch.cat([part[name] for part in parts]).cpu() for name in parts[0]}
