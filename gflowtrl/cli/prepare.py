"""`gflowtrl prepare`: a raw dump to a data folder."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import asdict
from inspect import signature
from pathlib import Path

from .common import guarded, make_parser, parse, show


def main(arguments: Sequence[str]) -> int:
    """Runs the command; returns the exit code."""
    parser = make_parser("prepare", "Writes the data folder that training reads from a raw dump (docs/data.md).")
    parser.add_argument("--format", help="amazon-2014, -2018 or -2023, movielens, recbole, letter, s3rec, csv, ...")
    parser.add_argument("--interactions", "--reviews", nargs="+", metavar="FILE", help="files, plain or gzipped")
    parser.add_argument("--items", "--meta", nargs="+", metavar="FILE", help="what is known about the items, likewise")
    parser.add_argument("--download", metavar="NAME", help="a public data set in the place of files; --raw takes them")
    parser.add_argument("--raw", metavar="DIR", default="raw", help="folder for downloaded files")
    parser.add_argument("--out", required=True, metavar="DIR", help="the folder to write")
    parser.add_argument("--k_core", type=int, default=5, help="least interactions of users and items; 0 for no filter")
    parser.add_argument("--min_rating", type=float, help="lowest rating that counts as an interaction")
    parser.add_argument("--duplicates", default="first", help="which of a user and an item stay: first, last or keep")
    parser.add_argument("--max_description_characters", type=int, default=1000, help="longer descriptions are cut")
    parser.add_argument("--max_malformed", type=float, default=0.01, help="tolerated share of malformed lines")
    parser.add_argument("--encoding", help="of the files' text, cp1252 for example; by default that of the format")
    parser.add_argument("--name", help="what reports call the data; by default the name of the folder")
    parser.add_argument("--license", metavar="TEXT", help="the terms of the data, in words of your own")
    parser.add_argument("--source", metavar="TEXT", help="where the data come from; a download says it by itself")
    parser.add_argument("--overwrite", action="store_true", help="replace a data folder, but not its item tokenizer")
    for column, default in (("user", "user_id"), ("item", "item_id"), ("time", "timestamp"), ("rating", "rating")):
        parser.add_argument(f"--{column}_column", help=f"of csv, jsonl and parquet; {default} if not given"
                            + (", none where the file is in order of time" if column == "time" else ""))  # fmt: skip
    parser.add_argument("--title_column", help="of the items in csv, jsonl and parquet; title if not given")
    parser.add_argument("--header", nargs="+", metavar="COLUMN", help="columns of a csv whose first line is data")
    parser.add_argument("--items_header", nargs="+", metavar="COLUMN", help="the same for a csv of items")
    return guarded(lambda: _prepare(parse(parser, arguments)))


def _prepare(given: argparse.Namespace) -> None:
    from gflowtrl.data import RAW_FORMATS, download, prepare
    from gflowtrl.data.formats.downloads import source_of
    from gflowtrl.data.formats.output import check_target

    if given.download is not None:
        if given.format or given.interactions or given.items:
            raise ValueError("--download brings its own files and format; leave --format and the files out.")
        check_target(Path(given.out), given.overwrite)  # before hours of downloading
        given.format, given.interactions, given.items = download(given.download, given.raw)
        given.source = source_of(given.download) if given.source is None else given.source
    elif given.format is None or given.interactions is None:
        missing = "--format" if given.format is None else "--interactions"
        raise ValueError(f"{missing} is missing. Formats are {', '.join(RAW_FORMATS)}; or use --download NAME.")
    given.columns, given.k_core = _columns(given), given.k_core or None
    _, report = prepare(**{name: getattr(given, name) for name in signature(prepare).parameters})
    show(given, asdict(report), f"{report.summary()}\n\nWritten to {given.out}.{_next(Path(given.out))}")


def _next(out: Path) -> str:
    """What to do with the folder, where its items have no ids yet."""
    from gflowtrl.data.formats.output import item_tokenizers

    kept = item_tokenizers(out)
    stays = f" The item tokenizer of the earlier data was kept ({', '.join(map(str, kept))})." if kept else ""
    if (out / "semantic_ids.json").is_file():
        return stays
    if not kept:
        return f" Next: gflowtrl tokenize --data_dir {out}"
    folder = kept[0] if kept[0].is_dir() else out
    place = "" if folder == out / "item_tokenizer" else f" --tokenizer {folder}"
    return f"{stays} Next: gflowtrl tokenize --data_dir {out}{place} --add, so that items keep the ids they had"


def _columns(given: argparse.Namespace):
    from gflowtrl.data import Columns

    named = {name: getattr(given, f"{name}_column") for name in ("user", "item", "time", "rating", "title")}
    named |= {"header": given.header, "items_header": given.items_header}
    named = {name: value for name, value in named.items() if value is not None}
    if not named:
        return None
    return Columns(**{name: None if (name, value) == ("time", "none") else value for name, value in named.items()})
