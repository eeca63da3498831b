"""The run: which stage follows which."""

from __future__ import annotations

from collections.abc import Collection, Sequence
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
    """Runs all stages of a recipe; stages that are finished already are loaded, one that was interrupted goes on.

    Args:
        data: what `prepare(recipe)` returned, if it was called already.
        callbacks: handed to every trainer.
        quiet: print no stage lines and no report.
        redo: names of stages (`stage_names`) that are done again, although they are finished.

    Returns:
        The content of `results.json`, which lies in `output_dir` and, for good, in the run's own folder there.

    Raises:
        ValueError: bad input, a finished stage whose files are damaged, or another run at work in `output_dir`.
    """
    check_names(redo, stage_names(recipe), "redo")
    data = data or prepare(recipe)
    check_needs(data)
    dry_run(data)
    run = RunContext(recipe.output_dir, quiet, callbacks, redo)
    with sole_run(run.root):
        return _run(run, data)


def stage_names(recipe: Recipe) -> list[str]:
    """The stages that a run of the recipe may have, by the names of its messages and folders."""
    trained = recipe.trained_stages
    return ["teacher", *trained, *(f"test-{name}" for name in ("teacher", *trained)), "calibration"]


def _run(run: RunContext, data: RunData) -> dict[str, Any]:
    recipe = data.recipe
    run.log(data.interactions.summary())
    wanted = recipe.stages
    trained: dict[str, Stage] = {}
    tested: dict[str, Stage] = {}

    uses_own = "gflownet" in wanted and needs_teacher(recipe)
    teacher, teacher_seconds = None, 0.0
    if "teacher" in wanted or uses_own:
        teacher = fit_teacher(run, data, recipe.teacher)
        teacher_seconds = sum(run.seconds.values())  # of its stages, which are the first: several of a mixture
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
    calibration = measure_calibration(run, data, trained, used)
    results = run_report.collect(data, trained, tested, run.seconds, teacher_seconds, calibration)
    if run.is_main:
        own = run.root / f"report-{recipe.name}-{fingerprint(recipe.as_dict())[:8]}"
        logs = {method: stage.record["log"] for method, stage in trained.items()}
        for folder in (own, run.root):
            run_report.write(results, logs, folder)
        for method, stage in trained.items():
            metrics = results["methods"][method]["metrics"]
            update_model_folder(stage, data, metrics, results["data"]["test_users"])
        run.log(f"\n{run_report.text(results)}\n\nresults.json, report.md and the models are in {Path(run.root)}.")
    run.state.wait_for_everyone()
    return results
