"""The run: which stage follows which."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from gflowtrl.samplers import uses_teacher
from gflowtrl.teachers import fingerprint

from . import report
from .calibration import measure_calibration
from .evaluation import measure_policy, measure_teacher
from .materials import Materials, prepare
from .recipe import Recipe
from .signals import check_signals, fit_teacher, teacher_key
from .stage import Stage, Workshop
from .training import train_control, train_gflownet, train_sft, update_model_folder


def run(
    recipe: Recipe,
    materials: Materials | None = None,
    callbacks: Sequence[TrainerCallback] = (),
    quiet: bool = False,
) -> dict[str, Any]:
    """Runs all stages of a recipe; stages that are finished already are loaded, one that was interrupted goes on.

    Args:
        materials: what `prepare(recipe)` returned, if it was called already.
        callbacks: handed to every trainer.
        quiet: print no stage lines and no report.

    Returns:
        The content of `results.json`, which lies in `output_dir` and, for good, in the run's own folder there.
    """
    materials = materials or prepare(recipe)
    check_signals(materials)
    workshop = Workshop(recipe.output_dir, quiet, callbacks)
    workshop.say(materials.data.summary())
    wanted = recipe.stages
    trained: dict[str, Stage] = {}
    tested: dict[str, Stage] = {}

    uses_own = "gflownet" in wanted and needs_teacher(recipe)
    teacher, teacher_seconds = None, 0.0
    if "teacher" in wanted or uses_own:
        teacher = fit_teacher(workshop, materials, recipe.teacher)
        teacher_seconds = sum(workshop.seconds.values())  # of its stages, which are the first: several of a mixture
        key = teacher_key(recipe, materials, recipe.teacher)
        tested["teacher"] = measure_teacher(workshop, materials, teacher, key)
    used = teacher if uses_own else None
    if {*wanted} - {"teacher"}:
        sft = trained["sft"] = train_sft(workshop, materials)
    if "control" in wanted:
        trained["control"] = train_control(workshop, materials, sft)
    if "gflownet" in wanted:
        trained["gflownet"] = train_gflownet(workshop, materials, sft, used)
    tested |= {method: measure_policy(workshop, materials, stage) for method, stage in trained.items()}
    calibration = measure_calibration(workshop, materials, trained, used)
    results = report.collect(materials, trained, tested, workshop.seconds, teacher_seconds, calibration)
    if workshop.is_main:
        own = workshop.root / f"report-{recipe.name}-{fingerprint(recipe.as_dict())[:8]}"
        logs = {method: stage.record["log"] for method, stage in trained.items()}
        for folder in (own, workshop.root):
            report.write(results, logs, folder)
        for method, stage in trained.items():
            metrics = results["methods"][method]["metrics"]
            update_model_folder(stage, materials, metrics, results["data"]["test_users"])
        workshop.say(
            f"\n{report.text(results)}\n\nresults.json, report.md and the models are in {Path(workshop.root)}."
        )
    workshop.state.wait_for_everyone()
    return results


def needs_teacher(recipe: Recipe) -> bool:
    """Whether a reward or the sampler uses the recipe's own teacher."""
    rewards = any(reward.get("type") == "collaborative" and "teacher" not in reward for reward in recipe.rewards)
    return rewards or (recipe.sampler is not None and uses_teacher(recipe.sampler))
