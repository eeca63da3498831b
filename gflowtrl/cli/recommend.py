"""`gflowtrl recommend`: JSON lines of histories in, JSON lines of recommendations out."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from itertools import islice
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
    parser.add_argument("--model", required=True, help="folder of a recommender, or its name on the Hub")
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
    from gflowtrl.files import write_atomically

    allowed = _allowed(given.allowed_items)
    with open(os.dup(0) if given.input == "-" else given.input, encoding="utf-8-sig") as lines:
        if given.output == "-":
            return _answer(given, allowed, lines, sys.stdout)

        def fill(partial: Path) -> None:
            with partial.open("w", encoding="utf-8") as out:
                _answer(given, allowed, lines, out)

        write_atomically(given.output, fill)


def _answer(given: argparse.Namespace, allowed: list | None, lines: IO[str], out: IO[str]) -> None:
    from tqdm.auto import tqdm

    from gflowtrl.recommender import Recommender

    names = ("k", "strategy", "temperature", "num_beams", "batch_size", "exclude_seen")
    options = {name: getattr(given, name) for name in names} | {"allowed_items": allowed}
    recommender = Recommender.from_pretrained(given.model)
    numbered = ((f"{given.input}, line {n}", line) for n, line in enumerate(lines, 1) if line.strip())
    rows = ((place, _row(line, place)) for place, line in numbered)
    with tqdm(disable=not sys.stderr.isatty(), unit=" histories", file=sys.stderr) as progress:
        # A row draws by its place in the file: the seed of a chunk is a function of its number.
        for number, chunk in enumerate(iter(lambda: list(islice(rows, CHUNK)), [])):
            seed = _seed(given.seed, number)
            places, contents = zip(*chunk, strict=True)
            histories = [content["history"] for content in contents]
            answers = recommender.recommend(histories, seed=seed, names=places, **options)
            for row, found in zip(contents, answers, strict=True):
                answer = {**row, "recommendations": [_shown(one) for one in found]}
                out.write(json.dumps(answer, ensure_ascii=False) + "\n")
            progress.update(len(chunk))


def _seed(seed: int, chunk: int) -> int:
    """For the first chunk the given seed, as in Python; for the others one of their own for each seed."""
    if chunk == 0:
        return seed
    import numpy as np

    return int(np.random.SeedSequence([seed % 2**64, chunk]).generate_state(1, np.uint64)[0])


def _shown(one: Any) -> dict[str, Any]:
    shown = {"item": one.item, "probability": one.probability}
    return shown if one.title is None else {**shown, "title": one.title}


def _row(line: str, where: str) -> dict[str, Any]:
    from gflowtrl.data.readers import json_value

    try:
        row = json_value(line)
    except ValueError as error:
        raise ValueError(f"{where}: {error}.") from None
    row = row if isinstance(row, dict) else {"history": row}
    if not _are_items(row.get("history")):
        raise ValueError(f'{where}: give a list of items, numbers or strings, or {{"history": [...]}}.')
    return row


def _allowed(file: str | None) -> list | None:
    if file is None:
        return None
    from gflowtrl.data.readers import json_value

    text = Path(file).read_bytes()
    try:
        content = json_value(text.decode("utf-8-sig"))
    except ValueError as error:
        raise ValueError(f"{file} must hold a JSON list of items in UTF-8, but it holds {error}.") from None
    if not _are_items(content):
        raise ValueError(f"{file} must hold a JSON list of items, numbers or strings.")
    return content


def _are_items(content: Any) -> bool:
    return isinstance(content, list) and all(type(item) in (int, str) for item in content)
