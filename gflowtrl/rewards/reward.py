"""What the built-in rewards share: one formula, offered as a tensor over items, over leaves, and as a TRL reward."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any, Protocol, Self, TypeGuard

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from gflowtrl.catalog import ItemCatalog
from gflowtrl.data import Step
from gflowtrl.data.step import REWARD_ARGUMENTS

from .from_spec import FromSpec


if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from gflowtrl.policy import Prompts


class ScoresItems(Protocol):
    """A reward of every item: `(B, items)` in the order of `catalog.items`."""

    def score_items(self, step: Step) -> Tensor: ...


class ScoresLeaves(Protocol):
    """A reward of leaves `(B, K)`: `(B, K)`."""

    def score_leaves(self, step: Step, leaves: Tensor) -> Tensor: ...


class Binds(Protocol):
    """What wants to know the catalog before it is used."""

    def bind(self, catalog: ItemCatalog, tokenizer: PreTrainedTokenizerBase | None, leaf_reduction: str) -> Any: ...


#: TRL's reward signature, sync or async.
RewardFunction = Callable[..., list[float | None] | Awaitable[list[float | None]]]
AnyReward = RewardFunction | ScoresItems | ScoresLeaves


# By hasattr: isinstance of a protocol does not see, from Python 3.12 on, what a wrapper hands on by __getattr__.
def scores_items(reward: object) -> TypeGuard[ScoresItems]:
    """Whether a reward can score every item; whether it wants to is `scores_all_items`."""
    return hasattr(reward, "score_items")


def scores_leaves(reward: object) -> TypeGuard[ScoresLeaves]:
    """Whether a reward scores drawn leaves as tensors."""
    return hasattr(reward, "score_leaves")


def binds(reward: object) -> TypeGuard[Binds]:
    """Whether a reward wants to know the catalog."""
    return hasattr(reward, "bind")


class Reward(FromSpec):
    """Base class of rewards that are tensors. A subclass writes `score_items`; the other two forms follow from it.

    A reward need not derive from this class: any callable with TRL's signature is one, and any object with
    `score_items` or `score_leaves` is a fast one (see docs/rewards.md).

    Args:
        name: what the reward is called in logs; also `__name__`, which TRL's own trainers read.

    Attributes:
        scores_all_items: whether `CompositeReward` may ask for the reward of all items at every step. Where that would
            cost a forward pass per item it is False: only drawn leaves are scored, and exact flows are refused.
        reads_policy: whether `score_leaves` takes `policy_log_probs (B, K)`, log pi of the leaves under the policy in
            training, as a keyword argument.
        reads_prompts: whether it reads the encoded prompts, and not the columns alone.
    """

    scores_all_items: bool = True
    reads_policy: bool = False
    reads_prompts: bool = False
    catalog: ItemCatalog
    tokenizer: PreTrainedTokenizerBase | None = None
    leaf_reduction: str = "sum"

    def __init__(self, name: str):
        self.__name__ = name

    def bind(
        self, catalog: ItemCatalog, tokenizer: PreTrainedTokenizerBase | None = None, leaf_reduction: str = "sum"
    ) -> Self:
        """Tell the reward which catalog it scores. `CompositeReward` does; do it yourself to use a reward alone."""
        if catalog is not getattr(self, "catalog", None):
            self._prepare(catalog)
        self.catalog, self.tokenizer, self.leaf_reduction = catalog, tokenizer, leaf_reduction
        return self

    def _prepare(self, catalog: ItemCatalog) -> None:
        """What a reward does when it is bound to another catalog. The default does nothing."""

    def score_items(self, step: Step) -> Tensor:
        """Reward of every item for every row: `(B, items)`, in the order of `catalog.items`."""
        raise NotImplementedError(f"{type(self).__name__} must define score_items(step) -> Tensor (B, items).")

    def score_leaves(self, step: Step, leaves: Tensor) -> Tensor:
        """Reward of some leaves for every row: `(B, K) -> (B, K)`."""
        scores = self._bound_catalog().fold_items(self.score_items(step), self.leaf_reduction)
        return scores.gather(1, leaves.to(scores.device))

    def __call__(self, prompts: list[str], completion_ids: list[list[int]], **columns: Any) -> list[float]:
        """The same reward with TRL's signature: one value per completion, 0 for one that is no id of the catalog."""
        leaves = self._leaves_of(completion_ids)
        columns = {name: values for name, values in columns.items() if name not in REWARD_ARGUMENTS}
        row_ids = torch.as_tensor(columns.get("row_id", range(len(prompts))))
        step = Step.of(self._encoded(prompts) if self.reads_prompts else {}, row_ids, columns, self.catalog)
        scores = self.score_leaves(step, leaves.clamp(min=0)[:, None])[:, 0]
        return torch.where(leaves >= 0, scores.to(leaves.device), 0.0).tolist()

    def _encoded(self, prompts: list[str]) -> Prompts:
        if self.tokenizer is None:
            raise ValueError(f"{self._owner} needs the tokenizer to read prompts; bind(catalog, tokenizer).")
        encoded = self.tokenizer(
            prompts, add_special_tokens=False, padding=True, padding_side="left", return_tensors="pt"
        )
        return encoded.to(self._bound_catalog().device)

    @property
    def _owner(self) -> str:
        """What errors call this reward."""
        return f"Reward {self.__name__!r}"

    def _bound_catalog(self) -> ItemCatalog:
        if not hasattr(self, "catalog"):
            raise ValueError(f"{self._owner} does not know the catalog yet; call bind(catalog) first.")
        return self.catalog

    def _items_from_leaves(self, values: Tensor) -> Tensor:
        """`(B, N) -> (B, items)` of what belongs to a leaf and not to each of its items: folding gives it back."""
        catalog = self._bound_catalog()
        if self.leaf_reduction == "sum":
            values = values / catalog.leaf_sizes.to(values.device)
        return values[:, catalog.item_leaf.to(values.device)]

    def _fold_some(self, leaves: Tensor, items: Tensor, values: Tensor) -> Tensor:
        """Rewards of `leaves (B, K)` from those of some distinct items of each row, 0 for all others: `(B, K)`.

        `items (B, S)` are positions in the catalog, padded with -1, and `values (B, S)` their rewards.
        """
        items, values = items.to(leaves.device), values.to(leaves.device)
        leaf = self._bound_catalog().item_leaf.to(leaves.device)[items.clamp(min=0)]
        there = (leaves[:, :, None] == leaf[:, None]) & (items >= 0)[:, None]
        worth = torch.where(there, values[:, None], 0.0)
        return worth.sum(-1) if self.leaf_reduction == "sum" else worth.amax(-1)

    def _leaves_of(self, completion_ids: list[list[int]]) -> Tensor:
        """Leaf that each completion spells, whatever follows it (an end token, say): `(n,)`, -1 for none."""
        tree = self._bound_catalog().tree
        tokens = pad_sequence([torch.tensor(ids, dtype=torch.long) for ids in completion_ids], True, -1)
        tokens = tokens[:, : tree.max_depth].to(tree.device)
        nodes = torch.zeros(len(tokens), dtype=torch.long, device=tree.device)
        for column in tokens.unbind(1):
            nodes = torch.where(tree.leaf_at(nodes) >= 0, nodes, tree.step(nodes, column))
        return tree.leaf_at(nodes)
