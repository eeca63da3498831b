"""Items that were shown to users at random, with what they thought of them: the truth that a log does not hold."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import torch
from datasets import Dataset
from torch import Tensor

from gflowtrl.catalog import Item, ItemCatalog

from .interactions import Exposed
from .prompts import IGNORED_LABEL, PromptEncoder
from .splits import ragged


@dataclass(frozen=True)
class ExposedRows:
    """Rows on which a ranking of exposed items is measured.

    Attributes:
        rows: one row per user: `row_id` (position in `data.users`), `user`, `history` (the user's whole log, from
            which prompts take the last items), `candidates` and `liked`.
        own_items: exposed items that were left out because they are in the user's log too.
        users_without_log: exposed users who were left out because they have no log.
    """

    rows: Dataset
    own_items: int
    users_without_log: int

    def __str__(self) -> str:
        left_out = [
            f"{count:,} {what}"
            for count, what in (
                (self.own_items, "exposed items that are in the user's own log"),
                (self.users_without_log, "users without a log"),
            )
            if count
        ]
        found = f"{len(self.rows):,} users with exposed items"
        return f"{found}; left out: {', '.join(left_out)}" if left_out else found


def exposed_rows(
    users: Sequence[Item], sequences: Sequence[Sequence[Item]], exposed: dict[Item, Exposed]
) -> ExposedRows:
    """Build the rows of all users with a log and exposed items. A user whose exposed items are all own ones has none.

    Args:
        users: user ids.
        sequences: the log of each user, oldest first.
        exposed: exposed items by user.

    Raises:
        ValueError: no user has any.
    """
    columns: dict[str, list[Any]] = {name: [] for name in ("row_id", "user", "history", "candidates", "liked")}
    own_items = 0
    for row, (user, sequence) in enumerate(zip(users, sequences, strict=True)):
        if user not in exposed:
            continue
        own = set(sequence)
        shown = [(item, liked) for item, liked in zip(*exposed[user], strict=True) if item not in own]
        own_items += len(exposed[user].items) - len(shown)
        if shown:
            items, likes = zip(*shown, strict=True)
            for name, value in zip(columns, (row, user, sequence, items, likes), strict=True):
                columns[name].append(value)
    if not columns["row_id"]:
        raise ValueError(
            "No user has both a log and exposed items that are not in it. Correct exposed.jsonl, or leave it out."
        )
    lists = {name: _list_column(columns[name]) for name in ("history", "candidates", "liked")}
    table = pa.table({"row_id": pa.array(columns["row_id"], pa.int64()), "user": pa.array(columns["user"]), **lists})
    return ExposedRows(Dataset(table), own_items, len(exposed.keys() - set(users)))


def has_exposed_rows(rows: Dataset) -> bool:
    """Return whether a dataset is the `rows` of `ExposedRows`: candidates and likes instead of a target."""
    return "target" not in rows.column_names and {"candidates", "liked"} <= {*rows.column_names}


def _list_column(lists: Sequence[Sequence[Any]]) -> pa.ListArray:
    flat = pa.array([value for row in lists for value in row])
    return ragged(flat, [len(row) for row in lists])


class ExposedCollator:
    """Collate rows of `ExposedRows` into `prompts`, `row_ids` `(B,)`, `candidates` and `liked`, both `(B, C)`.

    `candidates` are positions in the catalog, right-padded with -1; the padding of `liked` is -100.
    """

    def __init__(self, encoder: PromptEncoder):
        self.encoder = encoder

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
        candidates, liked = ([row[name] for row in rows] for name in ("candidates", "liked"))
        return {
            "prompts": self.encoder([row["history"] for row in rows]),
            "row_ids": torch.tensor([row["row_id"] for row in rows]),
            **self.columns(candidates, liked, self.encoder.catalog),
        }

    @staticmethod
    def columns(
        candidates: Sequence[Sequence[Item]], liked: Sequence[Sequence[int]], catalog: ItemCatalog
    ) -> dict[str, Tensor]:
        """Return the padded `candidates` and `liked`."""
        return {
            "candidates": _padded([catalog.index_of(items) for items in candidates], -1),
            "liked": _padded([torch.tensor(values) for values in liked], IGNORED_LABEL),
        }


def reordered(histories: Sequence[Sequence[Item]], row_ids: Sequence[int], number: int) -> list[list[Item]]:
    """Return histories in another order: 0 is the order of the data, each other number a random one.

    A row's order depends on its id and the number only. Whole histories are shuffled, so that other items may be among
    the last ones.
    """
    if number == 0:
        return [list(history) for history in histories]
    return [
        random.Random(f"{row_id}:{number}").sample(list(history), len(history))
        for history, row_id in zip(histories, row_ids, strict=True)
    ]


def _padded(rows: Sequence[Tensor], padding: int) -> Tensor:
    return torch.nn.utils.rnn.pad_sequence(list(rows), batch_first=True, padding_value=padding)
