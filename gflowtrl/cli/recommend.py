"""`gflowtrl recommend`: JSON lines of histories in, JSON lines of recommendations out."""

from __future__ import annotations

import argparse
import json
import os
import sys
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any

from .common import guarded, make_parser, parse


CHUNK = 1024  # histories in memory at a time


def main(arguments: Sequence[str]) -> int:
    """Runs the command; returns the exit code."""
    parser = make_parser(
        "recommend",
        'Recommends for each line of a file: {"history": [5, 9]} with any further fields, which are kept, or [5, 9].',
    )
    parser.add_argument("--model", help="folder of the recommender, or its Hub name")
    parser.add_argument("--input", default="-", help="file of histories, a line each; - is standard input")
    parser.add_argument("--output", default="-", help="file of answers, a line each; - is standard output")
    parser.add_argument("-k", "--k", type=int, default=10, help="length of the lists")
    parser.add_argument("--strategy", default="beam", help="beam, or sample: in proportion to probability")
    parser.add_argument("--temperature", type=float, default=1.0, help="of sample")
    parser.add_argument("--seed", type=int, default=0, help="of sample")
    parser.add_argument("--num_beams", type=int, help="width of the beam search; by default what k needs")
    parser.add_argument("--batch_size", type=int, default=256, help="histories decoded together")
    parser.add_argument("--exclude_seen", action="store_true", help="leave out items of the history")
    parser.add_argument("--allowed_items", metavar="FILE", help="JSON list of the only items to recommend")
    return guarded(lambda: _recommend(parse(parser, arguments)))


def _recommend(given: argparse.Namespace) -> None:
    if given.model is None:
        raise ValueError("--model is missing.")
    from tqdm.auto import tqdm

    from gflowtrl.recommender import Recommender

    options = {name: getattr(given, name) for name in ("k", "strategy", "temperature", "num_beams", "batch_size")}
    options |= {"exclude_seen": given.exclude_seen, "allowed_items": _allowed(given.allowed_items)}
    with _reading(given.input) as lines, _Writing(given.output) as out:
        recommender = Recommender.from_pretrained(given.model)
        progress = tqdm(disable=not sys.stderr.isatty(), unit=" histories", file=sys.stderr)
        # A row draws by its place in the file: the seed of a chunk is a function of its number.
        for number, (rows, places) in enumerate(_chunks(lines, given.input)):
            histories = _known(recommender, rows, places)
            answers = recommender.recommend(histories, seed=_seed(given.seed, number), **options)
            for row, found in zip(rows, answers, strict=True):
                out.write(json.dumps({**row, "recommendations": [_shown(one) for one in found]}, ensure_ascii=False))
                out.write("\n")
            progress.update(len(rows))
        progress.close()


def _seed(seed: int, chunk: int) -> int:
    """For the first chunk the given seed, as in Python; for the others one of their own for each seed."""
    if chunk == 0:
        return seed
    import numpy as np

    return int(np.random.SeedSequence([seed % 2**64, chunk]).generate_state(1, np.uint64)[0])


def _known(recommender: Any, rows: list[dict[str, Any]], places: list[str]) -> list[list]:
    """The items of the histories that the recommender knows; what it cannot use is told by its line in the file."""
    known, unknown = recommender.catalog.known_items(row["history"] for row in rows)
    if unknown:
        row, item = unknown[0]
        warnings.warn(
            f"{len(unknown)} items of the histories are not in the catalogue and were left out; the first is {item!r} "
            f"({places[row]}).",
            stacklevel=2,
        )
    if recommender.item_counts is None and [] in known:
        raise ValueError(
            f"{places[known.index([])]}: the history is empty or holds no known item, and the recommender holds no "
            "counts of training interactions to recommend by. Leave the line out."
        )
    return known


def _shown(one: Any) -> dict[str, Any]:
    shown = {"item": one.item, "probability": one.probability}
    return shown if one.title is None else {**shown, "title": one.title}


def _chunks(lines: IO[str], name: str) -> Iterator[tuple[list[dict[str, Any]], list[str]]]:
    """Rows, and where each stands."""
    rows: list[dict[str, Any]] = []
    places: list[str] = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        places.append(f"{name}, line {number}")
        rows.append(_row(line, places[-1]))
        if len(rows) == CHUNK:
            yield rows, places
            rows, places = [], []
    if rows:
        yield rows, places


def _row(line: str, where: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where}: no JSON ({error.msg}, column {error.colno}).") from None
    row = {"history": row} if isinstance(row, list) else row
    history = row.get("history") if isinstance(row, dict) else None
    if not isinstance(history, list) or any(type(item) not in (int, str) for item in history):
        raise ValueError(
            f'{where}: a list of items or {{"history": [...]}} is needed, items being numbers or strings.'
        )
    return row


def _allowed(file: str | None) -> list | None:
    if file is None:
        return None
    text = Path(file).read_bytes()
    try:
        content = json.loads(text.decode("utf-8-sig"))
    except ValueError as error:
        raise ValueError(f"{file} must hold a JSON list of items in UTF-8, but it is no JSON ({error}).") from None
    if not isinstance(content, list) or any(type(item) not in (int, str) for item in content):
        raise ValueError(f"{file} must hold a JSON list of items, numbers or strings.")
    return content


def _reading(name: str) -> IO[str]:
    return open(os.dup(0) if name == "-" else name, encoding="utf-8-sig")


class _Writing:
    """Standard output, or a file that takes its name only when all is written."""

    def __init__(self, name: str):
        self.path = None if name == "-" else Path(name)

    def __enter__(self) -> IO[str]:
        if self.path is None:
            return sys.stdout
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.scratch = self.path.with_name(f".{self.path.name}.{os.getpid()}")
        self.file = self.scratch.open("w", encoding="utf-8")
        return self.file

    def __exit__(self, kind: type | None, *_: Any) -> None:
        if self.path is None:
            return
        self.file.close()
        if kind is None:
            os.replace(self.scratch, self.path)
        else:
            self.scratch.unlink()
