"""How far each policy is from R / Z, what a GFlowNet promises to make small: over all items, on a few rows."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from accelerate.utils import gather_object
from datasets import Dataset
from huggingface_hub import get_local_safetensors_metadata
from torch import Tensor, cat
from transformers import PreTrainedModel

from gflowtrl.metrics import reliability_curve
from gflowtrl.policy import TreePolicy, load_backbone, make_policy, whole_models
from gflowtrl.rewards import CompositeReward
from gflowtrl.teachers import TeacherModule
from gflowtrl.trainer import compare_with_rewards
from gflowtrl.trainer.gflownet_trainer import composite_reward
from gflowtrl.trainer.reference import ReferencePrior

from .materials import Materials, measured_users
from .signals import build_rewards
from .stage import Record, Stage, Workshop


ROWS = 64
#: Multiply-adds that nobody has to ask for: a minute or two of one thread of a CPU (some 1e10 a second), or of a GPU.
AFFORDABLE = {"cpu": 1e12, "other": 1e14}


def measure_calibration(
    workshop: Workshop, materials: Materials, trained: Mapping[str, Stage], teacher: TeacherModule | None
) -> Record | None:
    """Every trained policy against the recipe's R / Z (pi_ref^weight R / Z under `gflownet.ref_weight`), on training
    rows and test rows.

    Args:
        trained: stages by method.
        teacher: of rewards that use the recipe's own.

    Returns:
        `"rows"` of either part, `"leaves"`, `"target"` in words, and `"methods"`: by method and part (`"training"`,
        `"test"`) the means `"total_variation"` and `"jensen_shannon"`, and `"reliability"`
        (`metrics.reliability_curve`). Or `"left_out"`, why there is nothing of this; or None where the recipe wants
        none or has no rewards.
    """
    wanted = materials.recipe.evaluation.calibration_rows
    if wanted == 0 or "gflownet" not in trained or not trained["gflownet"].record["reward_weights"]:
        return None
    # Not more than are measured elsewhere: evaluation.users says that measuring is expensive.
    count = min(wanted or ROWS, len(materials.test))
    found = None if wanted else _too_much(workshop, materials, trained, count)
    if found is None:
        inputs = {method: stage.fingerprint for method, stage in trained.items()}
        stage = workshop.stage("calibration", {"of": inputs, "rows": count, **measured_users(materials.recipe)})
        rows = {"training": some(materials.splits.train, count), "test": some(materials.test, count)}

        def work(folder: Path) -> Record:
            rewards, prior = _target(workshop, materials, trained, teacher)
            if not rewards.can_score_all:
                lacking = ", ".join(map(repr, rewards.sampled_only))
                return {"left_out": f"{lacking} scores drawn items only, so that R / Z over all items is not known."}
            methods = {
                method: _compared(workshop, materials, s, rewards, prior, rows) for method, s in trained.items()
            }
            target = "R / Z" if prior is None else f"pi_ref^{prior.weight:g} R / Z"
            return {"rows": count, "leaves": materials.catalog.tree.num_leaves, "target": target, "methods": methods}

        found = stage.run(f"comparing policies with R / Z on {count} training and {count} test rows", work)
        found.pop("seconds")
    if "left_out" in found:
        workshop.say(f"[calibration] Left out: {found['left_out']}")
    return found


def some(rows: Dataset, count: int) -> Dataset:
    """Rows spread evenly over all."""
    return rows.select([i * len(rows) // count for i in range(min(count, len(rows)))])


def _too_much(workshop: Workshop, materials: Materials, trained: Mapping[str, Stage], count: int) -> Record | None:
    """Why nobody should wait for it unasked: a whole distribution costs a token at every fork of the tree."""
    forks = int((materials.catalog.tree.leaf_count > 1).sum())
    counted = get_local_safetensors_metadata(trained["gflownet"].folder / "model").parameter_count
    parameters = sum(counted.values())
    work = 2 * count * len(trained) * forks * parameters
    if work <= AFFORDABLE.get(workshop.state.device.type, AFFORDABLE["other"]):
        return None
    return {
        "left_out": f"{2 * count} rows x {len(trained)} policies x {forks:,} forks of the tree x {parameters:,} "
        f"parameters take long on this machine. evaluation.calibration_rows: {count} asks for it all the same, a "
        f"smaller number for less."
    }


def _target(
    workshop: Workshop, materials: Materials, trained: Mapping[str, Stage], teacher: TeacherModule | None
) -> tuple[CompositeReward, ReferencePrior | None]:
    """R as the GFlowNet stage was trained with, and the SFT model where the target holds it too."""
    args = materials.recipe.training_arguments("gflownet", workshop.root)
    sft_model = trained["sft"].folder / "model"
    rewards = build_rewards(workshop, materials, teacher, sft_model)
    args.reward_weights = trained["gflownet"].record["reward_weights"]
    fusion = composite_reward(rewards, args, materials.catalog, materials.tokenizer)
    if not args.ref_weight:
        return fusion, None
    return fusion, ReferencePrior(args.ref_weight, materials.catalog, _loaded(workshop, sft_model))


def _loaded(workshop: Workshop, folder: Path) -> PreTrainedModel:
    with whole_models():
        return load_backbone(folder).to(workshop.state.device).eval()


def _compared(
    workshop: Workshop,
    materials: Materials,
    trained: Stage,
    rewards: CompositeReward,
    prior: ReferencePrior | None,
    rows: Mapping[str, Dataset],
) -> dict[str, Any]:
    policy = make_policy(_loaded(workshop, trained.folder / "model"), materials.catalog)
    found = {}
    for part, some_rows in rows.items():
        values = _together(workshop, materials, policy, rewards, prior, some_rows)
        means = {name: float(values[name].mean()) for name in ("total_variation", "jensen_shannon")}
        found[part] = means | {"reliability": reliability_curve(values)}
    materials.catalog.to("cpu")
    return found


def _together(
    workshop: Workshop,
    materials: Materials,
    policy: TreePolicy,
    rewards: CompositeReward,
    prior: ReferencePrior | None,
    rows: Dataset,
) -> dict[str, Tensor]:
    """`compare_with_rewards`, each process its share of the rows, in every process."""
    mine = rows.select(range(workshop.state.process_index, len(rows), workshop.state.num_processes))
    part = {}
    if len(mine):  # there may be fewer rows than processes
        options = {"progress": False, "bins": True, "prior": prior}
        part = compare_with_rewards(policy, rewards, materials.encoder, mine, **options)
    parts = [one for one in gather_object([part]) if one]
    return {name: cat([one[name] for one in parts]) for name in parts[0]}
