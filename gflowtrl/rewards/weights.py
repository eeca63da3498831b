"""Reward weights learned from held-out positives instead of the balance loss."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from datasets import Dataset
from torch import Tensor

from gflowtrl.catalog import Item, ItemCatalog
from gflowtrl.checks import COUNT, POSITIVE_SHARE, check_number, check_type
from gflowtrl.data import GroupCollator, PromptEncoder, Step

from .composite import CompositeReward
from .reward import AnyReward


if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Columns that reveal the held-out positive. They are hidden from the rewards.
_LEAKING_COLUMNS = ("session_items", "session_levels")


@dataclass(frozen=True)
class LearnedWeights:
    """Result of `fit_reward_weights`, in the order of the rewards.

    Attributes:
        weights: `reward_weights` for the trainer. With these weights, the mean total reward of a prompt is 1.
        shares: weight times the reward's mean sum over the leaves of a prompt. The shares sum to 1.
        log_likelihood: mean of log(R(held-out) / Z) in nats with these weights.
        equal_log_likelihood: the same with equal shares, for comparison.
    """

    weights: list[float]
    shares: list[float]
    log_likelihood: float
    equal_log_likelihood: float


def fit_reward_weights(
    rewards: AnyReward | Sequence[AnyReward],
    catalog: ItemCatalog,
    rows: Dataset,
    encoder: PromptEncoder,
    tokenizer: PreTrainedTokenizerBase | None = None,
    held_out: str = "target",
    floor: float = 1e-3,
    leaf_reduction: str = "sum",
    batch_size: int = 64,
    device: torch.device | str = "cpu",
    exclude_history: bool = False,
) -> LearnedWeights:
    """Fit the positive weights w that maximize the likelihood of held-out positives y.

    The objective is `mean over rows of log( sum_i w_i (r_i(y) + floor * Z_i / N) / sum_i w_i Z_i )`, where Z_i is the
    sum of r_i over the N leaves.

    Weights cannot be trained with the balance loss: the loss is smallest if R is proportional to the policy, so it
    would favor what the policy does already. This fit does not use the policy. The rewards do not see y: its column is
    removed from the batch, and a reward that reads it raises an error, because the ground truth would get all the
    weight. To compare rewards that read `target` with others, hold out another positive of the user: use
    `one_step_back(rows)` with `held_out="next"`.

    The fit assumes `reward_transform="power"` and `reward_beta=1`. It is a minorization-maximization (Jensen for the
    first logarithm, a tangent for the second): `w_i <- w_i * mean(t_i / w.t) / mean(Z_i / w.Z)`, where t_i is the
    bracket above. Every iteration increases the objective and keeps the weights positive, without randomness. If each
    reward has the same Z on every row (a softmax, a probability), the objective is concave in the shares w_i Z_i and
    the maximum is global. Otherwise, it is the maximum that is reached from equal shares.

    Args:
        rewards: rewards >= 0 that score all items.
        catalog: the items.
        rows: rows of the validation split, never of the training or test split.
        encoder: a `PromptEncoder`.
        tokenizer: tokenizer of the recommender, if a reward needs one.
        held_out: column of the positive.
        floor: `reward_floor` of the training run. It keeps the objective finite for rows where all rewards are zero.
        leaf_reduction, batch_size, device: how the rewards are computed.
        exclude_history: whether items of the history get no reward in training (`CompositeReward`).

    Raises:
        ValueError: a reward reads the held-out positive, is negative, or is 0 everywhere; or all rewards are zero for
            all held-out positives.
    """
    check_type("rows", rows, Dataset, "a datasets.Dataset")
    check_type("catalog", catalog, ItemCatalog, "an ItemCatalog")
    check_type("encoder", encoder, Callable, "a PromptEncoder")
    check_number("batch_size", batch_size, COUNT)
    check_number("floor", floor, POSITIVE_SHARE)
    if held_out not in rows.column_names:
        raise ValueError(f"held_out is {held_out!r}; it must be a column of the rows: {rows.column_names}.")
    if not len(rows):
        raise ValueError("rows is empty; pass at least one row to learn weights from.")
    composite = CompositeReward(
        rewards, catalog, tokenizer, transform="exp", leaf_reduction=leaf_reduction, exclude_history=exclude_history
    )
    steps = _steps(rows, encoder, catalog.to(device), held_out, batch_size)
    batches = [_values_and_totals(composite, step, catalog.leaf_of(positives)) for step, positives in steps]
    values, totals = (torch.cat(parts).double().cpu() for parts in zip(*batches, strict=True))
    _check(composite.names, values, totals)
    return _fit(values + floor * totals / catalog.tree.num_leaves, totals)


def one_step_back(rows: Dataset) -> Dataset:
    """Make the last item of each history the target, and move the old target to the column `next`.

    Use this for rewards that read `target`: they are judged by another positive of the same user. Rows with a history
    of one item are dropped, and so are all columns that reveal the old target.
    """
    check_type("rows", rows, Dataset, "a datasets.Dataset")
    kept = rows.select([number for number, history in enumerate(rows["history"]) if len(history) > 1])
    columns = {
        "row_id": kept["row_id"],
        "history": [history[:-1] for history in kept["history"]],
        "target": [history[-1] for history in kept["history"]],
        "next": kept["target"],
    }
    return Dataset.from_dict(columns)


def _steps(
    rows: Dataset, encoder: PromptEncoder, catalog: ItemCatalog, held_out: str, batch_size: int
) -> Iterator[tuple[Step, list[Item]]]:
    """Yield steps without the columns that reveal the held-out positives, and these positives."""
    collate, device = GroupCollator(encoder), catalog.device
    for start in range(0, len(rows), batch_size):
        batch = collate([rows[i] for i in range(start, min(start + batch_size, len(rows)))])
        prompts = {name: tensor.to(device) for name, tensor in batch["prompts"].items()}
        all_columns, windows = batch["rows"].columns, batch["rows"].windows
        hidden = (held_out, *_LEAKING_COLUMNS)
        columns = {name: column for name, column in all_columns.items() if name not in hidden}
        yield Step.of(prompts, batch["row_ids"], columns, catalog, windows=windows), all_columns[held_out]


def _values_and_totals(composite: CompositeReward, step: Step, leaves: Tensor) -> tuple[Tensor, Tensor]:
    """Return each reward's value at the held-out leaf and its sum over all leaves: two tensors `(B, rewards)`."""
    try:
        parts = composite.dense(step).result.parts
    except ValueError as error:
        error.add_note("fit_reward_weights hides the held-out positive and its session from the rewards.")
        raise
    values = [part.gather(1, leaves[:, None]).squeeze(1) for part in parts.values()]
    for name, part in parts.items():
        if (part < 0).any():
            raise ValueError(f"Reward {name!r} has negative values; weights are learned for rewards >= 0.")
    return torch.stack(values, 1), torch.stack([part.double().sum(1) for part in parts.values()], 1)


