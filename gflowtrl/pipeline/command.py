"""The command line of the pipeline."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path

from .materials import prepare
from .recipe import Recipe, describe, load_recipe
from .signals import check_signals


USAGE = """\
usage: {program} [--config RECIPE] [--data_dir DIR] [--section.field VALUE ...]

Trains a generative recommender, fine-tunes it with a GFlowNet and compares both with SFT continued and the teacher.
Without a recipe: {default}, on the SYNTHETIC shop. A run that was interrupted goes on when it is started again.

Every field of the recipe is an option. Values are YAML: --gflownet.loss_type vargrad sft, --rewards.0.weight 0.5,
--sampler '{{ground_truth: 1, on_policy: 3}}'.

{fields}
"""
OTHER_DATA = (
    "This was a SYNTHETIC shop. For data of your own, a dump of Amazon or MovieLens or a table (docs/command.md):\n"
    "  gflowtrl prepare --format FORMAT --interactions FILE --items FILE --out DIR\n"
    "  gflowtrl tokenize --data_dir DIR\n"
    "  gflowtrl train --config gflowgr_office_llama --data_dir DIR"
)


def main(
    arguments: Sequence[str] | None = None,
    default_recipe: str | Path = "recipes/quickstart.yaml",
    program: str | None = None,
) -> int:
    """Runs a recipe from the command line.

    Args:
        arguments: `--config RECIPE` and the recipe's fields; those of this process if not given.
        default_recipe: the recipe where there is no `--config`.
        program: what the user calls this by; the script's name if not given.

    Returns:
        The exit code: 0, 2 for bad input (one line says what), 130 after Ctrl-C (one line says how to go on).
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    program = program or Path(sys.argv[0]).name
    if {"-h", "--help"} & set(arguments):
        print(USAGE.format(program=program, default=default_recipe, fields=describe()))
        return 0
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    recipe = None
    try:
        try:
            config, rest = _take_config(arguments, default_recipe)
            recipe = load_recipe(config, rest)
            materials = prepare(recipe)
            check_signals(materials)
        except (ValueError, TypeError, OSError) as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
        from accelerate import PartialState
        from transformers.utils import logging

        from .job import run
        from .memory import keep_freed_memory

        keep_freed_memory()
        logging.disable_progress_bar()  # of loading and writing weights; the trainers' bars stay
        run(recipe, materials)
        # The run ended with a barrier, so no thread of the backend still holds a tensor of ours: one that did would
        # abort the interpreter's exit ("terminate called without an active exception").
        PartialState().destroy_process_group()
    except KeyboardInterrupt:
        _say_how_to_continue(recipe)
        return 130
    if recipe.data_dir is None and _is_main():
        print("\n" + OTHER_DATA)
    return 0


def _take_config(arguments: list[str], default: str | Path) -> tuple[str | Path, list[str]]:
    for place, word in enumerate(arguments):
        if word.startswith("--config="):
            return word.partition("=")[2], arguments[:place] + arguments[place + 1 :]
        if word == "--config":
            if place + 1 == len(arguments):
                raise ValueError("--config needs the path of a recipe.")
            return arguments[place + 1], arguments[:place] + arguments[place + 2 :]
    return default, arguments


def _say_how_to_continue(recipe: Recipe | None) -> None:
    if _is_main():
        kept = f" Finished stages and checkpoints are in {recipe.output_dir};" if recipe else ""
        print(f"\nInterrupted.{kept} start the same command again to continue.", file=sys.stderr)


def _is_main() -> bool:
    return os.environ.get("RANK", "0") == "0"
