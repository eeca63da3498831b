"""The run of a recipe: its stages in order."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from gflowtrl.configuration import check_names
from gflowtrl.teachers import fingerprint

from . import run_report
from .build import check_needs, fit_teacher, needs_teacher, teacher_key
from .calibration import measure_calibration
from .dry_run import dry_run
from .evaluation import measure_policy, measure_teacher
from .exposed import collect_exposed, measure_exposed
from .lock import sole_run
from .recipe import Recipe
from .run_data import RunData, prepare
from .stage import RunContext, Stage
from .training import train_control, train_gflownet, train_sft, update_model_folder


def run(
    recipe: Recipe,
    data: RunData | None = None,
    callbacks: Sequence[TrainerCallback] = (),
    quiet: bool = False,
    redo: Collection[str] = (),
) -> dict[str, Any]:
    """Run all stages of a recipe. Finished stages are loaded, and an interrupted one continues.

    Args:
        data: the result of `prepare(recipe)`, if you have it already.
        callbacks: passed to every trainer.
        quiet: print neither stages nor the report.
        redo: names of finished stages (`stage_names`) to do again.

    Returns:
        The content of `results.json`. The file is in `output_dir`, where the next run replaces it, and in the run's
        own folder there.

    Raises:
        ValueError: bad input, damaged files of a finished stage, or another run is working in `output_dir`.
    """
    check_names(redo, stage_names(recipe), what="stage")
    data = data or prepare(recipe)
    check_needs(data)
    dry_run(data)
    run = RunContext(recipe.output_dir, quiet, callbacks, redo, _plan(recipe, data.exposed is not None))
    with sole_run(run.root):
        return _run(run, data)


def stage_names(recipe: Recipe) -> list[str]:
    """Names of the stages that a run of the recipe may have, as in its messages and folders."""
    trained = recipe.trained_stages
    measured = [f"{kind}-{name}" for kind in ("test", "exposed") for name in ("teacher", *trained)]
    return ["teacher", *trained, *measured, "calibration"]


def _plan(recipe: Recipe, has_exposed: bool = False) -> dict[str, float]:
    """The stages of a run, in order, with their rough costs in epochs of SFT (measured on Amazon Office)."""
    trained, cost = recipe.trained_stages, {"teacher": 2.0}
    if "sft" in trained:
        cost["sft"] = _epochs(recipe.sft)
    if "control" in trained:
        cost["control"] = 2 * _epochs(recipe.control_fields)
    if "gflownet" in trained:
        trajectories = recipe.training_arguments("gflownet", recipe.output_dir).num_generations
        cost["gflownet"] = (2 + 0.6 * trajectories) * _epochs(recipe.gflownet)
    before = ["teacher", "test-teacher"] if "teacher" in recipe.stages or _uses_teacher(recipe) else []
    names = [*before, *trained, *(f"test-{name}" for name in trained)]
    if has_exposed:
        names += [f"exposed-{name}" for name in (["teacher"] if before else []) + trained]
    if "gflownet" in trained and recipe.rewards and recipe.evaluation.calibration_rows != 0:
        names.append("calibration")
    return {name: cost.get(name, 0.5) for name in names}


def _epochs(section: Mapping[str, Any]) -> float:
    """The epochs of a section. Under `max_steps` they may be any number, and are not used."""
    epochs = float(section.get("num_train_epochs", 3.0))
    return epochs if epochs > 0 else 3.0


def _uses_teacher(recipe: Recipe) -> bool:
    """Whether the run's GFlowNet needs the recipe's own teacher."""
    return "gflownet" in recipe.stages and needs_teacher(recipe)


def _run(run: RunContext, data: RunData) -> dict[str, Any]:
    recipe = data.recipe
    run.log(data.interactions.summary())
    if recipe.earlier is not None:
        run.log(recipe.earlier.summary(data.interactions.items))
    elif data.item_tokenizer is not None:
        kind, tokens = recipe.data.semantic_ids.quantizer, data.item_tokenizer.num_levels
        run.log(f"This run has made its own semantic ids: {kind}, {tokens} tokens per item.")
    wanted = recipe.stages
    trained: dict[str, Stage] = {}
    tested: dict[str, Stage] = {}

    uses_own = _uses_teacher(recipe)
    teacher, teacher_seconds = None, 0.0
    if "teacher" in wanted or uses_own:
        teacher = fit_teacher(run, data, recipe.teacher)
        teacher_seconds = sum(run.seconds.values())  # of the first stages; a mixture has several
        key = teacher_key(data, recipe.teacher)
        tested["teacher"] = measure_teacher(run, data, teacher, key)
    used = teacher if uses_own else None
    if "sft" in recipe.trained_stages:
        trained["sft"] = train_sft(run, data)
    start = trained["sft"] if recipe.start == "sft" and trained else None
    if "control" in wanted:
        trained["control"] = train_control(run, data, start)
    if "gflownet" in wanted:
        trained["gflownet"] = train_gflownet(run, data, start, used)
    tested |= {method: measure_policy(run, data, stage) for method, stage in trained.items()}
    exposed = measure_exposed(run, data, trained, teacher, teacher_key(data, recipe.teacher))
    calibration = measure_calibration(run, data, trained, used)
    run.log("Writing the report.")
    results = run_report.collect(data, trained, tested, run.seconds, teacher_seconds, calibration)
    if exposed:
        results["exposed"] = collect_exposed(data, exposed, recipe.evaluation.bootstrap_samples)
    if run.is_main:
        own = run.root / f"report-{recipe.name}-{fingerprint(recipe.as_dict())[:8]}"
        logs = {method: stage.record["log"] for method, stage in trained.items()}
        for folder in (own, run.root):
            run_report.write(results, logs, folder)
        for method, stage in trained.items():
            metrics = results["methods"][method]["metrics"]
            update_model_folder(stage, data, metrics, results["data"]["test_users"])
        run.log(f"\n{run_report.text(results)}\n\nresults.json, report.md and the models are in {Path(run.root)}.")
        for stage in [*trained.values()][-1:]:
            run.log(f"Next: gflowtrl recommend --model {stage.folder / 'model'} --input FILE (docs/command.md)")
    run.state.wait_for_everyone()
    return results