def _check(names: list[str], values: Tensor, totals: Tensor) -> None:
    for name, total in zip(names, totals.sum(0).tolist(), strict=True):
        if total == 0:
            raise ValueError(f"Reward {name!r} is 0 for every item of every row; leave it out.")
    if (totals.sum(1) == 0).any():
        row = int((totals.sum(1) == 0).nonzero()[0])
        raise ValueError(f"All rewards are 0 for every item of row {row}; leave such rows out.")
    if (values.sum(1) == 0).all():
        raise ValueError("All rewards are 0 for all held-out positives; pass rewards that are positive for some.")


def _fit(values: Tensor, totals: Tensor, tolerance: float = 1e-10, max_steps: int = 20_000) -> LearnedWeights:
    """Run the iteration of `fit_reward_weights`, starting from equal shares. Both tensors are `(rows, rewards)`."""

    def objective(weights: Tensor) -> float:
        return float(((values @ weights).log() - (totals @ weights).log()).mean())

    scale = totals.mean(0)
    equal = 1 / (len(scale) * scale)
    weights = equal
    for _ in range(max_steps):
        increase = (values / (values @ weights)[:, None]).mean(0)
        decrease = (totals / (totals @ weights)[:, None]).mean(0)
        updated = weights * increase / decrease
        updated = updated / (updated * scale).sum()
        change = ((updated - weights) * scale).abs().max()
        weights = updated
        if change < tolerance:
            break
    return LearnedWeights(weights.tolist(), (weights * scale).tolist(), objective(weights), objective(equal))
