"""Writer of the folder format, which docs/data.md describes."""

import json
import shutil
from collections.abc import Iterable
from itertools import repeat
from pathlib import Path
from typing import Any

from gflowtrl.files import write_atomically

from .interactions import InteractionData, flat_times, flatten
from .parquet import ITEMS_FILE, SEQUENCES_FILE, write_parquet_sequences
from .sequences import Sequences


JSON_FILE = "sequences.jsonl"


def write_folder(data: InteractionData, path: str | Path, parquet: bool = False) -> None:
    """Write `data` in the folder format, so that `read_folder(path)` returns it again.

    The folder is created if needed. Existing files of semantic ids, events, exposed items and impressions are removed
    if `data` has none. A feature called `item` is left out, because the id is stored under that name.

    Args:
        data: the data.
        path: the folder.
        parquet: whether to write the sequences as Parquet, which is smaller and faster to read than JSON lines.
    """
    path = Path(path)
    path.mkdir(parents=True, exist_ok=True)
    if parquet:
        write_parquet_sequences(data, path / SEQUENCES_FILE)
    else:
        write_atomically(path / JSON_FILE, lambda partial: _write_sequences(data, partial))
    for name in (JSON_FILE if parquet else SEQUENCES_FILE, ITEMS_FILE):
        if (path / name).is_dir():
            shutil.rmtree(path / name)
        (path / name).unlink(missing_ok=True)
    rows = ({"item": item} | data.item_features.get(item, {}) | {"item": item} for item in data.items)
    _write_lines(path / "items.jsonl", rows)
    about = {"name": data.name, "synthetic": data.synthetic}
    about |= {key: text for key in ("license", "source") if (text := getattr(data, key)) is not None}
    (path / "dataset.json").write_text(json.dumps(about) + "\n", encoding="utf-8")
    for name in ("semantic_ids.json", "events.jsonl", "exposed.jsonl", "impressions.json"):
        (path / name).unlink(missing_ok=True)
    if data.semantic_ids is not None:
        ids = {str(item): tokens for item, tokens in data.semantic_ids.items()}
        (path / "semantic_ids.json").write_text(json.dumps(ids) + "\n", encoding="utf-8")
    if data.events is not None:
        keys = ("sessions", "items", "levels")
        rows = (
            {"user": user} | {key: [event[column] for event in log] for column, key in enumerate(keys)}
            for user, log in zip(data.users, data.events, strict=True)
        )
        _write_lines(path / "events.jsonl", rows)
    if data.exposed is not None:
        rows = ({"user": user, "items": items, "liked": liked} for user, (items, liked) in data.exposed.items())
        _write_lines(path / "exposed.jsonl", rows)
    if data.impressions is not None:
        counts = {str(item): count for item, count in data.impressions.items()}
        (path / "impressions.json").write_text(json.dumps(counts) + "\n", encoding="utf-8")


def _write_sequences(data: InteractionData, file: Path) -> None:
    """Write users, items and times as JSON lines, each id encoded once."""
    codes, offsets = flatten(data.sequences, data.items)
    texts = [json.dumps(item, ensure_ascii=False) for item in data.items]
    times = repeat(None) if data.times is None else Sequences(flat_times(data.times), offsets)
    with file.open("w", encoding="utf-8") as out:
        for user, items, when in zip(data.users, Sequences(codes, offsets, texts), times, strict=False):
            moments = "" if when is None else f', "times": {when}'
            out.write(f'{{"user": {json.dumps(user, ensure_ascii=False)}, "items": [{", ".join(items)}]{moments}}}\n')


def _write_lines(file: Path, rows: Iterable[dict[str, Any]]) -> None:
    with file.open("w", encoding="utf-8") as out:
        out.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
