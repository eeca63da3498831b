"""Registry of the raw formats by name, and functions that find and read their files."""

import re
from collections.abc import Iterable, Sequence
from glob import glob
from pathlib import Path
from typing import Any

import pyarrow as pa

from gflowtrl.catalog import Item

from ..arrow import as_table
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
from .tables import CSV, JSONL, PARQUET, TABLE


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
    "table": TABLE,
}

#: Readers of formats that already contain sequences, features and semantic ids.
COMPLETE = {"letter": read_letter, "folder": read_folder}

#: Names of the formats that `prepare` supports. docs/data.md describes them.
RAW_FORMATS = (*STREAMED, *COMPLETE)


Paths = str | Path | Sequence[str | Path]
Tables = Any  # a DataFrame of pandas or polars, a table of Arrow, or several
_URL = re.compile(r"[a-zA-Z][\w+.-]+://")


def find_files(format: str, interactions: Paths, items: Paths | None) -> tuple[list[Path], list[Path]]:
    """Find the files of interactions and items.

    If `interactions` is a folder (`movielens` and `recbole`), both are searched there. If the format defines the name
    of the items file, it is searched next to the interactions. Given items take precedence over found ones. A folder
    of your own tables stands for all files of the format in it, a name with `*`, `?` or `[...]` for all files that it
    matches, unless there is a file of this very name.

    Raises:
        ValueError: if no file is given, a file is given twice, a folder contains several matching files, a path is a
            URL, or several paths are given for a complete format.
        FileNotFoundError: if a folder contains no file of the format, or nothing matches a pattern.
    """
    paths = _paths(interactions, "interactions")
    if format in COMPLETE:
        if len(paths) > 1:
            raise ValueError(f"Format {format!r} is read from one path, but {len(paths)} were given. Give one path.")
        return paths, []
    kind = STREAMED[format]
    beside: list[Path] = []
    for place, path in enumerate(paths):
        if path.is_dir() and not kind.parts:
            paths[place] = _in_folder(path, format)
            found = _first_that_is_there(path, kind.item_files)
        else:
            found = kind.items_beside(path)
        if found is not None and found.is_file() and found not in beside:
            beside.append(found)
    described = beside if items is None else _each_once(_in_parts(_paths(items, "items"), kind.parts))
    return _each_once(_in_parts(paths, kind.parts)), described


def find_sources(
    format: str, interactions: Paths | Tables, items: Paths | Tables | None, **options: Any
) -> tuple[list[Source], list[Source]]:
    """Find the files or tables of interactions and items of a streamed format.

    `options` are those of `Source`; errors are those of `find_files` and `as_table`.
    """
    kind = STREAMED[format]
    expected = kind.expected, kind.expected_items
    if format == "table":
        logs, described = _tables(interactions, "log"), _tables(items, "items")
        if not logs:
            raise ValueError("No table of a log was given. Give one or more.")
        return (
            [Source(name, format, expected[0], table=table, **options) for name, table in logs.items()],
            [Source(name, format, expected[1], table=table, **options) for name, table in described.items()],
        )
    logs, described = find_files(format, interactions, items)
    # All are created before the interactions are read, which may take hours, so that a missing file is an error now.
    return (
        [Source(path, format, expected[0], **options) for path in logs],
        [Source(path, format, expected[1], **options) for path in described],
    )


def _tables(given: Tables, word: str) -> dict[str, pa.Table]:
    """Return each table by its name for messages."""
    if given is None:
        return {}
    if not isinstance(given, list | tuple):
        return {f"table of {word}": as_table(given, f"table of {word}")}
    names = [f"table {number} of {word}" for number in range(len(given))]
    return {name: as_table(one, name) for name, one in zip(names, given, strict=True)}


def _paths(given: Paths, name: str) -> list[Path]:
    paths: list[Path] = []
    if hasattr(given, "columns") or hasattr(given, "__arrow_c_stream__"):
        raise ValueError(f"{name} is a {type(given).__name__}, not a file. Read it with format 'table'.")
    for one in [given] if isinstance(given, str | Path) else given:
        if _URL.match(str(one)):
            raise ValueError(f"{one} is a URL. Download the file first, and give its path.")
        if Path(one).exists() or not set("*?[").intersection(str(one)):
            paths.append(Path(one))
            continue
        given_parts = {*Path(one).parts}
        found = [Path(path) for path in sorted(glob(str(one), recursive=True))]
        found = [path for path in found if not _is_hidden(part for part in path.parts if part not in given_parts)]
        if not found:
            raise FileNotFoundError(f"No file matches {one}. Check the pattern.")
        paths += [path for path in found if path.is_file()] or found
    if not paths:
        raise ValueError(f"No file of {name} was given. Give one or more.")
    return paths


def _in_parts(paths: list[Path], endings: tuple[str, ...]) -> list[Path]:
    """Replace folders by the files in them whose names have one of the endings, maybe packed."""
    found: list[Path] = []
    for path in paths:
        if not (path.is_dir() and endings):
            found.append(path)
            continue
        files = (file for file in path.rglob("*") if file.is_file() and not _is_hidden(file.relative_to(path).parts))
        parts = [file for file in files if file.name.removesuffix(".gz").removesuffix(".zst").endswith(endings)]
        if not parts:
            wanted = ", *".join(endings)
            raise FileNotFoundError(f"{path} is a folder without files named *{wanted}. Give the paths of the files.")
        found += sorted(parts)
    return found


def _is_hidden(parts: Iterable[str]) -> bool:
    """Return whether a file is hidden, or one that clusters write for themselves (`_SUCCESS`, `_delta_log/0.json`)."""
    return any(part.startswith((".", "_")) for part in parts)


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
