"""Distance of each policy to R / Z over all items, on a few rows."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

import torch
from accelerate.utils import gather_object
from datasets import Dataset
from huggingface_hub import get_local_safetensors_metadata
from torch import Tensor

from gflowtrl.metrics import reliability_curve
from gflowtrl.policy import make_policy
from gflowtrl.rewards import CompositeReward
from gflowtrl.teachers import TeacherModule
from gflowtrl.trainer import compare_with_rewards
from gflowtrl.trainer.gflownet_trainer import composite_reward, excludes_history
from gflowtrl.trainer.reference import ReferencePrior

from .build import build_rewards
from .models import trained_model
from .run_data import RunData
from .stage import Record, RunContext, Stage, if_set


ROWS = 64
#: Multiply-adds spent without being asked: one or two minutes of one CPU thread (about 1e10 per second) or of a GPU.
AFFORDABLE = {"cpu": 1e12, "other": 1e14}


def measure_calibration(
    run: RunContext, data: RunData, trained: Mapping[str, Stage], teacher: TeacherModule | None
) -> Record | None:
    """Compare every trained policy with the recipe's R / Z on training and test rows.

    Under `gflownet.ref_weight` the target is pi_ref^weight R / Z.

    Args:
        trained: stages by method.
        teacher: the recipe's own, for rewards that use it.

    Returns:
        `"rows"` per part, `"leaves"`, `"target"` in words, and `"methods"`: by method and part (`"training"`,
        `"test"`) the means `"total_variation"` and `"jensen_shannon"`, and `"reliability"`
        (`metrics.reliability_curve`). Or `"left_out"`, the reason why nothing was compared. None if the recipe asks
        for no comparison or has no rewards.
    """
    measure = data.recipe.evaluation
    if measure.calibration_rows == 0 or "gflownet" not in trained or not trained["gflownet"].record["reward_weights"]:
        return None
    # Not more rows than are measured elsewhere: evaluation.users is set where measuring is expensive.
    count = min(measure.calibration_rows or ROWS, len(data.test))
    found = None if measure.calibration_rows else _too_much(run, data, trained, count)
    if found is None:
        inputs = {method: stage.fingerprint for method, stage in trained.items()}
        stage = run.stage("calibration", {"of": inputs, "rows": count, **if_set(users=measure.users)})
        rows = {"training": some(data.splits.train, count), "test": some(data.test, count)}

        def work(folder: Path) -> Record:
            rewards, prior = _target(run, data, trained, teacher)
            if not rewards.can_score_all:
                lacking = ", ".join(map(repr, rewards.sampled_only))
                return {"left_out": f"{lacking} scores drawn items only, so R / Z over all items is unknown."}
            compare = partial(compare_with_rewards, rewards=rewards, encoder=data.encoder, prior=prior)
            methods = {method: _compared(compare, data, stage, rows) for method, stage in trained.items()}
            target = "R / Z" if prior is None else f"pi_ref^{prior.weight:g} R / Z"
            return {"rows": count, "leaves": data.catalog.tree.num_leaves, "target": target, "methods": methods}

        found = stage.run(f"comparing policies with R / Z on {count} training and {count} test rows", work)
        found.pop("seconds")
    if "left_out" in found:
        run.log(f"[calibration] Left out: {found['left_out']}")
    return found


def some(rows: Dataset, count: int) -> Dataset:
    """`count` rows, evenly spaced."""
    return rows.select([i * len(rows) // count for i in range(min(count, len(rows)))])


def _too_much(run: RunContext, data: RunData, trained: Mapping[str, Stage], count: int) -> Record | None:
    """Why the comparison is too expensive to do without being asked, or None.

    A whole distribution costs one token per fork of the tree.
    """
    forks = int((data.catalog.tree.leaf_count > 1).sum())
    parameters = sum(get_local_safetensors_metadata(trained["gflownet"].folder / "model").parameter_count.values())
    affordable = AFFORDABLE.get(run.state.device.type, AFFORDABLE["other"])
    if 2 * count * len(trained) * forks * parameters <= affordable:
        return None
    return {
        "left_out": f"{2 * count} rows x {len(trained)} policies x {forks:,} forks of the tree x {parameters:,} "
        f"parameters take long on this machine. Set evaluation.calibration_rows: {count} to compare anyway, or "
        f"a smaller number."
    }


def _target(
    run: RunContext, data: RunData, trained: Mapping[str, Stage], teacher: TeacherModule | None
) -> tuple[CompositeReward, ReferencePrior | None]:
    """R as the GFlowNet stage was trained with, and the SFT model if the target includes it."""
    args = data.recipe.training_arguments("gflownet", run.root)
    sft = trained["sft"].folder / "model" if data.recipe.start == "sft" else None
    rewards = build_rewards(run, data, teacher, sft)
    args.reward_weights = trained["gflownet"].record["reward_weights"]
    exclude = excludes_history(args.exclude_history, data.splits.train)
    fusion = composite_reward(rewards, args, data.catalog, data.tokenizer, exclude)
    if not args.ref_weight:
        return fusion, None
    return fusion, ReferencePrior(args.ref_weight, data.catalog, trained_model(trained["sft"]))


def _compared(
    compare: Callable[..., dict[str, Tensor]], data: RunData, trained: Stage, rows: Mapping[str, Dataset]
) -> Record:
    """Compare the model of a stage with R / Z on each part of the rows, which the processes share."""
    policy, state = make_policy(trained_model(trained), data.catalog), trained.context.state
    found = {}
    for part, some_rows in rows.items():
        mine = some_rows.shard(state.num_processes, state.process_index, contiguous=True)
        # There may be fewer rows than processes.
        measured = compare(policy, rows=mine, progress=False, bins=True) if len(mine) else {}
        shares = [share for share in gather_object([measured]) if share]
        values = {name: torch.cat([share[name] for share in shares]) for name in shares[0]}
        means = {name: float(values[name].mean()) for name in ("total_variation", "jensen_shannon")}
        found[part] = means | {"reliability": reliability_curve(values)}
    data.catalog.to("cpu")
    return found
