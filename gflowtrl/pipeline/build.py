"""What tells good items from bad ones: teachers and rewards as a recipe describes them."""

from __future__ import annotations

import functools
import importlib.util
import inspect
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import AutoModelForCausalLM

from gflowtrl.losses import get_loss
from gflowtrl.policy import load_backbone, whole_models
from gflowtrl.policy.loading import load_config, load_tokenizer, load_weights
from gflowtrl.rewards import CollaborativeReward, LikelihoodReward, TitleLikelihoodReward, fit_reward_weights
from gflowtrl.teachers import MixtureTeacher, TeacherModule, fingerprint, load_teacher

from .recipe import Recipe
from .run_data import RunData, files_fingerprint
from .specs import LEARNED, REWARDS, TEACHERS, fit_arguments
from .stage import RunContext


FLOOR = 1e-3  # where weights are learned and the recipe's own floor is 0: rows that no reward knows stay finite


def teacher_key(recipe: Recipe, data: RunData, spec: Mapping[str, Any]) -> dict[str, Any]:
    """All that a fitted teacher depends on: the inputs of its stage."""
    spec = {name: value for name, value in spec.items() if name != "weight"}
    if spec["type"] == "sasrec":
        spec = {"seed": recipe.seed, **spec}
    if spec["type"] == "mixture":
        spec["parts"] = [[part.get("weight", 1.0), teacher_key(recipe, data, part)] for part in spec["parts"]]
    return {"data": data.fingerprint, "teacher": spec}


def fit_teacher(run: RunContext, data: RunData, spec: Mapping[str, Any]) -> TeacherModule:
    """The teacher of a recipe's section, fitted once; the parts of a mixture are stages of their own."""
    if spec["type"] == "mixture":
        parts = {fit_teacher(run, data, part): float(part.get("weight", 1.0)) for part in spec["parts"]}
        return MixtureTeacher(parts, spec.get("normalization", "softmax"))
    stage = run.stage("teacher", teacher_key(data.recipe, data, spec))

    def fit(folder: Path) -> dict[str, Any]:
        options = dict(stage.inputs["teacher"])
        kind = options.pop("type")
        longest, held_out = data.recipe.data.max_history_items, data.splits.validation
        pairs = zip(held_out["history"], held_out["target"], strict=True)
        offered = {
            # A teacher is asked about what prompts hold.
            "validation": [{"history": history[-longest:], "target": target} for history, target in pairs],
            "device": run.state.device,
            "progress": not run.quiet, "max_history_items": longest,
        }  # fmt: skip
        options |= {name: offered[name] for name in offered.keys() & fit_arguments(kind)}
        teacher = TEACHERS[kind].fit(data.splits.train_sequences, data.interactions.items, **options)
        teacher.save_pretrained(folder / "model")
        return {}

    stage.run(f"fitting {spec['type']} on {data.kind}", fit, main_only=True)
    return load_teacher(stage.folder / "model").to(run.state.device)


def build_rewards(run: RunContext, data: RunData, teacher: TeacherModule | None, sft_model: Path | None) -> list:
    """The rewards of a recipe, in its order.

    Args:
        teacher: of collaborative rewards that name none of their own.
        sft_model: folder of the model whose probabilities a likelihood reward gives; None: no reward asks for it.
    """
    recipe = data.recipe

    def build(spec: Mapping[str, Any]) -> Callable:
        options = {name: value for name, value in spec.items() if name not in ("type", "weight", "function")}
        if "function" in spec:
            function = load_function(spec["function"], recipe.folder)
            features = data.interactions.item_features
            return functools.partial(function, item_features=features) if _takes_features(function) else function
        if spec["type"] == "likelihood":
            if options.get("of") == "policy":
                return LikelihoodReward(None)
            with whole_models():
                return LikelihoodReward(load_backbone(sft_model))
        if spec["type"] == "title_likelihood":
            folder = recipe.local(options.pop("model"))
            with whole_models():
                model = load_weights(AutoModelForCausalLM, folder)
            return TitleLikelihoodReward(model, load_tokenizer(folder), data.titles, **options)
        if spec["type"] == "collaborative":
            own = options.pop("teacher", None)
            used = teacher if own is None else fit_teacher(run, data, own)
            counts = _exposure(data, options.pop("popularity", "interactions"))
            return CollaborativeReward(used, item_counts=counts, **options)
        return REWARDS[spec["type"]](**options)

    return [build(spec) for spec in recipe.rewards]


