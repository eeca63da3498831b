"""How an entry of a recipe's section `rewards`, `{type: ..., option: value}`, becomes a reward."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, Self


if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

    from gflowtrl.catalog import Item
    from gflowtrl.teachers import Teacher


class RewardContext(Protocol):
    """What a run offers while its rewards are made.

    Attributes:
        titles: title of each item that has one.
        item_features: features of each item (items.jsonl).
    """

    @property
    def titles(self) -> Mapping[Item, str]: ...

    @property
    def item_features(self) -> Mapping[Item, Mapping[str, Any]]: ...

    def teacher(self, spec: Mapping[str, Any] | None = None) -> Teacher:
        """The teacher of `spec`, fitted if it is not yet; None: the recipe's own."""
        ...

    def counts(self, kind: str) -> Tensor:
        """How often each item was taken ("interactions") or shown ("impressions") in training: `(items,)`."""
        ...

    def sft_model(self) -> PreTrainedModel:
        """The model that supervised fine-tuning has trained."""
        ...

    def local(self, name: str) -> str:
        """A folder that the recipe names, relative to the working directory or to the recipe."""
        ...


class FromSpec:
    """What the pipeline asks of a reward class. The defaults suit a class whose options are its constructor's.

    Attributes:
        provided: parameters of the constructor that the run provides, and a recipe cannot set.
        reads_target: whether the reward depends on the logged target. The weight of one that does not can be learned
            from validation rows (`weight: learned`).
    """

    provided: ClassVar[frozenset[str]] = frozenset()
    reads_target: ClassVar[bool] = True

    @classmethod
    def option_names(cls) -> set[str]:
        """Names of the options that a recipe may set."""
        return {*inspect.signature(cls).parameters} - cls.provided

    @classmethod
    def check_spec(cls, spec: Mapping[str, Any]) -> None:
        """Check the options before any work is done, without data and models.

        Raises:
            ValueError, TypeError: an option has a bad value.
        """
        cls(**spec)

    @classmethod
    def needs(cls, spec: Mapping[str, Any]) -> set[str]:
        """What the reward needs of the run: any of "teacher" (the recipe's own), "sft_model", "policy" (the one in
        training), "sessions", "impressions", "titles" (of all items), "group" (all trajectories of a prompt)."""
        return set()

    @classmethod
    def scores_every_item(cls, spec: Mapping[str, Any]) -> bool:
        """Whether the reward of every item is known at each step, as exact flows need it."""
        return not cls.needs(spec) & {"policy", "group"}

    @classmethod
    def from_spec(cls, spec: Mapping[str, Any], context: RewardContext) -> Self:
        """Make the reward.

        Args:
            spec: the options of the recipe, without type and weight.
            context: what the run offers.
        """
        return cls(**spec)
