"""Registry of the raw formats by name, and functions that find and read their files."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from gflowtrl.catalog import Item

from ..interactions import InteractionData
from ..readers import read_folder, read_letter
from .amazon import AMAZON_2014, AMAZON_2018, AMAZON_2023
from .cleaning import clean_features
from .format import Request
from .log import identifier
from .movielens import MOVIELENS
from .plain import UNREADABLE
from .preparation_report import Preparation
from .recbole import RECBOLE
from .s3rec import S3REC
from .source import MALFORMED, Source
from .tables import CSV, JSONL, PARQUET


#: Formats whose files are streamed.
STREAMED = {
    "amazon-2014": AMAZON_2014,
    "amazon-2018": AMAZON_2018,
    "amazon-2023": AMAZON_2023,
    "movielens": MOVIELENS,
    "recbole": RECBOLE,
    "s3rec": S3REC,
    "csv": CSV,
    "jsonl": JSONL,
    "parquet": PARQUET,
}

#: Readers of formats that already contain sequences, features and semantic ids.
COMPLETE = {"letter": read_letter, "folder": read_folder}

#: Names of the formats that `prepare` supports. docs/data.md describes them.
RAW_FORMATS = (*STREAMED, *COMPLETE)


Paths = str | Path | Sequence[str | Path]


def find_files(format: str, interactions: Paths, items: Paths | None) -> tuple[list[Path], list[Path]]:
    """Find the files of interactions and items.

    If `interactions` is a folder (`movielens` and `recbole`), both are searched there. If the format defines the name
    of the items file, it is searched next to the interactions. Given items take precedence over found ones.

    Raises:
        ValueError: if no file is given, a file is given twice, a folder contains several matching files, or several
            paths are given for a complete format.
        FileNotFoundError: if a folder contains no file of the format.
    """
    paths = _paths(interactions, "interactions")
    if format in COMPLETE:
        if len(paths) > 1:
            raise ValueError(f"Format {format!r} is read from one path, but {len(paths)} were given. Give one path.")
        return paths, []
    beside: list[Path] = []
    for place, path in enumerate(paths):
        if path.is_dir():
            paths[place] = _in_folder(path, format)
            found = _first_that_is_there(path, STREAMED[format].item_files)
        else:
            found = STREAMED[format].items_beside(path)
        if found is not None and found.is_file() and found not in beside:
            beside.append(found)
    return _each_once(paths), beside if items is None else _each_once(_paths(items, "items"))


def _paths(given: Paths, name: str) -> list[Path]:
    paths = [Path(given)] if isinstance(given, str | Path) else list(map(Path, given))
    if not paths:
        raise ValueError(f"No file of {name} was given. Give one or more.")
    return paths


def _each_once(paths: list[Path]) -> list[Path]:
    seen: set[Path] = set()
    for path in paths:
        if path.resolve() in seen:
            raise ValueError(f"{path} is given twice, so its lines would count twice. Give each file once.")
        seen.add(path.resolve())
    return paths


def _in_folder(folder: Path, format: str) -> Path:
    patterns = STREAMED[format].files
    found = _first_that_is_there(folder, patterns)
    if found is None:
        wanted = f"one of {', '.join(patterns)}" if patterns else "a file, not a folder"
        raise FileNotFoundError(f"{folder} is a folder, and {format!r} needs {wanted}. Give the file's path.")
    return found


def _first_that_is_there(folder: Path, patterns: Iterable[str]) -> Path | None:
    for pattern in patterns:
        found = sorted(folder.glob(pattern))
        if len(found) > 1:
            names = ", ".join(path.name for path in found)
            raise ValueError(f"{folder} contains several files {pattern} ({names}). Give the path of one.")
        if found:
            return found[0]
    return None


def read_complete(format: str, path: Path) -> InteractionData:
    """Read a folder of a complete format; raise an error for event logs, which `prepare` cannot filter."""
    data = COMPLETE[format](path)
    if data.events is not None:
        raise ValueError(
            f"{path} has events.jsonl, which would not match the filtered sequences. Use k_core(read_folder(path)), "
            "which filters both."
        )
    return data


def read_features(
    sources: Sequence[Source],
    request: Request,
    wanted: Iterable[Item],
    report: Preparation,
    max_description_characters: int | None,
) -> dict[Item, dict[str, Any]]:
    """Read the cleaned features of the wanted items, in the order of `wanted`, using the first line of each item."""
    by_name = {str(item): item for item in wanted}
    features: dict[Item, dict[str, Any]] = {}
    for source in sources:
        parsed, line = STREAMED[source.format].items(source, request), None
        for line, record in parsed.records:
            try:
                key, row = parsed.parse(record)
                item = by_name.get(identifier(key))
                if item in features:
                    report.repeated_items += 1
                elif item is not None:
                    features[item] = clean_features(row, max_description_characters)
                    report.unreadable_items += UNREADABLE in str(features[item])
            except MALFORMED as error:
                source.reject(line, error)
        source.finish(line)
    report.take_items(sources)
    return {item: features[item] for item in by_name.values() if item in features}