def final_weights(run: RunContext, data: RunData, rewards: Sequence[Callable]) -> list[float]:
    """The recipe's weights, with those that are to be learned fitted to the validation targets.

    Args:
        rewards: of `build_rewards`.
    """
    recipe, weights = data.recipe, data.recipe.reward_weights
    learned = [i for i, spec in enumerate(recipe.rewards) if spec.get("weight") == LEARNED]
    if not learned:
        return weights
    args = recipe.training_arguments("gflownet", run.root)
    found = fit_reward_weights(
        [rewards[i] for i in learned], data.catalog, data.splits.validation, data.encoder,
        data.tokenizer, floor=args.reward_floor or FLOOR, leaf_reduction=args.leaf_reduction,
        device=run.state.device,
    )  # fmt: skip
    shares = []
    for i, weight, share in zip(learned, found.weights, found.shares, strict=True):
        weights[i] = weight
        shares.append(f"rewards.{i} ({recipe.rewards[i]['type']}) {share:.3f}")
    run.log(
        f"Learned shares of the rewards: {', '.join(shares)}; log-likelihood of validation targets "
        f"{found.log_likelihood:.4f} (equal shares {found.equal_log_likelihood:.4f})."
    )
    return weights


def check_data_needs(data: RunData) -> None:
    """What the recipe's rewards need of the data and of files of the user's.

    Raises:
        ValueError: no sessions for `interaction`, no impressions or titles where a reward asks for them, no such
            function in its file, a reward of drawn items only where a loss needs that of every leaf.
        OSError: no file of a function, no model that reads titles.
    """
    recipe, losses = data.recipe, []
    if "gflownet" in recipe.stages:
        losses = recipe.training_arguments("gflownet", recipe.output_dir).loss_type
    needy = next((name for name in losses if get_loss(name).needs_all_rewards), None)
    for number, spec in enumerate(recipe.rewards):
        kind = spec.get("type")
        if kind == "interaction" and data.interactions.events is None:
            raise ValueError(
                f"{data.interactions.name} has no sessions (events.jsonl), which the reward interaction reads: use "
                f"ground_truth, with weight 10 as in GFlowGR."
            )
        if kind == "title_likelihood":
            lacking = [item for item in data.interactions.items if item not in data.titles]
            if lacking:
                raise ValueError(
                    f"{data.interactions.name} has no title of {len(lacking)} of {len(data.interactions.items)} items "
                    f"(items.jsonl), for example {lacking[0]!r}; the reward title_likelihood needs one for each."
                )
            load_config(recipe.local(spec["model"]))
        _exposure(data, spec.get("popularity", "interactions"))
        if "function" in spec:
            every_item = hasattr(load_function(spec["function"], recipe.folder), "score_items")
        else:
            sampled = {"likelihood": spec.get("of") == "policy", "title_likelihood": not spec.get("all_items", False)}
            every_item = not sampled.get(kind, kind == "rank_penalty")
        if needy and not every_item:
            raise ValueError(
                f"rewards.{number} ({kind or spec['function']}) scores drawn items only, but {needy} needs the reward "
                f"of every item: choose another gflownet.loss_type (vargrad, say), or give the reward a method "
                f"score_items (docs/rewards.md)."
            )


def _takes_features(function: Callable) -> bool:
    """Whether a reward function reads what is known about the items."""
    return "item_features" in inspect.signature(function).parameters


def _exposure(data: RunData, kind: str) -> Tensor:
    """What a popularity correction divides by: how often an item was taken, or, where the log says it, shown."""
    if kind == "interactions":
        return data.item_counts
    if data.splits.impression_counts is None:
        raise ValueError(f"{data.interactions.name} has no impressions (events.jsonl): use popularity: interactions.")
    return data.splits.impression_counts


def reward_key(recipe: Recipe, data: RunData) -> list[dict[str, Any]]:
    """All that the rewards depend on besides the recipe's teacher: specifications, code files, own teachers."""
    keys = []
    for spec in recipe.rewards:
        key = dict(spec)
        if "function" in spec:
            key["code"] = fingerprint(_function_file(spec["function"], recipe.folder)[0].read_text(encoding="utf-8"))
            if _takes_features(load_function(spec["function"], recipe.folder)):
                key["item_features"] = fingerprint(
                    [data.interactions.item_features.get(i) for i in data.interactions.items]
                )
        if "teacher" in spec:
            key["teacher"] = teacher_key(recipe, data, spec["teacher"])
        if spec.get("type") == "title_likelihood":
            key["titles"] = fingerprint(sorted(data.titles.items()))
            key["model_files"] = files_fingerprint(recipe.local(spec["model"]))
        keys.append(key)
    return keys


def load_function(reference: str, folder: str = ".") -> Callable:
    """A function from `path/to/file.py:name`, the path seen from here or from `folder` (the recipe's).

    Raises:
        FileNotFoundError, ValueError: there is no such file, or no such function in it.
    """
    file, name = _function_file(reference, folder)
    spec = importlib.util.spec_from_file_location(f"gflowtrl_reward_{file.stem}", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    function = getattr(module, name, None)
    if not callable(function):
        raise ValueError(f"{file} defines no function {name!r}; the recipe names the reward {reference!r}.")
    return function


def _function_file(reference: str, folder: str) -> tuple[Path, str]:
    path, separator, name = reference.rpartition(":")
    if not separator:
        raise ValueError(f"The reward function {reference!r} must be given as path/to/file.py:function_name.")
    for file in (Path(path), Path(folder, path)):
        if file.is_file():
            return file, name
    raise FileNotFoundError(f"The file of the reward function {reference!r} is neither here nor in {folder}.")
