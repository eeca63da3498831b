"""The raw formats by name, and reading the files of one."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from gflowtrl.catalog import Item

from ..interactions import InteractionData
from ..readers import read_folder, read_letter
from .amazon import AMAZON, AMAZON_2023
from .base import Request
from .cleaning import clean_features
from .log import identifier
from .movielens import MOVIELENS
from .recbole import RECBOLE
from .report import Preparation
from .source import MALFORMED, Source
from .tables import CSV, JSONL, PARQUET, S3REC


#: Files that are streamed.
STREAMED = {
    "amazon-2014": AMAZON,
    "amazon-2018": AMAZON,
    "amazon-2023": AMAZON_2023,
    "movielens": MOVIELENS,
    "recbole": RECBOLE,
    "s3rec": S3REC,
    "csv": CSV,
    "jsonl": JSONL,
    "parquet": PARQUET,
}

#: Folders that hold sequences, features and semantic ids already.
COMPLETE = {"letter": read_letter, "folder": read_folder}

#: Names of the formats that `prepare` reads. docs/data.md describes them.
RAW_FORMATS = (*STREAMED, *COMPLETE)


def find_files(format: str, interactions: Path, items: str | Path | None) -> tuple[Path, Path | None]:
    """The files of interactions and items; in a folder of `movielens` or `recbole` they are looked for."""
    if format in COMPLETE or not interactions.is_dir():
        return interactions, None if items is None else Path(items)
    patterns = STREAMED[format].files
    found = _first_that_is_there(interactions, patterns)
    if found is None:
        wanted = f"one of {', '.join(patterns)}" if patterns else "a file, not a folder"
        raise FileNotFoundError(f"{interactions} is a folder, and {format!r} needs {wanted}. Give the file's path.")
    if items is None:
        items = _first_that_is_there(interactions, STREAMED[format].item_files)
    return found, None if items is None else Path(items)


def _first_that_is_there(folder: Path, patterns: Iterable[str]) -> Path | None:
    for pattern in patterns:
        found = sorted(folder.glob(pattern))
        if len(found) > 1:
            names = ", ".join(path.name for path in found)
            raise ValueError(f"{folder} holds several files {pattern} ({names}). Give the path of one.")
        if found:
            return found[0]
    return None


def read_complete(format: str, path: Path) -> InteractionData:
    """A folder of a format that is complete. Its log of impressions cannot be filtered like a raw dump."""
    data = COMPLETE[format](path)
    if data.events is not None:
        raise ValueError(
            f"{path} has events.jsonl, which would not fit the filtered sequences. Use k_core(read_folder(path)), "
            "which filters both."
        )
    return data


def read_features(
    source: Source,
    request: Request,
    wanted: Iterable[Item],
    report: Preparation,
    max_description_characters: int | None,
) -> dict[Item, dict[str, Any]]:
    """The cleaned features of the wanted items, in the order of `wanted`. The first line about an item counts."""
    by_name = {str(item): item for item in wanted}
    features: dict[Item, dict[str, Any]] = {}
    parsed = STREAMED[source.format].items(source, request)
    for line, record in parsed.records:
        try:
            key, row = parsed.parse(record)
            item = by_name.get(identifier(key))
            if item in features:
                report.repeated_items += 1
            elif item is not None:
                features[item] = clean_features(row, max_description_characters)
        except MALFORMED as error:
            source.reject(line, error)
    source.finish()
    report.take_items(source)
    return {item: features[item] for item in by_name.values() if item in features}
