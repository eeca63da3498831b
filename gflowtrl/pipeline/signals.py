"""What tells good items from bad ones: teachers and rewards as a recipe describes them."""

from __future__ import annotations

import functools
import importlib.util
import inspect
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from gflowtrl.losses import get_loss
from gflowtrl.policy import load_backbone, whole_models
from gflowtrl.rewards import CollaborativeReward, LikelihoodReward, TitleLikelihoodReward, fit_reward_weights
from gflowtrl.teachers import EASE, MixtureTeacher, Popularity, SASRec, TeacherModule, fingerprint, load_teacher

from .materials import Materials, files_fingerprint
from .recipe import LEARNED, REWARDS, Recipe, local_folder
from .stage import Workshop


FLOOR = 1e-3  # where weights are learned and the recipe's own floor is 0: rows that no reward knows stay finite


def teacher_key(recipe: Recipe, materials: Materials, spec: Mapping[str, Any]) -> dict[str, Any]:
    """All that a fitted teacher depends on: the inputs of its stage."""
    spec = {name: value for name, value in spec.items() if name != "weight"}
    if spec["type"] == "sasrec":
        spec = {"seed": recipe.seed, **spec}
    if spec["type"] == "mixture":
        spec["parts"] = [[part.get("weight", 1.0), teacher_key(recipe, materials, part)] for part in spec["parts"]]
    return {"data": materials.fingerprint, "teacher": spec}


def fit_teacher(workshop: Workshop, materials: Materials, spec: Mapping[str, Any]) -> TeacherModule:
    """The teacher of a recipe's section, fitted once; the parts of a mixture are stages of their own."""
    if spec["type"] == "mixture":
        parts = {fit_teacher(workshop, materials, part): float(part.get("weight", 1.0)) for part in spec["parts"]}
        return MixtureTeacher(parts, spec.get("normalization", "softmax"))
    stage = workshop.stage("teacher", teacher_key(materials.recipe, materials, spec))

    def fit(folder: Path) -> dict[str, Any]:
        options = stage.inputs["teacher"].copy()
        sequences, items = materials.splits.train_sequences, materials.data.items
        kind = options.pop("type")
        if kind == "popularity":
            teacher = Popularity.fit(sequences, items)
        elif kind == "ease":
            teacher = EASE.fit(sequences, items, materials.splits.validation, **options)
        else:
            options = {"max_history_items": materials.recipe.data.max_history_items, **options}
            quiet = workshop.quiet
            device = workshop.state.device
            validation = materials.splits.validation
            teacher = SASRec.fit(sequences, items, validation, device=device, progress=not quiet, **options)
        teacher.save_pretrained(folder / "model")
        return {}

    stage.run(f"fitting {spec['type']} on {materials.kind}", fit, main_only=True)
    return load_teacher(stage.folder / "model").to(workshop.state.device)


def build_rewards(workshop: Workshop, materials: Materials, teacher: TeacherModule | None, sft_model: Path) -> list:
    """The rewards of a recipe, in its order.

    Args:
        teacher: of collaborative rewards that name none of their own.
        sft_model: folder of the model whose probabilities a likelihood reward gives.
    """
    check_signals(materials)
    return [_build_reward(workshop, materials, spec, teacher, sft_model) for spec in materials.recipe.rewards]


def final_weights(workshop: Workshop, materials: Materials, rewards: Sequence[Callable]) -> list[float]:
    """The recipe's weights, with those that are to be learned fitted to the validation targets.

    Args:
        rewards: of `build_rewards`.
    """
    recipe, weights = materials.recipe, materials.recipe.reward_weights
    learned = [i for i, spec in enumerate(recipe.rewards) if spec.get("weight") == LEARNED]
    if not learned:
        return weights
    args = recipe.training_arguments("gflownet", workshop.root)
    found = fit_reward_weights(
        [rewards[i] for i in learned], materials.catalog, materials.splits.validation, materials.encoder,
        materials.tokenizer, floor=args.reward_floor or FLOOR, leaf_reduction=args.leaf_reduction,
        device=workshop.state.device,
    )  # fmt: skip
    for i, weight in zip(learned, found.weights, strict=True):
        weights[i] = weight
    shares = ", ".join(
        f"rewards.{i} ({recipe.rewards[i]['type']}) {s:.3f}" for i, s in zip(learned, found.shares, strict=True)
    )
    workshop.say(
        f"Learned shares of the rewards: {shares}; log-likelihood of validation targets {found.log_likelihood:.4f} "
        f"(equal shares {found.equal_log_likelihood:.4f})."
    )
    return weights


