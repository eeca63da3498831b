"""`gflowtrl train`: run a recipe, through accelerate's launcher if more than one process is asked for."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, get_args, get_type_hints

from gflowtrl.configuration import check_names, find_file, known_files, read_yaml, recipe_folder

from .common import Parser, guarded
from .early import check_early


if TYPE_CHECKING:
    from gflowtrl.pipeline import Recipe


USAGE = """\
usage: gflowtrl {command} [--config RECIPE] [--data_dir DIR] [--section.field VALUE ...]
                      [--num_processes N] [--accelerate_config NAME_OR_FILE] [--redo STAGE ...]

{what}
RECIPE is a file, or the name of a recipe of the library: {recipes}.
An accelerate configuration is a file, or one of {engines} (docs/distributed.md).
Without a recipe: quickstart, on the SYNTHETIC shop. Start an interrupted run again to continue it. --redo repeats
finished stages; their names are in brackets in the output.

Every field of the recipe is an option. Values are YAML: --gflownet.loss_type vargrad sft, --rewards.0.weight 0.5,
--sampler '{{ground_truth: 1, on_policy: 3}}'.

{fields}
"""
WHAT = {
    "train": "Train a generative recommender, fine-tune it with a GFlowNet, and compare it with continued SFT.",
    "sft": "Train a generative recommender by supervised fine-tuning: the first half of `gflowtrl train`.",
    "teacher": "Fit the collaborative teacher of a recipe, and measure its recommendations. With --tune: choose the\n"
    "temperature and popularity correction of its distribution (gflowtrl teacher --tune --help).",
}
OTHER_DATA = """
These are results on a SYNTHETIC shop. For your own data, a table or a dump of Amazon or MovieLens (docs/command.md):
  gflowtrl prepare --format FORMAT --interactions FILE --items FILE --out DIR
  gflowtrl tokenize --data_dir DIR
  gflowtrl train --config gflowgr_office_llama --data_dir DIR"""

ENGINES = "accelerate_configs"  # subfolder of the recipes
#: Everything that accelerate asks for if it has no configuration.
PLAIN = ["--multi_gpu", "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]


def main(arguments: Sequence[str], command: str = "train") -> int:
    """Run the stages of a recipe.

    Args:
        arguments: `--config RECIPE`, options that start processes, and fields of the recipe.
        command: which stages to run: `train` (all), `sft` or `teacher`.

    Returns:
        The exit code: 0, 2 for bad input (with a one-line error), 130 after Ctrl-C (with a line on how to continue).
    """
    if {"-h", "--help"} & set(arguments):
        print(help_text(command))
        return 0
    return guarded(lambda: _train(arguments, command))


def _train(arguments: Sequence[str], command: str) -> int:
    parser = Parser(prog=f"gflowtrl {command}", add_help=False, allow_abbrev=False)
    parser.add_argument("--config", default="quickstart")
    parser.add_argument("--num_processes", type=int)
    parser.add_argument("--accelerate_config")
    parser.add_argument("--redo", nargs="+", default=[])
    given, options = parser.parse_known_args(arguments)
    if command != "train":
        if any(word.partition("=")[0] == "--stages" for word in options):
            raise ValueError(f"gflowtrl {command} sets the stages itself; leave --stages out, or use gflowtrl train.")
        options += ["--stages", command]
    if given.num_processes is not None and given.num_processes < 1:
        raise ValueError(f"--num_processes is {given.num_processes}; give a whole number of at least 1.")
    engine = given.accelerate_config
    if engine is not None:
        engine = find_file(engine, recipe_folder() / ENGINES, "accelerate configuration")
    file = find_file(given.config, recipe_folder())
    check_early(file, options)

    from gflowtrl.compat import launch_command, launch_command_parser
    from gflowtrl.pipeline import load_recipe
    from gflowtrl.pipeline.lock import sole_run
    from gflowtrl.pipeline.run import stage_names
    from gflowtrl.trainer.processes import join_on_cpu

    join_on_cpu()
    recipe = load_recipe(file, options)  # a mistake is reported here, once, and not by every process
    check_names(given.redo, stage_names(recipe), what="stage")
    if given.num_processes in (None, 1) and engine is None:
        return _run(recipe, given.redo)
    launcher = PLAIN if engine is None else _engine_options(engine)
    if given.num_processes is not None:
        launcher = [*launcher, "--num_processes", str(given.num_processes)]
    if Path(recipe.output_dir).is_dir():
        with sole_run(recipe.output_dir):
            pass  # another run in this folder is reported here, once; the first process then takes the lock
    words = [*launcher, "--module", "gflowtrl", "train", "--config", str(file), *options]
    words += ["--redo", *given.redo] if given.redo else []
    launch_command(launch_command_parser().parse_args(words))  # as TRL's own command does it
    return 0


def _engine_options(engine: Path) -> list[str]:
    """Options of accelerate's launcher for one of its configuration files."""
    import torch

    from gflowtrl.trainer.processes import NO_FSDP

    if read_yaml(engine).get("distributed_type") == "FSDP" and not torch.accelerator.is_available():
        raise ValueError(NO_FSDP)
    return ["--config_file", str(engine)]


def _run(recipe: Recipe, redo: Sequence[str]) -> int:
    """Run the recipe in this process, which is one of several if a launcher started it."""
    from accelerate import PartialState

    from gflowtrl.pipeline import run
    from gflowtrl.pipeline.memory import keep_freed_memory

    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    is_main = os.environ.get("RANK", "0") == "0"
    keep_freed_memory()
    try:
        run(recipe, redo=redo)
        # The run ended with a barrier, so no thread of the backend still holds one of our tensors. If one did, the
        # interpreter would abort on exit ("terminate called without an active exception").
        PartialState().destroy_process_group()
    except KeyboardInterrupt:
        if is_main:
            print(
                f"\nInterrupted. Finished stages and checkpoints are in {recipe.output_dir}; run the same "
                f"command again to continue.",
                file=sys.stderr,
            )
        return 130
    if recipe.data_dir is None and is_main:
        print(OTHER_DATA)
    return 0


def help_text(command: str) -> str:
    """What `--help` prints: the fields of a recipe with their help texts."""
    from gflowtrl.pipeline import Recipe

    engines = ", ".join(known_files(recipe_folder() / ENGINES))
    recipes, lines = ", ".join(known_files(recipe_folder())), "\n".join(_field_lines(Recipe))
    return USAGE.format(command=command, what=WHAT[command], fields=lines, recipes=recipes, engines=engines)


def _field_lines(section: type, above: str = "") -> list[str]:
    """One line for each field of a section with a help text, followed by the lines of the sections inside it."""
    lines, hints = [], get_type_hints(section)
    for entry in fields(section):
        name = f"{above}{entry.name}"
        if "help" in entry.metadata:
            lines.append(f"  --{name:<18} {entry.metadata['help']}")
        inside = next(filter(is_dataclass, (hints[entry.name], *get_args(hints[entry.name]))), None)
        lines += _field_lines(inside, f"{name}.") if inside else []
    return lines
