"""The files of `recommend_users`: parts, and the output that they are merged into."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import chain, groupby
from operator import itemgetter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow.csv import CSVWriter

from gflowtrl.catalog import Item
from gflowtrl.files import reading, write_atomically
from gflowtrl.recommendation import Recommendation


POLICY, POPULAR = "policy", "popularity"
PART = "a part of the lists, which is made again if it is removed"
COLUMNS = ["user", "rank", "item", "probability", "source"]


@dataclass
class UsersReport:
    """What `recommend_users` has written.

    Attributes:
        users: all users.
        by_popularity: users without an item that the model knows, who got popular items.
        without_items: users for whom nothing is left to recommend.
        short_lists: users with fewer than k items, those without any among them.
        unknown_items: items of the histories that are not in the model's catalog; they were skipped.
        allowed_items: how many items could be recommended; None: all.
    """

    users: int = 0
    by_popularity: int = 0
    without_items: int = 0
    short_lists: int = 0
    unknown_items: int = 0
    allowed_items: int | None = None

    def __str__(self) -> str:
        notes = {
            "by popularity, because the model knows no item of their history": self.by_popularity,
            "with fewer items than asked for": self.short_lists,
            "without any item": self.without_items,
        }
        parts = [f"{self.users:,} users", *(f"{count:,} {what}" for what, count in notes.items() if count)]
        text = "; ".join(parts)
        if self.unknown_items:
            text += f". {self.unknown_items:,} items of the histories are not in the model's catalog and were skipped"
        return text + "."


def check_output(output: Path) -> None:
    """Raise a ValueError if the ending of a file names no format."""
    if output.suffix not in WRITERS:
        has = f"ends with {output.suffix!r}" if output.suffix else "has no ending"
        raise ValueError(f"{output} {has}; choose one of {', '.join(WRITERS)}.")
    if output.is_dir():
        raise ValueError(f"{output} is a folder. Give the name of a file.")


def table_of(
    users: Sequence[Item],
    lists: Sequence[Sequence[Recommendation]],
    cold: Sequence[bool],
    items: Sequence[Item],
    k: int,
) -> tuple[pa.Table, UsersReport]:
    """Return the lists of some users as a table, and what to report about them.

    Args:
        users: the users.
        lists: the list of each user.
        cold: whether each list is by popularity.
        items: the catalog, for the type of the column.
        k: length of a complete list.
    """
    lengths = np.array([len(found) for found in lists])
    of_user = np.repeat(np.arange(len(lists)), lengths)
    source = np.where(np.array(cold, dtype=bool), POPULAR, POLICY)[of_user]
    columns = {
        "user": pa.array(users).take(pa.array(of_user)),
        "rank": pa.array(np.concatenate([np.arange(1, length + 1) for length in lengths]), pa.int32()),
        "item": pa.array([entry.item for found in lists for entry in found], pa.array(items).type),
        "probability": pa.array([entry.probability for found in lists for entry in found], pa.float64()),
        "source": pa.array(source.tolist(), pa.string()),
    }
    report = UsersReport(
        users=len(lists),
        by_popularity=sum(cold),
        without_items=int((lengths == 0).sum()),
        short_lists=int((lengths < k).sum()),
    )
    return pa.table(columns), report


def write_part(table: pa.Table, report: UsersReport, inputs: str, file: Path) -> None:
    """Write a part with its report and a hash of its inputs, completely or not at all."""
    described = table.replace_schema_metadata({"report": json.dumps(asdict(report)), "inputs": inputs})
    write_atomically(file, lambda partial: pq.write_table(described, partial))


def inputs_of(file: Path) -> str | None:
    """Return the hash of a part's inputs; None if the part is missing or damaged."""
    try:
        return (pq.read_schema(file).metadata or {})[b"inputs"].decode()
    except (OSError, KeyError, pa.ArrowException):
        return None


def merge(parts: Sequence[Path], users: Sequence[Item], output: Path, partial: Path) -> UsersReport:
    """Merge the parts of all users into the output, whose ending is its format, and add up their reports.

    Args:
        parts: the files of the parts, in the order of the users.
        users: all users, also those without an item.
        output: the file to write, completely or not at all.
        partial: file on the same disk, which becomes the output when it is complete.
    """
    WRITERS[output.suffix](parts, users, partial)
    os.replace(partial, output)
    total = UsersReport()
    for part in parts:
        with reading(part, PART):
            report = json.loads(pq.read_schema(part).metadata[b"report"])
            for name in ("users", "by_popularity", "without_items", "short_lists", "unknown_items"):
                setattr(total, name, getattr(total, name) + report[name])
    return total


def _table(part: Path) -> pa.Table:
    with reading(part, PART):
        table = pq.read_table(part).replace_schema_metadata()
        if table.column_names != COLUMNS:
            raise ValueError(f"its columns are {', '.join(table.column_names)}")
        return table


def _append(writer: pq.ParquetWriter | CSVWriter, part: Path) -> None:
    with reading(part, PART):
        writer.write_table(_table(part))


def _write_parquet(parts: Sequence[Path], users: Sequence[Item], target: Path) -> None:
    schema = pq.read_schema(parts[0]).remove_metadata()
    with pq.ParquetWriter(target, schema) as writer:
        for part in parts:
            _append(writer, part)


def _write_csv(parts: Sequence[Path], users: Sequence[Item], target: Path) -> None:
    with CSVWriter(target, pq.read_schema(parts[0]).remove_metadata()) as writer:
        for part in parts:
            _append(writer, part)


def _write_jsonl(parts: Sequence[Path], users: Sequence[Item], target: Path) -> None:
    found = chain.from_iterable(groupby(_table(part).to_pylist(), itemgetter("user")) for part in parts)
    user_with_items, rows = next(found, (None, ()))
    with target.open("w", encoding="utf-8") as out:
        for user in users:
            has_items = user == user_with_items
            out.write(json.dumps(_line(user, list(rows) if has_items else []), ensure_ascii=False) + "\n")
            if has_items:
                user_with_items, rows = next(found, (None, ()))


def _line(user: Item, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    recommendations = [{"item": row["item"], "probability": row["probability"]} for row in rows]
    return {"user": user, "recommendations": recommendations, "source": rows[0]["source"] if rows else None}


WRITERS: dict[str, Callable[[Sequence[Path], Sequence[Item], Path], None]] = {
    ".parquet": _write_parquet,
    ".csv": _write_csv,
    ".jsonl": _write_jsonl,
}
