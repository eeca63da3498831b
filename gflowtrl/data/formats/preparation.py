"""Preparation of a raw dump: read, sort, drop duplicates, filter, add item features, and write a data folder."""

import json
import re
from dataclasses import asdict
from pathlib import Path
from typing import get_args

from gflowtrl.checks import COUNT, FINITE, SHARE, check_choice, check_number

from ..interactions import InteractionData, core_members, exposed_among, impressions_among
from ..readers import read_exposed, read_impressions
from ..writers import write_folder
from .cleaning import clean_features
from .format import Columns, Request
from .log import MAX_MEMORY, Duplicates, InteractionLog, data_of, log_of, read_log
from .output import check_target, output_folder
from .preparation_report import Preparation
from .registry import (
    COMPLETE,
    RAW_FORMATS,
    STREAMED,
    Paths,
    Tables,
    find_files,
    find_sources,
    read_complete,
    read_features,
)
from .source import MAX_LINE_BYTES, MAX_UNPACKED_BYTES, Source


def prepare(
    format: str,
    interactions: Paths | Tables,
    items: Paths | Tables | None = None,
    out: str | Path | None = None,
    *,
    columns: Columns | None = None,
    k_core: int | None = 5,
    min_rating: float | None = None,
    duplicates: Duplicates = "first",
    exposed: str | Path | None = None,
    impressions: str | Path | None = None,
    max_description_characters: int | None = 1000,
    max_malformed: float = 0.01,
    encoding: str | None = None,
    name: str | None = None,
    license: str | None = None,
    source: str | None = None,
    parquet: bool = False,
    max_line_bytes: int = MAX_LINE_BYTES,
    max_unpacked_bytes: int = MAX_UNPACKED_BYTES,
    max_memory: str = MAX_MEMORY,
    overwrite: bool = False,
) -> tuple[InteractionData, Preparation]:
    """Read a raw dump, clean it, and write it as a folder for `read_folder`.

    Interactions are streamed into arrays (16 bytes per interaction, and each id once). Item features are streamed
    after them, and only those of the result are kept, so memory does not grow with the review texts. The steps are, in
    order: leave out ratings below `min_rating`, sort each user's interactions by time (equal times keep the order of
    the file), drop duplicates, compute the k-core. Users and items of the result are sorted by id. Ids become whole
    numbers if all ids of the file are whole numbers.

    Args:
        format: one of `RAW_FORMATS`.
        interactions: the file, plain or packed with gzip or zstandard, or several files that form one log (with times
            in one unit), also as a pattern (`"logs/*.jsonl.gz"`); for `csv`, `jsonl` and `parquet` also a folder of
            such files, whose names may hold columns (`day=2024-05-01/`, Parquet only); for `movielens` and `recbole`
            also the folder that contains both files; for `letter` and `folder` the path for their readers; for `table`
            a DataFrame of pandas or polars, or a table of Arrow, or several.
        items: the same for item features, or `None`.
        out: the folder to write, or `None` to write nothing. It is written completely or not at all.
        columns: the columns of `csv`, `jsonl`, `parquet` and `table`; `None`: `Columns()`.
        k_core: minimum number of interactions of each user and each item; `None`: no filter.
        min_rating: minimum rating that counts as an interaction; `None`: no filter.
        duplicates: which interaction of a user with the same item to keep: `"first"`, `"last"`, or `"keep"` for all.
        exposed: file of items that users were shown at random (`read_exposed`, docs/exposure.md). Those that the
            filters have dropped from the catalog are left out and counted.
        impressions: file of how often each item was shown (`read_impressions`), likewise.
        max_description_characters: maximum length of descriptions, which are cut at a word; `None`: no limit.
        max_malformed: maximum share of malformed lines, 0 to 1; files with more raise an error.
        encoding: text encoding of all files, for example `"cp1252"`; `None`: the encoding of the format, which is
            UTF-8 except for some files of MovieLens.
        name: name of the data; by default the name of `out`, or of the (first) interactions file.
        license: terms of use as free text, stored in `dataset.json` like `source`. `None` keeps those of a `folder`.
        source: origin of the data as free text.
        parquet: whether to write the sequences as Parquet, for logs of millions of users.
        max_line_bytes: maximum length of a line of text; longer ones are an error.
        max_unpacked_bytes: maximum size of a file of text, unpacked; larger ones are an error.
        max_memory: memory for reading and sorting (`"2GiB"`); what exceeds it moves to temporary files. The result and
            Python come in addition.
        overwrite: whether a data folder at `out` may be replaced.

    Returns:
        The data, and a report with the counts of each step.

    Raises:
        FileNotFoundError: if a file is missing.
        FileExistsError: if `out` is not empty, and `overwrite` is not set or `out` is not a data folder.
        ValueError: for invalid arguments, a file in another format, too many malformed lines, or an empty result.
    """
    _check_arguments(format, items, columns, k_core, min_rating, duplicates, max_malformed)
    _check_text(format, encoding, max_description_characters)
    _check_bounds(max_line_bytes, max_unpacked_bytes, max_memory)
    if out is not None:
        check_target(Path(out), overwrite)
    if format in COMPLETE:
        (path, *_), _ = find_files(format, interactions, items)
        sources, of_items = [], []
        paths = [path]
    else:
        bounds = {"max_line_bytes": max_line_bytes, "max_unpacked_bytes": max_unpacked_bytes}
        options = {"max_malformed": max_malformed, "encoding": encoding}
        sources, of_items = find_sources(format, interactions, items, **options, **bounds)
        paths = [source.path for source in (*sources, *of_items)]
    report = Preparation(
        name=name or (Path(out).resolve().name if out else paths[0].resolve().name.split(".")[0]),
        format=format,
        files=list(map(str, paths)),
        settings={"k_core": k_core, "min_rating": min_rating, "duplicates": duplicates},
    )
    if format in COMPLETE:
        data = _from_complete(read_complete(format, paths[0]), report, max_description_characters)
    else:
        request = Request(columns or Columns(), rated=min_rating is not None)
        data = _from_stream(sources, request, report, max_memory)
        if of_items:
            data.item_features = read_features(of_items, request, data.items, report, max_description_characters)
    _add_exposure(data, report, exposed, impressions)
    data.license = data.license if license is None else license
    data.source = data.source if source is None else source
    _count_items_without(data, report)
    data.item_features = {item: row for item, row in data.item_features.items() if row}  # like read_folder
    if out is not None:
        _write(data, report, Path(out), overwrite, parquet)
    return data, report


