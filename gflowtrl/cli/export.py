"""`gflowtrl export`: write a recommender in the format of another engine."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from gflowtrl.export import TARGETS, export

from .common import guarded, make_parser, parse, show


def main(arguments: Sequence[str]) -> int:
    """Run the command and return the exit code."""
    targets = "; ".join(f"{name}: {target.description}" for name, target in TARGETS.items())
    parser = make_parser("export", f"Write a recommender for another engine (docs/export.md). {targets}.")
    parser.add_argument("--model", required=True, help="folder of a recommender, or its name on the Hub")
    parser.add_argument("--to", required=True, choices=list(TARGETS), help="the engine")
    parser.add_argument("--output", required=True, help="new folder for the files")
    return guarded(lambda: _export(parse(parser, arguments)))


def _export(options: argparse.Namespace) -> None:
    folder = export(options.model, options.to, options.output)
    files = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
    text = f"{len(files)} files for {options.to} written to {folder}."
    show(options, {"target": options.to, "folder": str(folder), "files": files}, text)
