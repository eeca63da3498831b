"""`gflowtrl train`: a recipe, under accelerate's launcher where more than one process is asked for."""

from __future__ import annotations

import os
from collections.abc import Sequence

from .common import guarded


USAGE = """\
usage: gflowtrl {command} [--config RECIPE] [--data_dir DIR] [--section.field VALUE ...]
                      [--num_processes N] [--accelerate_config NAME_OR_FILE]

{what}
RECIPE is a file or the name of one that comes with the library: {recipes}.
An accelerate configuration is a file or one of {engines} (docs/distributed.md).
A run that was interrupted goes on when it is started again.

Every field of the recipe is an option. Values are YAML: --gflownet.loss_type vargrad sft, --rewards.0.weight 0.5.

{fields}
"""
WHAT = {
    "train": "Trains a generative recommender, fine-tunes it with a GFlowNet and compares both with SFT continued.",
    "sft": "Trains a generative recommender by supervised fine-tuning: the first half of `gflowtrl train`.",
    "teacher": "Fits the collaborative teacher of a recipe and measures its recommendations.",
}

#: All that accelerate asks for where there is no configuration of its own.
PLAIN = ["--multi_gpu", "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]


def main(arguments: Sequence[str], command: str = "train") -> int:
    """Runs the stages of a recipe; `command` says which: all of them, `sft` or `teacher`."""
    words = list(arguments)
    if {"-h", "--help"} & set(words):
        print(help_text(command))
        return 0
    return guarded(lambda: _train(words, command))


def _train(words: list[str], command: str) -> int:
    from gflowtrl.pipeline import load_recipe
    from gflowtrl.pipeline import main as run_recipe
    from gflowtrl.pipeline.configuration import find_accelerate_config, find_recipe

    if command != "train":
        if any(word.partition("=")[0] == "--stages" for word in words):
            raise ValueError(
                f"gflowtrl {command} decides the stages itself; leave --stages out, or use gflowtrl train."
            )
        words += ["--stages", command]
    processes, words = _take(words, "--num_processes")
    engine, words = _take(words, "--accelerate_config")
    config, words = _take(words, "--config")
    recipe = find_recipe(config or "quickstart")
    fields, words = words, ["--config", str(recipe), *words]
    if processes in (None, "1") and engine is None:
        return run_recipe(words, program=f"gflowtrl {command}")
    launcher = PLAIN if engine is None else ["--config_file", str(find_accelerate_config(engine))]
    if processes is not None:
        if not processes.isdecimal() or int(processes) < 1:
            raise ValueError(f"--num_processes is {processes!r}; give a whole number of at least 1.")
        launcher = [*launcher, "--num_processes", processes]
    load_recipe(recipe, fields)  # a mistake is told here, once, and not by every process
    return _launch(launcher, words)


def _launch(launcher: list[str], words: list[str]) -> int:
    """`accelerate launch`, as TRL's own command does it."""
    import torch

    from gflowtrl.compat import launch_command, launch_command_parser

    if not torch.accelerator.is_available():
        os.environ["ACCELERATE_USE_CPU"] = "true"  # --cpu would start one process, whatever --num_processes says
    given = launch_command_parser().parse_args([*launcher, "--module", "gflowtrl", "train", *words])
    try:
        launch_command(given)
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else 1
    return 0


def _take(words: list[str], option: str) -> tuple[str | None, list[str]]:
    """The value of an option, and the words without it."""
    for place, word in enumerate(words):
        name, equals, value = word.partition("=")
        if name != option:
            continue
        if equals:
            return value, words[:place] + words[place + 1 :]
        if place + 1 == len(words) or words[place + 1].startswith("--"):
            raise ValueError(f"{option} needs a value.")
        return words[place + 1], words[:place] + words[place + 2 :]
    return None, words


def help_text(command: str) -> str:
    from gflowtrl.pipeline.configuration import accelerate_folder, recipe_folder
    from gflowtrl.pipeline.recipe import describe

    def names(folder) -> str:
        return ", ".join(sorted(file.stem for file in folder.glob("*.yaml")))

    return USAGE.format(
        command=command, what=WHAT[command], fields=describe(), recipes=names(recipe_folder()),
        engines=names(accelerate_folder()),
    )  # fmt: skip