def _write(data: InteractionData, report: Preparation, out: Path, overwrite: bool, parquet: bool) -> None:
    with output_folder(out, overwrite) as folder:
        write_folder(data, folder, parquet)
        (folder / "preparation.json").write_text(json.dumps(asdict(report), indent=2) + "\n", encoding="utf-8")


def _count_items_without(data: InteractionData, report: Preparation) -> None:
    report.items_without_metadata = sum(item not in data.item_features for item in data.items)
    report.items_without_title = sum("title" not in data.item_features.get(item, ()) for item in data.items)


def _filter(log: InteractionLog, report: Preparation) -> None:
    report.count("read", log)
    report.tied_share = log.sort_by_time()
    duplicates, k = report.settings["duplicates"], report.settings["k_core"]
    report.duplicates = log.drop_duplicates(duplicates)
    report.count("duplicates kept" if duplicates == "keep" else "duplicates dropped", log)
    if k is not None:
        log.keep(core_members(log.users, log.items, k))
        report.count(f"{k}-core", log)
        if not len(log):
            raise ValueError(
                f"{report.name} ({report.files[0]}) has no {k}-core: no user or item is left. Choose a smaller "
                "k_core, or None (0 on the command line) for no filter."
            )


def _filtered_data(log: InteractionLog, report: Preparation) -> InteractionData:
    _filter(log, report)
    return data_of(log, report.name)


def _from_stream(sources: list[Source], request: Request, report: Preparation, max_memory: str) -> InteractionData:
    files = ((source, STREAMED[source.format].interactions(source, request)) for source in sources)
    log, report.below_min_rating = read_log(files, report.settings["min_rating"], max_memory)
    report.take_interactions(sources)
    return _filtered_data(log, report)


