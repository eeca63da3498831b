"""`gflowtrl recommend`: for the histories of a file, one JSON line each, or for all users of a data folder."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from itertools import chain, islice
from pathlib import Path
from typing import IO, Any

from .common import (
    add_model_options,
    guarded,
    is_ensemble,
    is_unicode,
    load_models,
    make_parser,
    models_of,
    parse,
    show,
)


CHUNK_SIZE = 1024  # histories in memory at a time


def main(arguments: Sequence[str]) -> int:
    """Run the command and return the exit code."""
    parser = make_parser(
        "recommend",
        'Recommend items for each line of a file: {"history": [5, 9]}, whose other fields are kept, or [5, 9]. Or, '
        "with --data_dir, for all users of a data folder, which goes on where it was stopped.",
    )
    add_model_options(parser)
    parser.add_argument("--input", default="-", help="file with one history per line; - is standard input")
    parser.add_argument(
        "--data_dir", metavar="DIR", help="recommend for all users of this folder instead (docs/data.md)"
    )
    parser.add_argument(
        "--output",
        default="-",
        help="file for the answers; - is standard output; with --data_dir .parquet, .csv or .jsonl",
    )
    parser.add_argument("-k", "--k", type=int, default=10, help="length of the lists")
    parser.add_argument("--strategy", default="beam", help="beam, or sample: in proportion to probability")
    parser.add_argument("--temperature", type=float, default=1.0, help="temperature of sample")
    parser.add_argument("--seed", type=int, default=0, help="seed of sample")
    parser.add_argument("--num_beams", type=int, help="beam width; by default it depends on k")
    parser.add_argument("--batch_size", type=int, default=256, help="histories decoded together")
    parser.add_argument("--exclude_seen", action="store_true", help="leave out items of the history")
    parser.add_argument("--allowed_items", metavar="FILE", help="JSON list of items; recommend only these")
    parser.add_argument("--where", metavar="SQL", help="with --data_dir: recommend only items with these features")
    parser.add_argument(
        "--exclude", metavar="FILE", help='with --data_dir: {"user": 3, "items": [5]}, not for this user'
    )
    parser.add_argument("--processes", type=int, default=1, help="with --data_dir: processes that share the users")
    return guarded(lambda: _recommend(parse(parser, arguments)))


def _recommend(options: argparse.Namespace) -> None:
    from gflowtrl.files import text_lines, write_atomically

    if is_ensemble(options) and (options.strategy != "beam" or options.temperature != 1.0):
        raise ValueError(
            "An average of models or views cannot be sampled. Leave out --strategy and --temperature, or give one "
            "--model without --views and --weights."
        )
    if options.allowed_items is not None:
        options.allowed_items = _read_allowed(options.allowed_items)
    if options.data_dir is not None:
        return _recommend_users(options)
    if options.where is not None or options.exclude is not None or options.processes != 1:
        raise ValueError("--where, --exclude and --processes are used with --data_dir only.")
    lines = text_lines(options.input)
    lines = chain(list(islice(lines, 1)), lines)  # a file that cannot be read is an error before the model is loaded
    if options.output == "-":
        return _answer(options, lines, sys.stdout)

    def write(partial: Path) -> None:
        with partial.open("w", encoding="utf-8") as out:
            _answer(options, lines, out)

    write_atomically(options.output, write)


def _recommend_users(options: argparse.Namespace) -> None:
    from gflowtrl.pipeline.all_users import recommend_users

    if options.input != "-":
        raise ValueError("--input and --data_dir are two ways to give histories. Leave one out.")
    if options.output == "-":
        raise ValueError("--output is missing; give a file that ends with .parquet, .csv or .jsonl.")
    arguments = {name: getattr(options, name) for name in ("where", "exclude", "processes", *_names(options))}
    if options.strategy == "sample":
        arguments["seed"] = options.seed
    report = recommend_users(models_of(options), options.data_dir, options.output, **arguments)
    allowed = "" if report.allowed_items is None else f" {report.allowed_items:,} items could be recommended."
    show(options, asdict(report), f"{report}{allowed} Written to {options.output}.")


def _names(options: argparse.Namespace) -> list[str]:
    """Names of the options that are arguments of `recommend`, without the seed."""
    names = ["k", "num_beams", "batch_size", "exclude_seen", "allowed_items"]
    return names if is_ensemble(options) else [*names, "strategy", "temperature"]


def _answer(options: argparse.Namespace, lines: Iterable[str], out: IO[str]) -> None:
    from tqdm.auto import tqdm

    from gflowtrl.pipeline.all_users import part_seed

    arguments = {name: getattr(options, name) for name in _names(options)}
    recommender, ascii_only = load_models(options), not is_unicode(out)
    numbered = ((f"{options.input}, line {number}", line) for number, line in enumerate(lines, 1) if line.strip())
    rows = ((name, _parse_row(line, name)) for name, line in numbered)
    with tqdm(disable=not sys.stderr.isatty(), unit=" histories", file=sys.stderr) as progress:
        for number, chunk in enumerate(iter(lambda: list(islice(rows, CHUNK_SIZE)), [])):
            line_names, contents = zip(*chunk, strict=True)
            histories = [content["history"] for content in contents]
            if not is_ensemble(options):
                arguments["seed"] = part_seed(options.seed, number)
            lists = recommender.recommend(histories, names=line_names, **arguments)
            for content, recommendations in zip(contents, lists, strict=True):
                answer = {**content, "recommendations": [_as_dict(item) for item in recommendations]}
                out.write(json.dumps(answer, ensure_ascii=ascii_only) + "\n")
            progress.update(len(chunk))


def _as_dict(recommendation: Any) -> dict[str, Any]:
    entry = {"item": recommendation.item, "probability": recommendation.probability}
    return entry if recommendation.title is None else {**entry, "title": recommendation.title}


def _parse_row(line: str, name: str) -> dict[str, Any]:
    from gflowtrl.data.json_text import json_value

    try:
        row = json_value(line)
    except ValueError as error:
        raise ValueError(f"{name}: {error}.") from None
    row = row if isinstance(row, dict) else {"history": row}
    if not _are_items(row.get("history")):
        raise ValueError(f"{name}: the history must be a list of items (numbers or strings), as in [5, 9].")
    return row


def _read_allowed(file: str) -> list:
    from gflowtrl.data.json_text import json_value
    from gflowtrl.files import read_text

    text = read_text(file, "a JSON list of items")
    try:
        items = json_value(text)
    except ValueError as error:
        raise ValueError(f"{file} must hold a JSON list of items in UTF-8, but it holds {error}.") from None
    if not _are_items(items):
        raise ValueError(f"{file} must hold a JSON list of items (numbers or strings).")
    return items


def _are_items(content: Any) -> bool:
    return isinstance(content, list) and all(type(item) in (int, str) for item in content)
