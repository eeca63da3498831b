"""Base class and protocols of rewards."""

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
    """A reward that scores every item: `(B, items)` in the order of `catalog.items`."""

    def score_items(self, step: Step) -> Tensor: ...


class ScoresLeaves(Protocol):
    """A reward that scores leaves: `(B, K) -> (B, K)`."""

    def score_leaves(self, step: Step, leaves: Tensor) -> Tensor: ...


class Binds(Protocol):
    """A reward that must receive the catalog before it is used."""

    def bind(self, catalog: ItemCatalog, tokenizer: PreTrainedTokenizerBase | None, leaf_reduction: str) -> Any: ...


#: TRL's reward signature, sync or async.
RewardFunction = Callable[..., list[float | None] | Awaitable[list[float | None]]]
AnyReward = RewardFunction | ScoresItems | ScoresLeaves


# These use hasattr: from Python 3.12 on, isinstance with a protocol ignores attributes that __getattr__ provides.
def scores_items(reward: object) -> TypeGuard[ScoresItems]:
    """Whether a reward can score every item. `scores_all_items` says whether it should."""
    return hasattr(reward, "score_items")


def scores_leaves(reward: object) -> TypeGuard[ScoresLeaves]:
    """Whether a reward scores drawn leaves as tensors."""
    return hasattr(reward, "score_leaves")


def binds(reward: object) -> TypeGuard[Binds]:
    """Whether a reward must receive the catalog."""
    return hasattr(reward, "bind")


class Reward(FromSpec):
    """Base class of rewards that compute tensors.

    A subclass implements `score_items`. `score_leaves` and the call with TRL's signature follow from it.

    A reward does not have to derive from this class: any callable with TRL's signature is a reward, and any object
    with `score_items` or `score_leaves` is a fast one (see docs/rewards.md).

    Args:
        name: name of the reward in logs; also its `__name__`, which TRL's own trainers read.

    Attributes:
        scores_all_items: whether `CompositeReward` may score all items at every step. False if that would cost a
            forward pass per item: only drawn leaves are scored then, and exact flows raise an error.
        reads_policy: whether `score_leaves` takes `policy_log_probs (B, K)`, log pi of the leaves under the policy in
            training, as a keyword argument.
        reads_prompts: whether the reward reads the encoded prompts, and not only the columns.
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
        """Set the catalog. `CompositeReward` calls this; call it yourself to use a reward on its own."""
        if catalog is not getattr(self, "catalog", None):
            self._prepare(catalog)
        self.catalog, self.tokenizer, self.leaf_reduction = catalog, tokenizer, leaf_reduction
        return self

    def _prepare(self, catalog: ItemCatalog) -> None:
        """Hook for a new catalog, called by `bind`. The default does nothing."""

    def score_items(self, step: Step) -> Tensor:
        """Return the reward of every item for every row: `(B, items)`, in the order of `catalog.items`."""
        raise NotImplementedError(f"{type(self).__name__} must define score_items(step) -> Tensor (B, items).")

    def score_leaves(self, step: Step, leaves: Tensor) -> Tensor:
        """Return the reward of some leaves for every row: `(B, K) -> (B, K)`."""
        scores = self._bound_catalog().fold_items(self.score_items(step), self.leaf_reduction)
        return scores.gather(1, leaves.to(scores.device))

    def __call__(self, prompts: list[str], completion_ids: list[list[int]], **columns: Any) -> list[float]:
        """Return one value per completion, as in TRL. A completion that is not an id of the catalog gets 0."""
        leaves = self._leaves_of(completion_ids)
        columns = {name: values for name, values in columns.items() if name not in REWARD_ARGUMENTS}
        row_ids = torch.as_tensor(columns.get("row_id", range(len(prompts))))
        step = Step.of(self._encoded(prompts) if self.reads_prompts else {}, row_ids, columns, self.catalog)
        scores = self.score_leaves(step, leaves.clamp(min=0)[:, None])[:, 0]
        return torch.where(leaves >= 0, scores.to(leaves.device), 0.0).tolist()

    def _encoded(self, prompts: list[str]) -> Prompts:
        if self.tokenizer is None:
            raise ValueError(f"{self._owner} needs the tokenizer to read prompts; call bind(catalog, tokenizer).")
        encoded = self.tokenizer(
            prompts, add_special_tokens=False, padding=True, padding_side="left", return_tensors="pt"
        )
        return encoded.to(self._bound_catalog().device)

    @property
    def _owner(self) -> str:
        """Name of this reward in errors."""
        return f"Reward {self.__name__!r}"

    def _bound_catalog(self) -> ItemCatalog:
        if not hasattr(self, "catalog"):
            raise ValueError(f"{self._owner} has no catalog; call bind(catalog) first.")
        return self.catalog

    def _items_from_leaves(self, values: Tensor) -> Tensor:
        """Spread values of leaves over their items, `(B, N) -> (B, items)`, so that folding restores the values."""
        catalog = self._bound_catalog()
        if self.leaf_reduction == "sum":
            values = values / catalog.leaf_sizes.to(values.device)
        return values[:, catalog.item_leaf.to(values.device)]

    def _fold_some(self, leaves: Tensor, items: Tensor, values: Tensor) -> Tensor:
        """Fold the rewards of some distinct items per row to `leaves (B, K)`; all other items have reward 0: `(B, K)`.

        `items (B, S)` are positions in the catalog, padded with -1, and `values (B, S)` are their rewards.
        """
        items, values = items.to(leaves.device), values.to(leaves.device)
        item_leaf = self._bound_catalog().item_leaf.to(leaves.device)[items.clamp(min=0)]
        at_leaf = (leaves[:, :, None] == item_leaf[:, None]) & (items >= 0)[:, None]
        leaf_values = torch.where(at_leaf, values[:, None], 0.0)
        return leaf_values.sum(-1) if self.leaf_reduction == "sum" else leaf_values.amax(-1)

    def _leaves_of(self, completion_ids: list[list[int]]) -> Tensor:
        """Return the leaf of each completion, `(n,)`, or -1. Tokens after the id (an end token) are ignored."""
        tree = self._bound_catalog().tree
        tokens = pad_sequence([torch.tensor(ids, dtype=torch.long) for ids in completion_ids], True, -1)
        tokens = tokens[:, : tree.max_depth].to(tree.device)
        nodes = torch.zeros(len(tokens), dtype=torch.long, device=tree.device)
        for column in tokens.unbind(1):
            nodes = torch.where(tree.leaf_at(nodes) >= 0, nodes, tree.step(nodes, column))
        return tree.leaf_at(nodes)