def _build_reward(
    workshop: Workshop,
    materials: Materials,
    spec: Mapping[str, Any],
    teacher: TeacherModule | None,
    sft_model: Path,
) -> Callable:
    options = {name: value for name, value in spec.items() if name not in ("type", "weight", "function")}
    if "function" in spec:
        function = load_function(spec["function"], materials.recipe.folder)
        features = materials.data.item_features
        return functools.partial(function, item_features=features) if _takes_features(function) else function
    if spec["type"] == "likelihood":
        if options.get("of") == "policy":
            return LikelihoodReward(None)
        with whole_models():
            return LikelihoodReward(load_backbone(sft_model))
    if spec["type"] == "title_likelihood":
        folder = local_folder(materials.recipe.folder, options.pop("model"))
        with whole_models():
            model = AutoModelForCausalLM.from_pretrained(folder)
        tokenizer = AutoTokenizer.from_pretrained(folder)
        return TitleLikelihoodReward(model, tokenizer, _titles(materials), **options)
    if spec["type"] == "collaborative":
        own = options.pop("teacher", None)
        used = teacher if own is None else fit_teacher(workshop, materials, own)
        counts = _exposure(materials, options.pop("popularity", "interactions"))
        return CollaborativeReward(used, item_counts=counts, **options)
    return REWARDS[spec["type"]](**options)


def check_signals(materials: Materials) -> None:
    """What the recipe's rewards need of the data and of files of the user's.

    Raises:
        ValueError: no sessions for `interaction`, no impressions or titles where a reward asks for them, no such
            function in its file, a reward of drawn items only where a loss needs that of every leaf.
        OSError: no file of a function, no model that reads titles.
    """
    recipe = materials.recipe
    for number, spec in enumerate(recipe.rewards):
        if spec.get("type") == "interaction" and materials.data.events is None:
            raise ValueError(
                f"{materials.data.name} has no sessions (events.jsonl), which the reward interaction reads: use "
                f"ground_truth, with weight 10 as in GFlowGR."
            )
        if spec.get("type") == "title_likelihood":
            _titles(materials)
            AutoConfig.from_pretrained(local_folder(recipe.folder, spec["model"]))
        _exposure(materials, spec.get("popularity", "interactions"))
        _check_scores(recipe, spec, f"rewards.{number}")


def _check_scores(recipe: Recipe, spec: Mapping[str, Any], where: str) -> None:
    """A function must be there, and a reward score every item where a loss needs that."""
    every_item = {
        "rank_penalty": False, "likelihood": spec.get("of") != "policy",
        "title_likelihood": spec.get("all_items", False),
    }.get(spec.get("type"), True)  # fmt: skip
    if "function" in spec:
        every_item = hasattr(load_function(spec["function"], recipe.folder), "score_items")
    losses = recipe.training_arguments("gflownet", recipe.output_dir).loss_type if "gflownet" in recipe.stages else []
    needy = [name for name in losses if get_loss(name).needs_all_rewards]
    if needy and not every_item:
        raise ValueError(
            f"{where} ({spec.get('type') or spec['function']}) scores drawn items only, but {needy[0]} needs the "
            f"reward of every item: choose another gflownet.loss_type (vargrad, say), or give the reward a method "
            f"score_items (docs/rewards.md)."
        )


def _takes_features(function: Callable) -> bool:
    """Whether a reward function reads what is known about the items."""
    return "item_features" in inspect.signature(function).parameters


def _titles(materials: Materials) -> dict[Any, str]:
    titles = materials.titles
    lacking = [item for item in materials.data.items if item not in titles]
    if lacking:
        count = f"{len(lacking)} of {len(materials.data.items)}"
        raise ValueError(
            f"{materials.data.name} has no title of {count} items (items.jsonl), for example {lacking[0]!r}; the "
            f"reward title_likelihood needs one for each."
        )
    return titles


def _exposure(materials: Materials, kind: str) -> Tensor:
    """What a popularity correction divides by: how often an item was taken, or, where the log says it, shown."""
    if kind == "interactions":
        return materials.item_counts
    if materials.splits.impression_counts is None:
        raise ValueError(f"{materials.data.name} has no impressions (events.jsonl): use popularity: interactions.")
    return materials.splits.impression_counts


def reward_key(recipe: Recipe, materials: Materials) -> list[dict[str, Any]]:
    """All that the rewards depend on besides the recipe's teacher: specifications, code files, own teachers."""
    keys = []
    for spec in recipe.rewards:
        key = dict(spec)
        if "function" in spec:
            key["code"] = fingerprint(_function_file(spec["function"], recipe.folder)[0].read_text(encoding="utf-8"))
            if _takes_features(load_function(spec["function"], recipe.folder)):
                key["item_features"] = fingerprint([materials.data.item_features.get(i) for i in materials.data.items])
        if "teacher" in spec:
            key["teacher"] = teacher_key(recipe, materials, spec["teacher"])
        if spec.get("type") == "title_likelihood":
            key["titles"] = fingerprint(sorted(_titles(materials).items()))
            key["model_files"] = files_fingerprint(local_folder(recipe.folder, spec["model"]))
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
