"""Construction of rewards from the entries of a recipe, `{type: ..., option: value}`."""

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
    """What a run provides to its rewards.

    Attributes:
        titles: title of each item that has one.
        item_features: features of each item (items.jsonl).
    """

    @property
    def titles(self) -> Mapping[Item, str]: ...

    @property
    def item_features(self) -> Mapping[Item, Mapping[str, Any]]: ...

    def teacher(self, spec: Mapping[str, Any] | None = None) -> Teacher:
        """Return the teacher of `spec`, fitted if necessary. None: the teacher of the recipe."""
        ...

    def counts(self, kind: str) -> Tensor:
        """Return the training count of each item, `(items,)`: of "interactions" or of "impressions"."""
        ...

    def sft_model(self) -> PreTrainedModel:
        """Return the model from supervised fine-tuning."""
        ...

    def local(self, name: str) -> str:
        """Return the path of a folder in the recipe, relative to the working directory or to the recipe."""
        ...


class FromSpec:
    """Methods of a reward class for the pipeline. The defaults use the parameters of the constructor as options.

    Attributes:
        provided: parameters of the constructor that the run provides and a recipe cannot set.
        reads_target: whether the reward depends on the logged target. If not, its weight can be learned from
            validation rows (`weight: learned`).
    """

    provided: ClassVar[frozenset[str]] = frozenset()
    reads_target: ClassVar[bool] = True
    scores_all_items: bool  # see Reward

    @classmethod
    def option_names(cls) -> set[str]:
        """Return the names of the options that a recipe can set."""
        return {*inspect.signature(cls).parameters} - {*cls.provided}

    @classmethod
    def check_spec(cls, spec: Mapping[str, Any]) -> None:
        """Check the options before the run, without data and models.

        The default calls the constructor, unless it needs what only the run can provide.

        Raises:
            ValueError, TypeError: an option has an invalid value.
        """
        if not cls.provided:
            cls(**spec)

    @classmethod
    def needs(cls, spec: Mapping[str, Any]) -> set[str]:
        """Return what the reward needs from the run.

        Any of "teacher" (of the recipe), "sft_model", "policy" (in training), "sessions", "impressions", "titles" (of
        all items), "language_model" (in the folder that the option `model` names) and "group" (all trajectories of a
        prompt).
        """
        return set()

    @classmethod
    def scores_every_item(cls, spec: Mapping[str, Any]) -> bool:
        """Return whether the reward of every item is known at each step, as exact flows require."""
        return cls.scores_all_items and not cls.needs(spec) & {"policy", "group"}

    @classmethod
    def may_be_negative(cls, spec: Mapping[str, Any]) -> bool:
        """Return whether the reward has negative values, which need `reward_transform="exp"`."""
        return False

    @classmethod
    def from_spec(cls, spec: Mapping[str, Any], context: RewardContext) -> Self:
        """Make the reward.

        Args:
            spec: the options of the recipe, without type and weight.
            context: what the run provides; the default passes its attributes named in `provided`.
        """
        return cls(**{name: getattr(context, name) for name in cls.provided}, **spec)
