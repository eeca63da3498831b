"""Weights of rewards learned from held-out positives, and not from the balance loss."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from datasets import Dataset
from torch import Tensor

from gflowtrl.catalog import Item, ItemCatalog
from gflowtrl.checks import POSITIVE_SHARE, check_number
from gflowtrl.data import GroupCollator, PromptEncoder, Step

from .composite import CompositeReward
from .reward import AnyReward


if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Columns that tell about the held-out positive, which a reward under test must not see.
_REVEALING = ("session_items", "session_levels")


@dataclass(frozen=True)
class LearnedWeights:
    """What `fit_reward_weights` found, in the order of the rewards.

    Attributes:
        weights: `reward_weights` for the trainer. With them a prompt's rewards add up to 1 in the mean.
        shares: weight times the reward's mean sum over a prompt's leaves; they add up to 1.
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
) -> LearnedWeights:
    """Positive weights w under which held-out positives y are most probable: maximizes

    `mean over rows of log( sum_i w_i (r_i(y) + floor * Z_i / N) / sum_i w_i Z_i )`,

    Z_i the sum of r_i over the N leaves.

    Weights cannot be trained on the balance loss: it is least where R is proportional to the policy, so it would pick
    what the policy does already. Here they never meet the policy. The rewards do not see y: its column is taken out
    of the batch, and a reward that asks for it is an error, because the ground truth would explain itself with all the
    weight there is. To weigh rewards that read `target` against others, hold out another positive of the user:
    `one_step_back(rows)` with `held_out="next"`.

    The fit is for `reward_transform="power"` and `reward_beta=1`. It is a minorization (Jensen for the first
    logarithm, a tangent for the second), `w_i <- w_i * mean(t_i / w.t) / mean(Z_i / w.Z)` with t_i the bracket above:
    every step raises the objective, weights stay positive, nothing is random. Where each reward has the same Z on
    every row (a softmax, a probability) the objective is concave in the shares w_i Z_i and the maximum is global; else
    it is the one that equal shares lead to.

    Args:
        rewards: those to weigh; each scores all items, and is >= 0.
        catalog: the items.
        rows: rows of the validation split, never of training or test.
        encoder: a `PromptEncoder`.
        tokenizer: of the recommender, if a reward needs one.
        held_out: column of the positive.
        floor: `reward_floor` of the training to come; keeps rows finite that no reward gives anything.
        leaf_reduction, batch_size, device: how, how many together and where rewards are computed.

    Raises:
        ValueError: a reward that reads the held-out positive, that is negative, or that is 0 everywhere; held-out
            positives that no reward gives anything.
    """
    check_number("floor", floor, POSITIVE_SHARE)
    if held_out not in rows.column_names:
        raise ValueError(f"There is no column {held_out!r} of held-out positives; the rows have {rows.column_names}.")
    if not len(rows):
        raise ValueError("There are no rows to learn weights from.")
    composite = CompositeReward(rewards, catalog, tokenizer, transform="exp", leaf_reduction=leaf_reduction)
    found = []
    for step, positives in _steps(rows, encoder, catalog.to(device), held_out, batch_size):
        leaves = catalog.leaf_of(positives)
        found.append(_values_and_totals(composite, step, leaves))
    values, totals = (torch.cat(parts).double().cpu() for parts in zip(*found, strict=True))
    _check(composite.names, values, totals)
    values = values + floor * totals / catalog.tree.num_leaves
    return _fit(values, totals)


def one_step_back(rows: Dataset) -> Dataset:
    """Rows whose target is the last item of the history, and whose old target is the column `next`.

    For a reward that reads `target`: whether it is a good one shows in another positive of the same user. Rows with a
    history of one item are left out, and so are all columns that tell about the old target.
    """
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
    """Steps without what they are to predict, and that."""
    collate, device = GroupCollator(encoder), catalog.device
    for start in range(0, len(rows), batch_size):
        batch = collate([rows[i] for i in range(start, min(start + batch_size, len(rows)))])
        prompts = {name: tensor.to(device) for name, tensor in batch["prompts"].items()}
        known = batch["rows"]
        columns = {name: column for name, column in known.columns.items() if name not in (held_out, *_REVEALING)}
        yield Step.of(prompts, batch["row_ids"], columns, catalog, windows=known.windows), known.columns[held_out]


def _values_and_totals(composite: CompositeReward, step: Step, leaves: Tensor) -> tuple[Tensor, Tensor]:
    """Each reward's value at the held-out leaf and its sum over all leaves: two `(B, rewards)`."""
    try:
        parts = composite.dense(step).result.parts
    except ValueError as error:
        error.add_note("fit_reward_weights hides the held-out positive and its session from the rewards.")
        raise
    values = [part.gather(1, leaves[:, None]).squeeze(1) for part in parts.values()]
    for name, part in parts.items():
        if (part < 0).any():
            raise ValueError(f"Reward {name!r} is negative somewhere; weights are learned for rewards >= 0.")
    return torch.stack(values, 1), torch.stack([part.double().sum(1) for part in parts.values()], 1)


def _check(names: list[str], values: Tensor, totals: Tensor) -> None:
    for name, total in zip(names, totals.sum(0).tolist(), strict=True):
        if total == 0:
            raise ValueError(f"Reward {name!r} is 0 for every item of every row; leave it out.")
    if (totals.sum(1) == 0).any():
        raise ValueError(
            f"No reward gives row {int((totals.sum(1) == 0).nonzero()[0])} anything; leave such rows out."
        )
    if (values.sum(1) == 0).all():
        raise ValueError("No reward gives any of the held-out positives anything, so nothing tells the weights apart.")


def _fit(values: Tensor, totals: Tensor, tolerance: float = 1e-10, max_steps: int = 20_000) -> LearnedWeights:
    """The iteration of `fit_reward_weights`, from equal shares. Both `(rows, rewards)`."""

    def objective(weights: Tensor) -> float:
        return float(((values @ weights).log() - (totals @ weights).log()).mean())

    scale = totals.mean(0)
    equal = 1 / (len(scale) * scale)
    weights = equal
    for _ in range(max_steps):
        up = (values / (values @ weights)[:, None]).mean(0)
        down = (totals / (totals @ weights)[:, None]).mean(0)
        new = weights * up / down
        new = new / (new * scale).sum()
        moved = ((new - weights) * scale).abs().max()
        weights = new
        if moved < tolerance:
            break
    return LearnedWeights(weights.tolist(), (weights * scale).tolist(), objective(weights), objective(equal))
