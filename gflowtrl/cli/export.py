"""`gflowtrl export`: write a recommender in the format of another engine, or as a Hugging Face Space."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from gflowtrl.export import TARGETS, export

from .common import guarded, make_parser, parse, show


SPACE = "space"


def main(arguments: Sequence[str]) -> int:
    """Run the command and return the exit code."""
    targets = "; ".join(f"{name}: {target.description}" for name, target in TARGETS.items())
    targets += f"; {SPACE}: the folder of a Hugging Face Space with the page of gflowtrl demo (docs/demo.md)"
    parser = make_parser("export", f"Write a recommender for another engine (docs/export.md). {targets}.")
    parser.add_argument("--model", required=True, help="folder of a recommender, or its name on the Hub")
    parser.add_argument("--to", required=True, choices=[*TARGETS, SPACE], help="the engine")
    parser.add_argument("--output", required=True, help="new folder for the files")
    parser.add_argument("--title", help="title of a Space; by default the name of the model")
    parser.add_argument(
        "--requirement", help="how pip installs this library in a Space, as in 'gflowtrl[demo] @ git+https://...'"
    )
    return guarded(lambda: _export(parse(parser, arguments)))


def _export(options: argparse.Namespace) -> None:
    if options.to == SPACE:
        from gflowtrl.demo import write_space

        folder = write_space(options.model, options.output, options.title, options.requirement)
    elif options.title is not None or options.requirement is not None:
        raise ValueError(f"--title and --requirement are used with --to {SPACE} only.")
    else:
        folder = export(options.model, options.to, options.output)
    files = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
    text = f"{len(files)} files for {options.to} written to {folder}."
    if options.to == SPACE:
        text += f"\nTo try it: python {folder / 'app.py'}"
        text += f"\nTo publish it: hf upload USER/NAME {folder} --repo-type space"
    show(options, {"target": options.to, "folder": str(folder), "files": files}, text)
