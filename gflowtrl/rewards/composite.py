"""Combination of several rewards into one `log R`: call them, check their values, add them, transform the sum."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple, TypeGuard, cast

import torch
from torch import Tensor

from gflowtrl.catalog import ItemCatalog
from gflowtrl.checks import POSITIVE, SHARE_BELOW_ONE, check_choice, check_number, short_repr
from gflowtrl.data import Step
from gflowtrl.policy import TreePolicy
from gflowtrl.policy.modules import evaluation_mode

from .calling import RewardLog, call_rewards, checked_values, reward_keywords
from .exclusion import as_mask, contains, log_mean_of_others, seen_items, without_reward
from .reward import AnyReward, ScoresItems, ScoresLeaves, binds, scores_items, scores_leaves
from .step_reward import DenseReward, RewardResult, SampledReward, StepReward, TopKReward


if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class _Check(NamedTuple):
    """A check for invalid values: whether there is one, their mask `(B, n)` on demand, and the error's parts."""

    fails: Tensor
    find: Callable[[], Tensor]
    values: Tensor
    message: str


class CompositeReward:
    """Combines rewards into log R: computes the sum `r = sum of weights[i] * r_i` and transforms it.

    - `transform="power"`: `log R = beta * log max(r, floor * mean of r over the prompt's leaves)`, r >= 0.
    - `transform="exp"`: `log R = beta * r`, where r may have any sign.

    The floor keeps R positive, as GFlowNets require, and limits the total mass of the many leaves without reward to
    about `floor`. Its mean is over **all** leaves if every reward scores all items. Otherwise it is over the distinct
    leaves of the group, which is an approximation that depends on the drawn trajectories.

    Args:
        reward_funcs: one reward or a list of rewards: callables with TRL's signature (sync or async), or objects with
            `score_items(step) -> (B, items)` or `score_leaves(step, leaves) -> (B, K)`.
        catalog: the items.
        tokenizer: decodes the prompts; required for plain callables only.
        weights: one number per reward (default 1); >= 0 with "power". With weight 0 a reward is only logged.
        transform: "power" or "exp".
        beta: exponent, or inverse temperature; > 0.
        floor: share of the prompt's mean reward, in [0, 1). With 0 every reward must be positive.
        leaf_reduction: "sum" or "max": how each reward reduces the values of the items at a leaf.
        max_elements: largest table (prompts x leaves) that `of` computes. None: no limit.
        top_items: number of best leaves per prompt that keep their own reward if the full table would be larger than
            `max_elements`; the other leaves share the remaining mass equally. None: only drawn leaves are scored, and
            the floor uses the group's mean.
        exclude_history: give R = 0 (with a floor: the floor, a share of the mean R under "exp" too) to the items that
            the row's user has had before, `exclusion.seen_items`, in this step: before the items of a leaf are folded.
            Rewards that know leaves only keep their value at a leaf that has another item. Reads the column `history`.

    Raises:
        ValueError: invalid options; later, a reward of the wrong shape, a NaN or infinite value, a negative value with
            "power", a completion for which all rewards are None, or a row without a positive reward. The error names
            the reward and the first bad row.
    """

    def __init__(
        self,
        reward_funcs: AnyReward | Sequence[AnyReward],
        catalog: ItemCatalog,
        tokenizer: PreTrainedTokenizerBase | None = None,
        weights: Sequence[float] | None = None,
        transform: str = "power",
        beta: float = 1.0,
        floor: float = 1e-3,
        leaf_reduction: str = "sum",
        max_elements: int | None = None,
        top_items: int | None = None,
        exclude_history: bool = False,
    ):
        several = isinstance(reward_funcs, list | tuple)
        funcs: list[AnyReward] = list(reward_funcs) if several else [cast(AnyReward, reward_funcs)]
        self.weights = [1.0] * len(funcs) if weights is None else [float(weight) for weight in weights]
        _check_options(funcs, self.weights, transform, beta, floor, leaf_reduction)
        self.rewards: dict[str, AnyReward] = dict(zip(_names(funcs), funcs, strict=True))
        self.catalog, self.tokenizer = catalog, tokenizer
        self.transform, self.beta, self.floor, self.leaf_reduction = transform, beta, floor, leaf_reduction
        self.max_elements, self.top_items, self.exclude_history = max_elements, top_items, exclude_history
        for name, reward in self.rewards.items():
            if binds(reward):
                reward.bind(catalog, tokenizer, leaf_reduction)
            elif not _is_tensor_reward(reward) and tokenizer is None:
                raise ValueError(f"Reward {name!r} is a plain callable, which is called with text; pass a tokenizer.")

    @property
    def names(self) -> list[str]:
        """Names of the rewards in logs: `__name__` or the class name, with a number if a name repeats."""
        return list(self.rewards)

    @property
    def can_score_all(self) -> bool:
        """Whether every reward scores all items. R is then known for all leaves, as exact flows require."""
        return not self.sampled_only

    @property
    def sampled_only(self) -> list[str]:
        """Names of the rewards that cannot score all items, but only drawn leaves."""
        return [name for name, reward in self.rewards.items() if not _scores_all(reward)]

    def check_scores_all(self, need: str) -> None:
        """Check that every reward scores all items.

        Args:
            need: first words of the error message: what needs all items.

        Raises:
            ValueError: a reward scores drawn leaves only; the error names all such rewards.
        """
        if self.sampled_only:
            raise ValueError(
                f"{need}, but {', '.join(map(repr, self.sampled_only))} cannot score all items. Give it a "
                f"method score_items(step) -> Tensor (B, {len(self.catalog)}), or choose an objective that needs only "
                f"sampled rewards, for example vargrad."
            )

    @property
    def reads_policy(self) -> bool:
        """Whether a reward depends on the likelihood under the policy in training."""
        return any(getattr(reward, "reads_policy", False) for reward in self.rewards.values())

    def of(self, step: Step, policy: TreePolicy | None = None, trainer_state: Any = None) -> StepReward:
        """Return R of a step's prompts, for as many leaves as the rewards and `max_elements` allow.

        Args:
            step: the prompts and their columns.
            policy: the policy in training. A reward that reads its likelihood may need a forward pass.
            trainer_state: passed to plain reward functions.
        """
        excluded = self._excluded_leaves(step)
        fits = self.max_elements is None or len(step) * self.catalog.tree.num_leaves <= self.max_elements
        if self.can_score_all and fits:
            return self.dense(step)
        if self.can_score_all and self.top_items is not None:
            tables = (self.dense(step.rows(rows)).result.log_rewards for rows in self.chunks(step))
            exact = partial(self.score_in_chunks, step)
            return TopKReward.best_of(tables, self.top_items, self.catalog.tree, exact, excluded)

        score = partial(self.score_drawn, step, trainer_state=trainer_state)
        ask_policy = partial(_policy_log_probs, policy, step) if self.reads_policy and policy is not None else None
        reason = "a reward scores drawn leaves only: give it a method score_items(step) -> Tensor (B, items)"
        if self.can_score_all:
            reason = f"a table of all leaves is larger than max_exact_elements={self.max_elements}: raise it"
        return SampledReward(score, ask_policy, reason, excluded)

    @torch.no_grad()
    def dense(self, step: Step) -> DenseReward:
        """Return R of all leaves. The result is computed once per step.

        Raises:
            ValueError: a reward scores drawn leaves only.
        """
        self.check_scores_all("log R of all leaves is required")

        def compute() -> DenseReward:
            parts = {name: self._item_scores(name, step) for name in self.rewards}
            return DenseReward(self._combine(parts, step, None), self.catalog.tree, self._excluded_leaves(step))

        return step.once(self, "rewards of all leaves", compute)

    @torch.no_grad()
    def score_drawn(
        self, step: Step, leaves: Tensor, policy_log_probs: Tensor | None = None, trainer_state: Any = None
    ) -> RewardResult:
        """Return the rewards of `leaves (B, K)`, with a floor from the mean over the distinct leaves of each group.

        Args:
            step: the prompts and their columns.
            leaves: the leaves to score.
            policy_log_probs: `(B, K)` log pi of the leaves, for rewards that read it.
            trainer_state: passed to plain reward functions.
        """
        log = RewardLog()
        plain = {name: reward for name, reward in self.rewards.items() if not _is_tensor_reward(reward)}
        answers: dict[str, Any] = {}
        if plain and self.tokenizer is not None:
            keywords = reward_keywords(step, leaves, self.catalog, self.tokenizer)
            keywords |= {"trainer_state": trainer_state, "log_extra": log.log_extra, "log_metric": log.log_metric}
            answers = call_rewards(plain, keywords)
        parts = {}
        for name, reward in self.rewards.items():
            if name in plain:
                parts[name] = self._list_scores(name, answers[name], step, leaves)
            elif scores_leaves(reward):
                extra = {"policy_log_probs": policy_log_probs} if getattr(reward, "reads_policy", False) else {}
                scores = reward.score_leaves(step, leaves, **extra)
                parts[name] = _checked_shape(name, "score_leaves", scores, leaves.shape, leaves)
            else:
                parts[name] = self._item_scores(name, step).gather(1, leaves)
        return replace(self._combine(parts, step, leaves), metrics=log.metrics, extra=log.extra)

    @torch.no_grad()
    def score_in_chunks(self, step: Step, leaves: Tensor, policy_log_probs: Tensor | None = None) -> RewardResult:
        """Return the rewards of `leaves (B, K)`, with a floor from the mean over all leaves.

        No table is larger than `max_elements`, except that a chunk has at least one row.
        """
        chunks = self.chunks(step)
        results = [self.dense(step.rows(rows)).score(leaves[rows]) for rows in chunks]
        shares = [len(leaves[rows]) / len(leaves) for rows in chunks]
        return replace(
            results[0],
            log_rewards=torch.cat([result.log_rewards for result in results]),
            rewards=torch.cat([result.rewards for result in results]),
            parts={name: torch.cat([result.parts[name] for result in results]) for name in results[0].parts},
            floored_mass=torch.stack([s * r.floored_mass for s, r in zip(shares, results, strict=True)]).sum(),
            excluded=self._excluded(step, leaves),
        )

    def chunks(self, step: Step) -> list[slice]:
        """Split the step's rows into slices whose table of all leaves fits `max_elements`, with at least one row."""
        leaves = self.catalog.tree.num_leaves
        rows = len(step) if self.max_elements is None else max(self.max_elements // leaves, 1)
        return [slice(start, min(start + rows, len(step))) for start in range(0, len(step), rows)]

    # -------------------------------------------------------------------------------------------- one reward's values
    def _item_scores(self, name: str, step: Step) -> Tensor:
        shape = (len(step), len(self.catalog))
        reward = self.rewards[name]
        assert scores_items(reward)
        scores = _checked_shape(name, "score_items", reward.score_items(step), shape, step.row_ids)
        if self.exclude_history:
            seen = seen_items(step, self.catalog)
            # Under "exp", a leaf's largest value may be negative, so 0 is not the least one.
            nothing = 0.0 if self.leaf_reduction == "sum" else torch.finfo(scores.dtype).min
            scores = scores.index_put(
                (seen.rows.to(scores.device), seen.items.to(scores.device)), scores.new_tensor(nothing)
            )
        folded = self.catalog.fold_items(scores, self.leaf_reduction)
        excluded = self._excluded(step, None) if self.leaf_reduction == "max" else None
        return folded if excluded is None else folded.masked_fill(excluded, 0.0)

    def _excluded_leaves(self, step: Step) -> Tensor | None:
        """Return the leaves with only items that the user has had, for `StepReward`; None if they count."""
        return seen_items(step, self.catalog).leaves.to(step.device) if self.exclude_history else None

    def _excluded(self, step: Step, leaves: Tensor | None) -> Tensor | None:
        """Return which of `leaves (B, n)`, None: of all, are excluded: bool `(B, n)`; None if they count."""
        seen = self._excluded_leaves(step)
        if seen is None:
            return None
        return as_mask(seen, self.catalog.tree.num_leaves) if leaves is None else contains(seen, leaves)

    def _list_scores(self, name: str, values: Any, step: Step, leaves: Tensor) -> Tensor:
        width = leaves.shape[1]
        numbers = checked_values(
            name, values, leaves.numel(), lambda i: self._describe(step, leaves, i // width, i % width)
        )
        return torch.tensor(numbers, dtype=torch.float32, device=leaves.device).view(leaves.shape)

    # ------------------------------------------------------------------------------------------------- sum, transform
    def _combine(self, parts: dict[str, Tensor], step: Step, leaves: Tensor | None) -> RewardResult:
        """Combine the values `(B, n)` of each reward into log R. With `leaves` None, the columns are all leaves."""
        checks: list[_Check] = []
        total = torch.zeros_like(next(iter(parts.values())))
        nones = []
        for (name, values), weight in zip(parts.items(), self.weights, strict=True):
            given = values
            if not _is_tensor_reward(self.rewards[name]):  # in a list NaN stands for None, in a tensor it is an error
                nones.append(torch.isnan(values))
                given = values.masked_fill(nones[-1], 0.0)
            total.add_(given, alpha=weight)
            low, high = torch.aminmax(given)  # NaN if there is a NaN
            not_finite = f"Reward {name!r} returned {{value}} for {{where}}; return a finite number."
            checks.append(_Check(~(low.isfinite() & high.isfinite()), partial(_not_finite, given), values, not_finite))
            if self.transform == "power" and weight:
                negative = (
                    f"Reward {name!r} returned {{value}} for {{where}}; with reward_transform='power' rewards must "
                    f"be >= 0. Shift or rescale it, or use reward_transform='exp', which allows any sign."
                )
                checks.append(_Check(low < 0, partial(torch.lt, given, 0), values, negative))
        if len(nones) == len(parts):
            all_none = torch.stack(nones).all(0)
            missing = "All rewards are None for {where}; at least one reward must apply to every completion."
            checks.append(_Check(all_none.any(), lambda: all_none, total, missing))
        excluded = self._excluded(step, leaves)
        if excluded is not None:
            total = without_reward(total, excluded, any_sign=self.transform == "exp")
        log_rewards, floored_mass, not_positive = self._transform(total, leaves, excluded)
        checks.append(not_positive)
        self._raise_first(checks, step, leaves)
        return RewardResult(log_rewards, total, parts, floored_mass, excluded=excluded)

    def _transform(
        self, rewards: Tensor, leaves: Tensor | None, excluded: Tensor | None
    ) -> tuple[Tensor, Tensor, _Check]:
        counted = None if leaves is None else _first_occurrence(leaves)  # None: all leaves
        if self.transform == "exp":
            log_rewards = self.beta * rewards
            overflow = "The log-reward of {where} is not finite; lower reward_beta."
            not_finite = _finite_check(log_rewards, None, rewards, overflow)
            if excluded is not None:  # R = 0 is not r = 0 here
                least = log_mean_of_others(log_rewards, excluded, counted) + _log(self.floor)
                log_rewards = torch.where(excluded, least, log_rewards)
            return log_rewards, rewards.new_zeros(()), not_finite
        if counted is None:
            floor = self.floor * rewards.mean(1, keepdim=True)
        else:
            floor = self.floor * (rewards * counted).sum(1, keepdim=True) / counted.sum(1, keepdim=True)
        raised = torch.maximum(rewards, floor)
        log_rewards = torch.log(raised)
        if self.beta != 1:
            log_rewards = self.beta * log_rewards
        floored_mass = self._floored_mass(rewards, floor, raised, log_rewards, counted)
        cause = "All other rewards of this row are zero too. Add"
        if self.floor == 0:
            cause = "reward_floor is 0. Set it to 1e-3, for example, or add"
        zero = (
            f"The reward of {{where}} is zero, and GFlowNets need a positive one. {cause} a reward that is positive "
            f"for some leaf of every row (a GroundTruthReward with the ground truth among the trajectories, or a "
            f"constant), or use reward_transform='exp'."
        )
        allowed = excluded if self.floor == 0 else None
        return log_rewards, floored_mass, _finite_check(log_rewards, allowed, rewards, zero)

    def _floored_mass(
        self, rewards: Tensor, floor: Tensor, raised: Tensor, log_rewards: Tensor, counted: Tensor | None
    ) -> Tensor:
        """Return the share of R on leaves below the floor, averaged over the prompts."""
        if self.floor == 0:
            return rewards.new_zeros(())
        below = (rewards < floor).to(rewards.dtype)
        if counted is None and self.beta == 1:  # R is what was raised
            return (floor.squeeze(1) * below.sum(1) / raised.sum(1)).mean()
        # The softmax over a row is the share of each distinct leaf in the total R.
        logs = log_rewards if counted is None else log_rewards.masked_fill(~counted, -math.inf)
        return (torch.softmax(logs, 1) * below).sum(1).mean()

    # --------------------------------------------------------------------------------------------------------- errors
    def _raise_first(self, checks: list[_Check], step: Step, leaves: Tensor | None) -> None:
        """Raise the error of the first check that fails. A valid batch costs one synchronization for all checks."""
        if not torch.stack([check.fails for check in checks]).any():
            return
        for fails, find, values, message in checks:
            if fails:
                row, column = find().nonzero()[0].tolist()
                where = self._describe(step, leaves, row, column)
                raise ValueError(message.format(value=values[row, column].item(), where=where))

    def _describe(self, step: Step, leaves: Tensor | None, row: int, column: int) -> str:
        """Describe a value, for example `row 3 of the batch (row_id 17), item 'B01' ('<a_1> <b_7>')`."""
        leaf = column if leaves is None else int(leaves[row, column])
        items = ", ".join(map(repr, self.catalog.items_of(leaf)))
        row_id = int(step.row_ids[row])
        return f"row {row} of the batch (row_id {row_id}), item {items} ({self.catalog.leaf_text(leaf)!r})"


def _scores_all(reward: AnyReward) -> bool:
    reads_policy = getattr(reward, "reads_policy", False)  # log pi is known for drawn leaves only
    return scores_items(reward) and getattr(reward, "scores_all_items", True) and not reads_policy


def _is_tensor_reward(reward: object) -> TypeGuard[ScoresItems | ScoresLeaves]:
    return scores_items(reward) or scores_leaves(reward)


def _policy_log_probs(policy: TreePolicy, step: Step, leaves: Tensor) -> Tensor:
    with torch.no_grad(), evaluation_mode(policy.model):
        return policy.score(step.prompts, leaves).trajectory_log_probs


def _checked_shape(name: str, method: str, scores: Tensor, shape: Sequence[int], like: Tensor) -> Tensor:
    real = isinstance(scores, Tensor) and not (scores.is_meta or scores.is_sparse or scores.is_complex())
    if not real or scores.shape != tuple(shape):
        actual = f"a tensor of shape {tuple(scores.shape)}" if real else short_repr(scores)
        raise ValueError(
            f"{method} of reward {name!r} returned {actual}; it must return a tensor of shape {tuple(shape)}."
        )
    return scores.detach().to(like.device, torch.float32)


def _not_finite(values: Tensor) -> Tensor:
    return ~torch.isfinite(values)


def _finite_check(log_rewards: Tensor, allowed: Tensor | None, values: Tensor, message: str) -> _Check:
    """Check that log R is finite, except where `allowed`."""
    found = log_rewards if allowed is None else log_rewards.masked_fill(allowed, 0.0)
    low, high = torch.aminmax(found)
    return _Check(~(low.isfinite() & high.isfinite()), partial(_not_finite, found), values, message)


def _log(share: float) -> float:
    return math.log(share) if share else -math.inf


def _first_occurrence(leaves: Tensor) -> Tensor:
    """Mask of the first occurrence of each leaf in its row: `(B, K) -> bool (B, K)`."""
    same = leaves[:, :, None] == leaves[:, None, :]
    return ~same.tril(-1).any(-1)


def _names(funcs: Sequence[Any]) -> list[str]:
    names: list[str] = []
    for func in funcs:
        named = getattr(func, "func", func)  # the function inside a functools.partial
        base = getattr(named, "__name__", type(func).__name__)
        taken = sum(name == base or name.startswith(f"{base}_") and name[len(base) + 1 :].isdigit() for name in names)
        names.append(f"{base}_{taken + 1}" if taken else base)
    return names


def _check_options(
    funcs: list, weights: list[float], transform: str, beta: float, floor: float, leaf_reduction: str
) -> None:
    if not funcs:
        raise ValueError("reward_funcs is empty; give at least one reward.")
    for func in funcs:
        if isinstance(func, type) or not (callable(func) or _is_tensor_reward(func)):
            text = "a reward must be callable or have score_items or score_leaves (an object, not its class)"
            raise TypeError(f"reward_funcs contains {short_repr(func)}; {text}.")
    if len(weights) != len(funcs):
        raise ValueError(f"{len(weights)} reward_weights were given for {len(funcs)} rewards; give one per reward.")
    check_weights(weights, transform)
    check_choice("reward_transform", transform, ("power", "exp"))
    check_choice("leaf_reduction", leaf_reduction, ("sum", "max"))
    check_number("reward_beta", beta, POSITIVE)
    check_number("reward_floor", floor, SHARE_BELOW_ONE)


def check_weights(weights: Sequence[float], transform: str) -> None:
    """Check that `reward_weights` are finite, not all zero, and not negative with the transform "power".

    Raises:
        ValueError: the weights are invalid.
    """
    if not all(map(math.isfinite, weights)) or not any(weights):
        raise ValueError(f"reward_weights is {weights}; the weights must be finite and not all zero.")
    if transform == "power" and min(weights) < 0:
        raise ValueError(
            f"reward_weights is {weights}; with reward_transform='power' the weights must be >= 0. Use "
            f"reward_transform='exp', which allows any sign."
        )
