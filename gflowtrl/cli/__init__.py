"""The command line interface `gflowtrl`: one subcommand per task of the library."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from importlib import import_module
from io import TextIOWrapper
from typing import TextIO

import gflowtrl
from gflowtrl.checks import short_repr
from gflowtrl.compat import quiet_libraries


#: Name of each command -> its description in `--help`. Its module has a `main` and is imported on use.
COMMANDS = {
    "prepare": "make a data folder from a raw dump (Amazon, MovieLens, RecBole, CSV, ...)",
    "tokenize": "make semantic ids for the items of a data folder",
    "teacher": "fit and evaluate the collaborative teacher of a recipe, or tune its distribution",
    "sft": "fine-tune the model of a recipe by supervised learning (SFT)",
    "train": "run a whole recipe: teacher, SFT, its control, GFlowNet, test; on one process or several",
    "evaluate": "evaluate a saved recommender on the validation or test split",
    "recommend": "make recommendations for a file of histories",
    "catalog": "add items to a saved recommender, or retire some",
    "serve": "serve recommendations over HTTP",
    "export": "write a recommender for another engine: flat arrays, ONNX Runtime, vLLM",
    "demo": "try a recommender in the browser, or write a Hugging Face Space with it",
    "compare": "compare several runs in one table and a plot",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command line.

    Returns:
        The exit code: 0; 2 for invalid input, with one line on stderr that explains it; 130 after Ctrl-C.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    quiet_libraries()
    print_any_character(sys.stdout, sys.stderr)
    try:
        code = _run(words)
        sys.stdout.flush()
        return code
    except BrokenPipeError:  # the reader of a pipe has exited (`gflowtrl ... | head`)
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


def _run(words: list[str]) -> int:
    if not words or words[0] in ("-h", "--help"):
        print(usage())
        return 0
    if words[0] == "--version":
        print(gflowtrl.__version__)
        return 0
    if words[0] not in COMMANDS:
        word = short_repr(words[0])
        print(f"error: {word} is not a command of gflowtrl; choose {', '.join(COMMANDS)}.", file=sys.stderr)
        return 2
    if words[0] == "sft":  # a stage of `train`
        return import_module(".train", __name__).main(words[1:], words[0])
    return import_module(f".{words[0]}", __name__).main(words[1:])


def print_any_character(*streams: TextIO) -> None:
    """Let streams print `?` for a character that their encoding lacks, as a console with cp1252 needs it."""
    for stream in streams:
        if isinstance(stream, TextIOWrapper) and stream.errors == "strict":
            stream.reconfigure(errors="replace")


def usage() -> str:
    """Return the text of `gflowtrl --help`."""
    lines = ["usage: gflowtrl COMMAND [options]", "", "Fine-tune generative recommenders with GFlowNets.", ""]
    lines += [f"  {name:<12}{text}" for name, text in COMMANDS.items()]
    return "\n".join([*lines, "", "gflowtrl COMMAND --help lists the options of a command."])
