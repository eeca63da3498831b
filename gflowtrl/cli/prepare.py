"""`gflowtrl prepare`: convert a raw dump to a data folder."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import asdict
from inspect import signature
from pathlib import Path

from .common import guarded, make_parser, parse, show


def main(arguments: Sequence[str]) -> int:
    """Run the command and return the exit code."""
    parser = make_parser("prepare", "Convert a raw dump to a data folder for training (docs/data.md).")
    parser.add_argument("--format", help="amazon-2014, -2018 or -2023, movielens, recbole, letter, s3rec, csv, ...")
    parser.add_argument(
        "--interactions", "--reviews", nargs="+", metavar="FILE", help="logs, plain or packed, patterns or folders"
    )
    parser.add_argument("--items", "--meta", nargs="+", metavar="FILE", help="item metadata, likewise")
    parser.add_argument("--exposed", metavar="FILE", help="items that users were shown at random (docs/exposure.md)")
    parser.add_argument("--impressions", metavar="FILE", help="how often each item was shown (docs/exposure.md)")
    parser.add_argument("--download", metavar="NAME", help="download a public data set to --raw instead")
    parser.add_argument("--raw", metavar="DIR", default="raw", help="folder for downloaded files")
    parser.add_argument("--out", required=True, metavar="DIR", help="output folder")
    parser.add_argument("--k_core", type=int, default=5, help="fewest interactions per user and item; 0: no filter")
    parser.add_argument("--min_rating", type=float, help="lowest rating that counts as an interaction")
    parser.add_argument("--duplicates", default="first", help="of one user and item: first, last, or keep (all)")
    parser.add_argument("--max_description_characters", type=int, default=1000, help="longer descriptions are cut")
    parser.add_argument("--max_malformed", type=float, default=0.01, help="tolerated fraction of malformed lines")
    parser.add_argument("--encoding", help="text encoding of the files, for example cp1252; by default the format's")
    parser.add_argument("--name", help="name of the data in reports; by default the name of the folder")
    parser.add_argument("--license", metavar="TEXT", help="license of the data, in your own words")
    parser.add_argument("--source", metavar="TEXT", help="source of the data; known for downloads")
    parser.add_argument("--parquet", action="store_true", help="write the sequences as Parquet, for millions of users")
    parser.add_argument("--max_line_bytes", type=int, default=1 << 28, help="longer lines are an error")
    parser.add_argument("--max_unpacked_bytes", type=int, default=1 << 40, help="larger files are an error")
    parser.add_argument("--max_memory", default="768MiB", help="more of the log moves to temporary files (TMPDIR)")
    parser.add_argument("--overwrite", action="store_true", help="replace a data folder, but not its item tokenizer")
    for column, default in (("user", "user_id"), ("item", "item_id"), ("time", "timestamp"), ("rating", "rating")):
        parser.add_argument(f"--{column}_column", help=f"column name in csv, jsonl and parquet; by default {default}"
                            + ("; none: the file is in order of time" if column == "time" else ""))  # fmt: skip
    parser.add_argument("--title_column", help="the same for titles in the file of items; by default title")
    parser.add_argument("--categories_column", help="the same for categories; by default categories")
    parser.add_argument(
        "--time_format", help="format of times, for example %%d.%%m.%%Y; by default numbers or ISO 8601"
    )
    parser.add_argument("--header", nargs="+", metavar="COLUMN", help="column names of a csv file without a header")
    parser.add_argument("--items_header", nargs="+", metavar="COLUMN", help="the same for a csv file of items")
    return guarded(lambda: _prepare(parse(parser, arguments)))


def _prepare(options: argparse.Namespace) -> None:
    from gflowtrl.data import RAW_FORMATS, download, prepare
    from gflowtrl.data.formats.downloads import source_of
    from gflowtrl.data.formats.output import check_target

    if options.download is not None:
        if options.format or options.interactions or options.items:
            raise ValueError("--download brings its own files and format; leave --format and the files out.")
        check_target(Path(options.out), options.overwrite)  # before hours of downloading
        options.format, options.interactions, options.items = download(options.download, options.raw)
        options.source = source_of(options.download) if options.source is None else options.source
    elif options.format is None or options.interactions is None:
        missing = "--format" if options.format is None else "--interactions"
        raise ValueError(f"{missing} is missing. Formats are {', '.join(RAW_FORMATS)}; or use --download NAME.")
    options.columns, options.k_core = _columns(options), options.k_core or None
    _, report = prepare(**{name: getattr(options, name) for name in signature(prepare).parameters})
    show(options, asdict(report), f"{report.summary()}\n\nWritten to {options.out}.{_next_step(Path(options.out))}")


def _next_step(out: Path) -> str:
    """Return a hint to make semantic ids, if the folder has none yet."""
    from gflowtrl.data.formats.output import item_tokenizers

    kept = item_tokenizers(out)
    hint = f" The item tokenizer of the earlier data was kept ({', '.join(map(str, kept))})." if kept else ""
    if (out / "semantic_ids.json").is_file():
        return hint
    if not kept:
        return f" Next: gflowtrl tokenize --data_dir {out}"
    folder = kept[0] if kept[0].is_dir() else out
    tokenizer = "" if folder == out / "item_tokenizer" else f" --tokenizer {folder}"
    return f"{hint} Next: gflowtrl tokenize --data_dir {out}{tokenizer} --add, so that items keep their ids"


def _columns(options: argparse.Namespace):
    """Return the `Columns` of the options that are set, or None."""
    from gflowtrl.data import Columns

    kinds = ("user", "item", "time", "rating", "title", "categories")
    names = {name: getattr(options, f"{name}_column") for name in kinds}
    names |= {name: getattr(options, name) for name in ("header", "items_header", "time_format")}
    names = {name: value for name, value in names.items() if value is not None}
    if names.get("time") == "none":
        names["time"] = None
    return Columns(**names) if names else None