def _from_complete(
    origin: InteractionData, report: Preparation, max_description_characters: int | None
) -> InteractionData:
    report.lines = len(origin.users)
    data = _filtered_data(log_of(origin), report)
    if report.settings["k_core"] is None:
        data.items = origin.items  # including items without interactions
    known = origin.item_features
    data.item_features = {
        item: clean_features(known[item], max_description_characters) for item in data.items if item in known
    }
    data.synthetic, data.license, data.source = origin.synthetic, origin.license, origin.source
    known = set(data.items)
    data.exposed = origin.exposed and exposed_among(origin.exposed, known)
    data.impressions = origin.impressions and impressions_among(origin.impressions, known)
    if origin.semantic_ids is not None:
        data.semantic_ids = {item: origin.semantic_ids[item] for item in data.items}
    return data


def _add_exposure(
    data: InteractionData, report: Preparation, exposed: str | Path | None, impressions: str | Path | None
) -> None:
    """Add exposed items and impressions from their files, without those of items that are not in the catalog."""
    known = set(data.items)
    if exposed is not None:
        found = read_exposed(exposed)
        data.exposed = exposed_among(found, known)
        kept, total = (sum(len(shown.items) for shown in (rows or {}).values()) for rows in (data.exposed, found))
        report.exposed_users = len({*(data.exposed or ())} & {*data.users})
        report.exposed_left_out = total - kept
        if data.exposed and not report.exposed_users:
            raise ValueError(
                f"No user of {exposed} is in the log: users there are like {next(iter(data.exposed))!r}, in the log "
                f"like {data.users[0]!r}."
            )
    if impressions is not None:
        counts = read_impressions(impressions, isinstance(data.items[0], int))
        data.impressions = impressions_among(counts, known)
    for file, kept in ((exposed, data.exposed), (impressions, data.impressions)):
        if file is not None and not kept:
            raise ValueError(f"No item of {file} is in the catalog, whose first item is {data.items[0]!r}.")


def _check_arguments(format, items, columns, k_core, min_rating, duplicates, max_malformed) -> None:
    if format not in RAW_FORMATS:
        raise ValueError(f"There is no format {format!r}. Choose one of {', '.join(RAW_FORMATS)}.")
    streamed = STREAMED.get(format)
    if items is not None and (streamed is None or streamed.items is None):
        raise ValueError(f"Format {format!r} has no items file, but items={str(items)!r} was given. Leave it out.")
    if columns is not None and not (streamed and streamed.own_columns):
        raise ValueError(
            f"The columns of format {format!r} are fixed. Leave `columns` out, or use csv, jsonl, parquet or table."
        )
    for name in ("title", "categories"):
        if columns is not None and getattr(columns, name) != name and items is None:
            given = getattr(columns, name)
            raise ValueError(f"The {name} column {given!r} belongs to the items file. Give that file too.")
    if columns is not None and format != "csv" and (columns.header or columns.items_header):
        raise ValueError(f"A header can be given for format 'csv' only, but the format is {format!r}. Leave it out.")
    if min_rating is not None and not (streamed and streamed.has_ratings):
        raise ValueError(f"Format {format!r} has no ratings, but min_rating={min_rating} was given. Leave it out.")
    check_number("k_core", k_core, COUNT, optional=True)
    check_number("min_rating", min_rating, FINITE, optional=True)
    check_choice("duplicates", duplicates, get_args(Duplicates))
    check_number("max_malformed", max_malformed, SHARE)


def _check_bounds(max_line_bytes: int, max_unpacked_bytes: int, max_memory: str) -> None:
    check_number("max_line_bytes", max_line_bytes, COUNT)
    check_number("max_unpacked_bytes", max_unpacked_bytes, COUNT)
    if not re.fullmatch(r"[1-9]\d*(\.\d+)? ?[KMGT]i?B", str(max_memory)):
        raise ValueError(f"max_memory is {max_memory!r}; give a size such as '768MiB' or '4GiB'.")


def _check_text(format: str, encoding: str | None, max_description_characters: int | None) -> None:
    check_number("max_description_characters", max_description_characters, COUNT, optional=True)
    if encoding is None:
        return
    if format in ("parquet", "table") or format not in STREAMED:
        raise ValueError(f"The text of format {format!r} is UTF-8, but encoding={encoding!r} was given. Leave it out.")
    try:
        "".encode(encoding)
    except LookupError:
        raise ValueError(
            f"There is no text encoding {encoding!r}. Choose utf-8, latin-1, cp1252 or another encoding of Python."
        ) from None
