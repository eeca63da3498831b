"""Sections of a recipe with fields of our own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

from gflowtrl.checks import (
    COUNT,
    NOT_NEGATIVE,
    POSITIVE_SHARE,
    SHARE_BELOW_ONE,
    at_least,
    check_choice,
    check_number,
)
from gflowtrl.configuration import check_types, field_names, locate_errors
from gflowtrl.data import Augmentation
from gflowtrl.metrics import primary_cutoff
from gflowtrl.semantic_ids import SemanticIdOptions


T = TypeVar("T")
SPLITS = ("leave_one_out", "temporal")


def setting(default: Any, help: str) -> Any:
    return field(default_factory=lambda: default, metadata={"help": help})


@dataclass
class DataSection:
    """How the data are read.

    Raises:
        ValueError: a number is out of range, or an unknown or contradictory option of semantic ids or augmentation.
        TypeError: such an option has the wrong type.
    """

    k_core: int | None = setting(None, "drop users and items with fewer interactions; null: keep all")
    max_history_items: int = setting(20, "how many items of a history models see, the last ones")
    split: str = setting(
        "leave_one_out", "leave_one_out (the last items of each user) or temporal (two points in time, for all users)"
    )
    validation_share: float = setting(0.1, "share of the interactions between the two points in time")
    test_share: float = setting(0.1, "share of the interactions after the second one")
    shop: dict = setting({}, "fields of gflowtrl.data.SyntheticShop, used if data_dir is null")
    semantic_ids: SemanticIdOptions | None = setting(
        None, "how the run makes semantic ids ({}: the defaults); null: those of the data folder"
    )
    new_items: float = setting(
        0.0, "share of the items, chosen at random, that occur in nothing but the test targets: the test of new items"
    )
    augmentation: Augmentation | None = setting(
        None, "altered copies of the training sequences for sft, control and gflownet ({}: the defaults); null: none"
    )

    def __post_init__(self) -> None:
        self.semantic_ids = _options(SemanticIdOptions, self.semantic_ids, "data.semantic_ids", "{quantizer: kmeans}")
        self.augmentation = _options(Augmentation, self.augmentation, "data.augmentation", "{copies: 3}")
        check_number("data.k_core", self.k_core, COUNT, optional=True)
        check_number("data.max_history_items", self.max_history_items, COUNT)
        check_number("data.new_items", self.new_items, SHARE_BELOW_ONE)
        check_choice("data.split", self.split, SPLITS)
        shares = (self.validation_share, self.test_share)
        for name, share in zip(("validation_share", "test_share"), shares, strict=True):
            check_number(f"data.{name}", share, POSITIVE_SHARE)
        check_number("data.validation_share + data.test_share", sum(shares), POSITIVE_SHARE)
        if self.split == SPLITS[0] and shares != (0.1, 0.1):
            raise ValueError("data.validation_share and data.test_share are for data.split: temporal only.")
        if self.split == SPLITS[1] and self.new_items:
            raise ValueError(
                "With data.split: temporal, the new items are those of the test period; leave new_items out."
            )


def _options(kind: type[T], given: Any, where: str, example: str) -> T | None:
    """The options of a recipe's mapping; errors name them as `<where>.<field>`."""
    if given is None or isinstance(given, kind):
        return given
    if not isinstance(given, Mapping):
        raise TypeError(f"{where} must be null or fields with values, such as {example}, not {given!r}.")
    values = check_types(kind, given, where)
    with locate_errors(where, field_names(kind)):
        return kind(**values)


@dataclass
class StoppingSection:
    """Fields of every training section (`sft`, `control`, `gflownet`) besides those of its training arguments.

    Raises:
        ValueError: a number is out of range.
    """

    early_stopping_patience: int | None = setting(
        None, "stop after so many epochs without a better validation metric; null: train to the end"
    )

    def __post_init__(self) -> None:
        check_number("early_stopping_patience", self.early_stopping_patience, COUNT, optional=True)


@dataclass
class EvaluationSection:
    """How policies are measured.

    Raises:
        ValueError: a number is out of range, or the beam is narrower than the longest list.
    """

    num_beams: int = setting(20, "width of the constrained beam search")
    ks: list[int] = setting([5, 10, 20], "cutoffs of the metrics")
    batch_size: int = setting(256, "prompts decoded together")
    users: int | None = setting(
        None, "how many users are measured, a random choice that is the same in all runs; null: all"
    )
    bootstrap_samples: int = setting(10_000, "resamples of users for the interval of GFlowNet minus control")
    calibration_rows: int | None = setting(
        None, "training and test rows on which policies are compared with R/Z; null: 64 if that is quick; 0: none"
    )
    exposed_orders: int = setting(
        1, "average policies and teachers over so many orders of a history before they rank exposed items"
    )
    exposed_correction: float = setting(
        0.5, "c of the corrected ranking of exposed items: log-probability - c log(impressions + 1)"
    )

    def __post_init__(self) -> None:
        least = {"num_beams": 1, "batch_size": 1, "bootstrap_samples": 2, "users": 1, "calibration_rows": 0}
        least |= {"exposed_orders": 1}
        check_number("evaluation.exposed_correction", self.exposed_correction, NOT_NEGATIVE)
        for name, low in least.items():
            optional = name in ("users", "calibration_rows")
            check_number(f"evaluation.{name}", getattr(self, name), at_least(low), optional)
        if not self.ks or min(self.ks) < 1:
            raise ValueError(f"evaluation.ks is {self.ks}; give lengths of at least 1.")
        if self.num_beams < max(self.ks):
            raise ValueError(f"evaluation.num_beams is {self.num_beams}; evaluation.ks needs at least {max(self.ks)}.")

    @property
    def primary_k(self) -> int:
        return primary_cutoff(self.ks)
