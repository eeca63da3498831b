"""The `gflowtrl` command: one word for each thing that the library does."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from importlib import import_module

import gflowtrl
from gflowtrl.compat import quiet_libraries


#: Name to what `--help` says. A command's module, imported when it is asked for, has a `main`.
COMMANDS = {
    "prepare": "a data folder from a raw dump (Amazon, MovieLens, RecBole, CSV, ...)",
    "tokenize": "semantic ids for the items of a data folder",
    "teacher": "fit a recipe's collaborative teacher and measure it",
    "sft": "supervised fine-tuning of a recipe's model",
    "train": "a whole recipe: teacher, SFT, its control, GFlowNet, test; on one process or many",
    "evaluate": "measure a saved recommender on the validation or test split",
    "recommend": "recommendations for a file of histories",
    "serve": "recommendations over HTTP",
    "compare": "one table and pictures of several runs",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command line.

    Returns:
        The exit code: 0; 2 for bad input, of which one line on stderr tells; 130 after Ctrl-C.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    quiet_libraries()
    try:
        code = _run(words)
        sys.stdout.flush()
        return code
    except BrokenPipeError:  # nobody reads what is printed any more (`gflowtrl ... | head`)
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
        print(f"error: {words[0]!r} is no command of gflowtrl; it has {', '.join(COMMANDS)}.", file=sys.stderr)
        return 2
    if words[0] in ("teacher", "sft"):  # parts of what `train` does
        return import_module(".train", __name__).main(words[1:], words[0])
    return import_module(f".{words[0]}", __name__).main(words[1:])


def usage() -> str:
    lines = ["usage: gflowtrl COMMAND [options]", "", "Generative recommenders, fine-tuned with GFlowNets.", ""]
    lines += [f"  {name:<12}{text}" for name, text in COMMANDS.items()]
    return "\n".join([*lines, "", "gflowtrl COMMAND --help says what a command takes."])
