"""Altered copies of the users' training sequences: more histories for which a policy learns the reward."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from datasets import Dataset, concatenate_datasets

from gflowtrl.catalog import Item
from gflowtrl.checks import COUNT, NOT_NEGATIVE, SHARE_BELOW_ONE, check_number

from .splits import ragged


@dataclass(frozen=True)
class Augmentation:
    """How training sequences are altered.

    A GFlowNet learns the reward of every item, and rewards such as a teacher's scores are known for any history, not
    only for those in the log. Altered histories are further inputs for which the policy learns what the teacher says,
    as in distillation (Beyer et al., CVPR 2022). Dropping and reordering items are the crop, mask and reorder
    operations of CL4SRec (Xie et al., ICDE 2022).

    Attributes:
        copies: altered copies of each sequence, in addition to the sequence itself.
        drop: probability that an item is left out of a copy.
        shift: items move by up to about so many positions; 0 keeps the order. Each position gets a random number
            between 0 and `shift` added, and the items are sorted by the sum.

    Raises:
        ValueError: a value is out of range, or both `drop` and `shift` are 0, so that copies would be equal.
    """

    copies: int = 1
    drop: float = 0.2
    shift: float = 1.5

    def __post_init__(self) -> None:
        check_number("copies", self.copies, COUNT)
        check_number("drop", self.drop, SHARE_BELOW_ONE)
        check_number("shift", self.shift, NOT_NEGATIVE)
        if self.drop == 0 and self.shift == 0:
            raise ValueError("drop and shift are both 0, so copies would equal the sequences. Set one of them.")

    def __call__(self, sequences: Sequence[Sequence[Item]], seed: int = 0) -> list[list[Item]]:
        """Return the copies: the first ones of all sequences, then the second ones, and so on.

        A copy keeps at least two items of a sequence that has them.
        """
        random = np.random.default_rng(seed)
        return [self._alter(sequence, random) for _ in range(self.copies) for sequence in sequences]

    def _alter(self, sequence: Sequence[Item], random: np.random.Generator) -> list[Item]:
        keys = random.random(len(sequence))  # the smallest ones are dropped, if they are small enough
        kept = np.flatnonzero((keys >= self.drop) | (np.argsort(np.argsort(-keys)) < 2))
        order = np.argsort(kept + self.shift * random.random(len(kept)), kind="stable")
        return [sequence[position] for position in kept[order].tolist()]


COLUMNS = ["row_id", "user", "history", "target"]


def check_augmentable(rows: Dataset) -> None:
    """Raise an error for training rows with sessions, which altered sequences would not have."""
    if others := sorted({*rows.column_names} - {*COLUMNS}):
        raise ValueError(
            f"Altered sequences have no sessions, but the training rows have {', '.join(others)}. Train without "
            f"augmentation, or without events.jsonl."
        )


def augmented_rows(
    rows: Dataset,
    users: Sequence[Item],
    sequences: Sequence[Sequence[Item]],
    augmentation: Augmentation,
    seed: int = 0,
    first_row_id: int | None = None,
    max_history_items: int | None = None,
) -> Dataset:
    """Return training rows and those of the altered sequences: one row per item of a copy except the first.

    Args:
        rows: `Splits.train`.
        users: user ids; the rows of a copy have the user of the original.
        sequences: `Splits.train_sequences`.
        augmentation: how they are altered.
        seed: seed of the copies.
        first_row_id: the first row id of the copies, such as the number of interactions; None: the first free one.
        max_history_items: maximum items per history; None: no limit.

    Raises:
        ValueError: the rows have columns (sessions) that altered sequences would not have, or the histories have 2^31
            items or more in total.
    """
    check_augmentable(rows)
    copies = augmentation(sequences, seed)
    ends = [(copy, end) for copy, sequence in enumerate(copies) for end in range(1, len(sequence))]
    histories = [copies[copy][max(0, end - (max_history_items or end)) : end] for copy, end in ends]
    if (total := sum(map(len, histories))) >= 2**31:
        raise ValueError(f"The histories of the altered copies have {total} items in total. Set max_history_items.")
    first = 1 + max(rows["row_id"][:], default=-1) if first_row_id is None else first_row_id
    items = rows.features["history"].feature.pa_type
    table = pa.table(
        {
            "row_id": pa.array(range(first, first + len(ends)), rows.features["row_id"].pa_type),
            "user": pa.array([users[copy % len(users)] for copy, _ in ends], rows.features["user"].pa_type),
            "history": ragged(pa.array([item for h in histories for item in h], items), [len(h) for h in histories]),
            "target": pa.array([copies[copy][end] for copy, end in ends], rows.features["target"].pa_type),
        }
    )
    added = Dataset(table).select_columns(rows.column_names).cast(rows.features)
    return concatenate_datasets([rows, added])
