"""`gflowtrl teacher`: fit the teacher of a recipe, and with `--tune` choose temperature and popularity correction."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from gflowtrl.configuration import find_file, recipe_folder

from .common import Parser, guarded, show
from .early import check_early


if TYPE_CHECKING:
    from gflowtrl.pipeline.teacher_tuning import Tuning


def main(arguments: Sequence[str]) -> int:
    """Run the command and return the exit code. Without `--tune` it is the first stage of `gflowtrl train`."""
    if "--tune" not in arguments:
        from .train import main as train

        return train(arguments, "teacher")
    parser = Parser(
        prog="gflowtrl teacher --tune",
        allow_abbrev=False,
        description="Fit the teacher of a recipe (or load it, if a run in the same output_dir has fitted it), and "
        "measure its distribution on the validation split for several temperatures and popularity corrections. The "
        "test split is not read. Other options are fields of the recipe, as in gflowtrl train.",
    )
    parser.add_argument("--tune", action="store_true", help="tune, instead of measuring on the test split")
    parser.add_argument("--config", default="quickstart", help="recipe: a file, or the name of one of the library")
    history = parser.add_mutually_exclusive_group()
    history.add_argument(
        "--exclude_history", action="store_true", default=None,
        help="give items of the history a probability of 0 (default: as gflownet.exclude_history says)",
    )  # fmt: skip
    history.add_argument(
        "--keep_history", dest="exclude_history", action="store_false", default=None,
        help="let items of the history be recommended",
    )  # fmt: skip
    parser.add_argument("--json", action="store_true", help="print JSON instead of text")
    return guarded(lambda: _tune(*parser.parse_known_args(arguments)))


def _tune(given: argparse.Namespace, options: list[str]) -> None:
    words = {word.partition("=")[0] for word in options}
    if taken := words & {"--stages", "--num_processes", "--accelerate_config", "--redo"}:
        raise ValueError(f"gflowtrl teacher --tune does not take {min(taken)}; leave it out.")
    options = [*options, "--stages", "teacher"]
    file = find_file(given.config, recipe_folder())
    check_early(file, options)

    from gflowtrl.pipeline import load_recipe
    from gflowtrl.pipeline.build import BuildContext, check_needs, fit_teacher
    from gflowtrl.pipeline.lock import sole_run
    from gflowtrl.pipeline.run_data import prepare
    from gflowtrl.pipeline.stage import RunContext
    from gflowtrl.pipeline.teacher_tuning import tune_teacher
    from gflowtrl.trainer.gflownet_trainer import excludes_history

    recipe = load_recipe(file, options)
    data = prepare(recipe)
    check_needs(data)
    run = RunContext(recipe.output_dir, quiet=given.json)
    kind = next((spec.get("popularity", "interactions") for spec in filter(_uses_own, recipe.rewards)), "interactions")
    counts = BuildContext(run, data, None, None).counts(kind)
    exclude = given.exclude_history
    if exclude is None:
        setting = recipe.training_arguments("gflownet", recipe.output_dir).exclude_history
        exclude = excludes_history(setting, data.splits.train)
    with sole_run(run.root):
        teacher = fit_teacher(run, data, recipe.teacher)
        found = tune_teacher(data, teacher, counts, exclude)
    rewards = _with_best(recipe.rewards, found)
    about = f"{data.interactions.summary()}; validation split, {found.users:,} users"
    show(given, {**found.as_dict(), "rewards": rewards}, f"{about}\n\n{_text(found, rewards)}")


def _uses_own(spec: Mapping[str, Any]) -> bool:
    """Whether a reward is the softmax of the recipe's own teacher."""
    own = spec.get("type") == "collaborative" and "teacher" not in spec
    return own and spec.get("normalization", "softmax") == "softmax"


def _with_best(rewards: Sequence[Mapping[str, Any]], found: Tuning) -> list[dict[str, Any]]:
    """The rewards of the recipe with the best pair, or a new reward if none uses the recipe's own teacher."""
    pair = {name: getattr(found.best, name) for name in ("temperature", "popularity_correction")}
    if not any(map(_uses_own, rewards)):
        return [*map(dict, rewards), {"type": "collaborative", **pair}]
    return [{**spec, **pair} if _uses_own(spec) else dict(spec) for spec in rewards]


def _text(found: Tuning, rewards: list[dict[str, Any]]) -> str:
    import yaml

    from gflowtrl.pipeline.run_report import aligned

    k, temperatures = found.k, sorted({setting.temperature for setting in found.settings})
    lines = [["correction", f"NDCG@{k}", f"Recall@{k}", f"coverage@{k}", *(f"T={t:g}" for t in temperatures)]]
    for correction in sorted({setting.popularity_correction for setting in found.settings}):
        cells = [setting for setting in found.settings if setting.popularity_correction == correction]
        first = cells[0]
        metrics = [f"{first.ndcg:.4f}", f"{first.recall:.4f}", f"{first.coverage:.3f}"]
        lines.append([f"{correction:g}", *metrics, *(f"{setting.log_likelihood:.3f}" for setting in cells)])
    history = "excluded" if found.exclude_history else "kept"
    notes = [
        f"Items of the history are {history}. The columns T=... are the mean log-likelihood of the targets at that "
        f"temperature.",
        f"The ranking does not depend on it. The standard error of the best NDCG@{k} is "
        f"{max(found.settings, key=lambda setting: setting.ndcg).ndcg_error:.4f}.",
    ]
    if found.unreachable:
        notes.append(
            f"The targets of {found.unreachable:,} users are in their histories; their likelihood is left out."
        )
    section = yaml.safe_dump({"rewards": rewards}, default_flow_style=None, sort_keys=False, width=120)
    choice = (
        f"Best: the largest correction within one standard error of the best NDCG@{k}, then the temperature with the\n"
        f"highest likelihood. For the recipe:\n\n{section}"
    )
    return "\n\n".join([aligned(lines), "\n".join(notes), choice]).rstrip()
