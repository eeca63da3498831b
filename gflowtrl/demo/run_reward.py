"""The reward of a finished run, computed for the history of a visitor."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gflowtrl.catalog import Item
from gflowtrl.data import Step
from gflowtrl.files import read_object, reading, write_text
from gflowtrl.recommender import Recommender
from gflowtrl.rewards import CompositeReward, Reward


INPUTS_FILE, DONE_FILE = "inputs.json", "done.json"  # of a stage, as `gflowtrl.pipeline.stage` writes them
#: Options of the stage that R depends on: the argument of `CompositeReward` and its type. YAML reads 1e-3 as text.
OPTIONS = {
    "reward_transform": ("transform", str),
    "reward_beta": ("beta", float),
    "reward_floor": ("floor", float),
    "leaf_reduction": ("leaf_reduction", str),
}
EXCLUDE, PRIOR = "exclude_history", "ref_weight"
OTHER = "a function of the recipe"


class RunReward:
    """R of a run's GFlowNet stage, without the parts that only the training can compute.

    Args:
        rewards: the parts that a recommender can compute.
        left_out: a phrase for each part that it cannot, as in "ground_truth (it needs the logged target)".
        recommender: the recommender.
        options: keyword arguments of `CompositeReward`.
    """

    def __init__(
        self, rewards: Sequence[Reward], left_out: Sequence[str], recommender: Recommender, **options: Any
    ) -> None:
        self.left_out, self._longest = list(left_out), recommender.max_history_items
        self._composite = CompositeReward(list(rewards), recommender.catalog, recommender.tokenizer, **options)

    @property
    def names(self) -> list[str]:
        """Names of the parts."""
        return self._composite.names

    def of(self, history: Sequence[Item]) -> Callable[[Tensor], Tensor]:
        """Return log F(s) - log Z for a history, as a function of nodes: the target's log-probability of each prefix.

        The function takes nodes `(...)` of the tree on the catalog's device and returns values of that shape, -inf for
        node -1. The last node of a leaf has log R / Z.

        Args:
            history: items of the catalog, at least one.

        Raises:
            ValueError: a part has an invalid value for this history, for example no positive one.
        """
        catalog = self._composite.catalog
        step = Step.of({}, torch.zeros(1, dtype=torch.long), {"history": [list(history[-self._longest :])]}, catalog)
        flows = self._composite.dense(step)
        log_z = flows.log_flows(torch.zeros(1, 1, dtype=torch.long, device=catalog.device))
        return lambda nodes: (flows.log_flows(nodes.reshape(1, -1)) - log_z).reshape(nodes.shape)


@dataclass
class _Context:
    """What a recommender provides to rewards (`gflowtrl.rewards.from_spec.RewardContext`)."""

    recommender: Recommender

    @property
    def titles(self) -> Mapping[Item, str]:
        return self.recommender.titles

    @property
    def item_features(self) -> Mapping[Item, Mapping[str, Any]]:
        return {}

    def teacher(self, spec: Mapping[str, Any] | None = None) -> Any:
        return self.recommender.teacher

    def counts(self, kind: str) -> Tensor:
        counts, size = self.recommender.item_counts, len(self.recommender.catalog)
        return torch.zeros(size) if counts is None else counts[:size]  # without those of retired items

    def sft_model(self) -> Any:
        raise NotImplementedError("rewards that need a model are left out")

    def local(self, name: str) -> str:
        return name


def read_run_reward(model_dir: str | os.PathLike, recommender: Recommender) -> RunReward | None:
    """Read the reward of the run that trained a recommender.

    Args:
        model_dir: the recommender's folder. If it is the folder `model` of a GFlowNet stage, the stage's options and
            reward weights are in the folder around it.
        recommender: the loaded recommender.

    Returns:
        The reward, or None: the folder belongs to no such stage, or no part of its reward can be computed.

    Raises:
        ValueError: a file of the stage is damaged; the message names it.
    """
    found = _stage_files(model_dir)
    if found is None:
        return None
    inputs, done = found
    with reading(Path(model_dir).resolve().parent, f"a GFlowNet stage with {INPUTS_FILE} and {DONE_FILE}"):
        options, specs, weights = inputs["gflownet"], inputs["rewards"], [float(w) for w in done["reward_weights"]]
        if len(specs) != len(weights):
            raise ValueError(f"it has {len(specs)} rewards and {len(weights)} reward_weights")
        reasons = [_why_left_out(spec, recommender) for spec in specs]
        parts = [part for part in zip(specs, weights, reasons, strict=True) if part[1]]
        usable = [(spec, weight) for spec, weight, reason in parts if reason is None]
        if not usable or float(options.get(PRIOR, 0)):  # the reference model of the target is not in the folder
            return None
        left_out = [f"{spec.get('type', OTHER)} ({reason})" for spec, _, reason in parts if reason is not None]
        if options.get(EXCLUDE) == "auto":
            left_out.append(f"{EXCLUDE} (auto depends on the training data; items of the history keep their reward)")
        given = {argument: kind(options[name]) for name, (argument, kind) in OPTIONS.items() if name in options}
        given["exclude_history"] = options.get(EXCLUDE) in ("yes", True)
        rewards = [_build(spec, recommender) for spec, _ in usable]
        return RunReward(rewards, left_out, recommender, weights=[weight for _, weight in usable], **given)


def copy_reward(model_dir: str | os.PathLike, recommender: Recommender, folder: Path) -> None:
    """Write what `read_run_reward` reads of a stage, and nothing else of it, for a copy of the model in `folder`."""
    found = _stage_files(model_dir)
    if found is None:
        return
    inputs, done = found
    options = {name: inputs["gflownet"][name] for name in (*OPTIONS, EXCLUDE, PRIOR) if name in inputs["gflownet"]}
    specs = [spec if _why_left_out(spec, recommender) is None else _reduced(spec) for spec in inputs["rewards"]]
    contents = {
        INPUTS_FILE: {"gflownet": options, "rewards": specs},
        DONE_FILE: {"reward_weights": done["reward_weights"]},
    }
    for name, content in contents.items():
        write_text(folder / name, json.dumps(content, indent=2) + "\n")


def _stage_files(model_dir: str | os.PathLike) -> tuple[dict[str, Any], dict[str, Any]] | None:
    """Return the contents of `inputs.json` and `done.json` around a model's folder; None if it is not a GFlowNet's."""
    place = Path(model_dir).resolve().parent
    if not all((place / name).is_file() for name in (INPUTS_FILE, DONE_FILE)):
        return None
    inputs, done = read_object(place / INPUTS_FILE), read_object(place / DONE_FILE)
    return (inputs, done) if {"gflownet", "rewards"} <= inputs.keys() and done.get("reward_weights") else None


def _why_left_out(spec: Mapping[str, Any], recommender: Recommender) -> str | None:
    """Return why a part of the reward cannot be computed from a recommender, or None if it can."""
    from gflowtrl.pipeline.specs import REWARDS, options_of  # imports trl, which nothing else here needs

    if "function" in spec:
        return "its code is not in the model's folder"
    kind, options = REWARDS[spec["type"]], options_of(spec)
    if kind.reads_target:
        return "it needs the logged target"
    if "teacher" in spec:
        return "its own teacher is not in the model's folder"
    needs = kind.needs(options)
    if "teacher" in needs and recommender.teacher is None:
        return "the model's folder has no teacher"
    if "teacher" in needs and not set(recommender.catalog.items) <= set(recommender.teacher.items):
        return "the teacher does not know all items"
    if others := needs - {"teacher"}:
        return f"it needs {', '.join(sorted(others))}, which only the training has"
    if options.get("popularity_correction") and recommender.item_counts is None:
        return "the model's folder has no item counts"
    return None


def _reduced(spec: Mapping[str, Any]) -> dict[str, Any]:
    """Return what `_why_left_out` reads of a part that is left out, without paths and fingerprints."""
    kept = {name: spec[name] for name in ("type", "of", "popularity") if name in spec}
    return kept | {name: "" for name in ("function", "teacher") if name in spec}


def _build(spec: Mapping[str, Any], recommender: Recommender) -> Reward:
    from gflowtrl.pipeline.specs import REWARDS, options_of

    return REWARDS[spec["type"]].from_spec(options_of(spec), _Context(recommender))
