"""Teachers and rewards made from what a recipe says."""

from __future__ import annotations

import functools
import importlib.util
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from gflowtrl.catalog import Item
from gflowtrl.configuration import check_names
from gflowtrl.files import read_text
from gflowtrl.policy import load_backbone, whole_models
from gflowtrl.policy.loading import load_config
from gflowtrl.rewards import Reward, fit_reward_weights
from gflowtrl.samplers import build_sampler, uses_teacher
from gflowtrl.semantic_ids import item_texts
from gflowtrl.semantic_ids.making import make_embedder
from gflowtrl.teachers import CrossFitTeacher, TeacherModule, fingerprint, load_teacher, without_fold
from gflowtrl.teachers.text import TFIDF
from gflowtrl.trainer.gflownet_trainer import excludes_history

from .recipe import Recipe
from .run_data import RunData, files_fingerprint
from .specs import LEARNED, REWARDS, TEACHERS, check_options, needs_of_teacher, options_of
from .stage import RunContext, if_set


FLOOR = 1e-3  # reward floor while weights are learned, if the recipe's is 0: rows without any reward stay finite


# --------------------------------------------------------------------------------------------------------- teachers
def teacher_key(data: RunData, spec: Mapping[str, Any]) -> dict[str, Any]:
    """All that a fitted teacher depends on: the inputs of its stage."""
    kind = TEACHERS[spec["type"]]
    spec = {name: value for name, value in spec.items() if name != "weight"}
    if "seed" in kind.option_names():
        spec = {"seed": data.recipe.seed, **spec}
    if "parts" in spec:
        spec["parts"] = [[part.get("weight", 1.0), teacher_key(data, part)] for part in spec["parts"]]
    key = {"data": data.fingerprint, "teacher": spec}
    if (earlier := data.recipe.earlier) is not None and earlier.teacher(spec) is not None:
        key["start"] = earlier.teacher_digest
    if "texts" in kind.needs:
        key["texts"] = fingerprint(item_texts(data.interactions))
        key |= if_set(model_files=files_fingerprint(data.recipe.local(spec.get("embedder", TFIDF))))
    return key


def fit_teacher(run: RunContext, data: RunData, spec: Mapping[str, Any], fold: int | None = None) -> TeacherModule:
    """The teacher of a recipe's section, fitted once; the parts of a mixture and folds are stages of their own.

    Args:
        fold: fit the copy without this one of the `folds` of the section; None: all copies.
    """
    folds = spec.get("folds")
    if folds and fold is None:
        return CrossFitTeacher([fit_teacher(run, data, spec, number) for number in range(folds)])
    kind, longest, held_out = TEACHERS[spec["type"]], data.recipe.data.max_history_items, data.splits.validation
    pairs = zip(held_out["history"], held_out["target"], strict=True)
    validation = [{"history": history, "target": target} for history, target in pairs]
    if "parts" in spec:
        context = {
            "fit": functools.partial(fit_teacher, run, data),
            "validation": validation,
            "max_history_items": longest,
        }
        mixture = kind.from_spec(options_of(spec), context)
        if any(part.get("weight") == LEARNED for part in spec["parts"]):
            named = zip(spec["parts"], mixture.weights, strict=True)
            run.log("Learned weights of the teachers: " + ", ".join(f"{p['type']} {w:.3f}" for p, w in named) + ".")
        return mixture
    sequences, inputs = data.splits.train_sequences, teacher_key(data, spec)
    if folds:
        sequences = without_fold(sequences, data.interactions.users, fold, folds)
        inputs["without_fold"] = fold
    stage = run.stage("teacher", inputs)

    def fit(folder: Path) -> dict[str, Any]:
        # A teacher is asked about the items that prompts hold, or about as many as its own section says.
        seen = spec.get("max_history_items", longest)
        context = {
            "train_sequences": sequences,
            "items": data.interactions.items,
            "validation": [{**row, "history": row["history"][-seen:]} for row in validation],
            "device": run.state.device,
            "progress": not run.quiet,
            "max_history_items": longest,
            "embed": functools.partial(embed_items, data),
            **if_set(start=data.recipe.earlier and data.recipe.earlier.teacher(stage.inputs["teacher"])),
        }
        kind.from_spec(options_of(stage.inputs["teacher"]), context).save_pretrained(folder / "model")
        return {}

    part = f", without fold {fold} of {folds}" if folds else ""
    stage.run(f"fitting {spec['type']} on {data.kind}{part}", fit, main_only=True)
    return load_teacher(stage.folder / "model").to(run.state.device)


def embed_items(data: RunData, embedder: str) -> Tensor:
    """The vectors of the items' texts, `(items, D)`: by TF-IDF and SVD, or by a sentence-transformers model."""
    texts = item_texts(data.interactions)
    model = make_embedder(embedder if embedder == TFIDF else data.recipe.local(embedder))
    return model.fit(texts).embed(texts)


# ---------------------------------------------------------------------------------------------------------- rewards
@dataclass
class BuildContext:
    """What rewards may ask for while they are made (`gflowtrl.rewards.from_spec.RewardContext`).

    Attributes:
        own_teacher: the recipe's own teacher; None: no reward asks for it.
        sft_folder: folder of the model that supervised fine-tuning has trained; None: no reward asks for it.
    """

    run: RunContext
    data: RunData
    own_teacher: TeacherModule | None
    sft_folder: Path | None

    @property
    def titles(self) -> dict[Item, str]:
        return self.data.titles

    @property
    def item_features(self) -> Mapping[Item, dict[str, Any]]:
        return self.data.interactions.item_features

    def teacher(self, spec: Mapping[str, Any] | None = None) -> TeacherModule | None:
        return self.own_teacher if spec is None else fit_teacher(self.run, self.data, spec)

    def counts(self, kind: str) -> Tensor:
        splits = self.data.splits
        return splits.impression_counts if kind == "impressions" else splits.item_counts

    def sft_model(self) -> PreTrainedModel:
        with whole_models():
            return load_backbone(self.sft_folder)

    def local(self, name: str) -> str:
        return self.data.recipe.local(name)


def build_rewards(run: RunContext, data: RunData, teacher: TeacherModule | None, sft_model: Path | None) -> list:
    """The rewards of a recipe, in its order.

    Args:
        teacher: for rewards without a teacher of their own.
        sft_model: folder of the SFT model, for likelihood rewards; None: no reward asks for it.
    """
    context = BuildContext(run, data, teacher, sft_model)

    def build(spec: Mapping[str, Any]) -> Callable:
        found = load_reward(spec, data.recipe)
        if isinstance(found, type):
            return found.from_spec(options_of(spec), context)
        takes_features = _takes_features(found)
        return functools.partial(found, item_features=context.item_features) if takes_features else found

    return [build(spec) for spec in data.recipe.rewards]


def load_reward(spec: Mapping[str, Any], recipe: Recipe) -> type[Reward] | Callable:
    """The class of a reward, one of the library's or one in a file of the user's, or the user's plain function."""
    if "type" in spec:
        return REWARDS[spec["type"]]
    found = load_function(spec["function"], recipe.folder)
    if isinstance(found, type) and not issubclass(found, Reward):
        raise ValueError(
            f"The class {spec['function']} is not derived from gflowtrl.rewards.Reward: derive it, or name an object "
            f"of the class instead (docs/extending.md)."
        )
    return found


def needs_teacher(recipe: Recipe) -> bool:
    """Whether a reward or the sampler uses the recipe's own teacher."""
    loaded = [(load_reward(spec, recipe), options_of(spec)) for spec in recipe.rewards]
    if any(isinstance(found, type) and "teacher" in found.needs(options) for found, options in loaded):
        return True
    return recipe.sampler is not None and uses_teacher(recipe.sampler)


def final_weights(run: RunContext, data: RunData, rewards: Sequence[Callable]) -> list[float]:
    """The recipe's weights, with those that are to be learned fitted to the validation targets.

    Args:
        rewards: from `build_rewards`.
    """
    recipe, weights = data.recipe, data.recipe.reward_weights
    learned = [i for i, spec in enumerate(recipe.rewards) if spec.get("weight") == LEARNED]
    if not learned:
        return weights
    args = recipe.training_arguments("gflownet", run.root)
    found = fit_reward_weights(
        [rewards[i] for i in learned], data.catalog, data.splits.validation, data.encoder, data.tokenizer,
        floor=args.reward_floor or FLOOR, leaf_reduction=args.leaf_reduction, device=run.state.device,
        exclude_history=excludes_history(args.exclude_history, data.splits.train),
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


def reward_key(data: RunData) -> list[dict[str, Any]]:
    """All that the rewards depend on besides the recipe's own teacher: options, code, own teachers, titles, models."""
    recipe, keys = data.recipe, []
    for spec in recipe.rewards:
        key, found = dict(spec), load_reward(spec, recipe)
        if "function" in spec:
            key["code"] = fingerprint(read_text(_function_file(spec["function"], recipe.folder)[0], "Python code"))
            if isinstance(found, type) or _takes_features(found):
                features = data.interactions.item_features
                key["item_features"] = fingerprint([features.get(item) for item in data.interactions.items])
        if "teacher" in spec:
            key["teacher"] = teacher_key(data, spec["teacher"])
        needs = found.needs(options_of(spec)) if isinstance(found, type) else set()
        if "titles" in needs:
            key["titles"] = fingerprint(sorted(data.titles.items()))
        if "language_model" in needs:
            key["model_files"] = files_fingerprint(recipe.local(spec["model"]))
        keys.append(key)
    return keys


# ------------------------------------------------------------------------------------------------- before any training
def check_needs(data: RunData) -> None:
    """Check that the data, files and models that the recipe's rewards need exist.

    Raises:
        ValueError: no sessions, impressions or titles where a reward needs them, no such function in its file, a
            reward of drawn items only where a loss needs the reward of every item, no texts for a teacher of texts.
        OSError: a file of a function or a language model is missing.
    """
    recipe, needy = data.recipe, []
    _check_texts(data, recipe.teacher, "teacher")
    if "gflownet" in recipe.stages:
        args = recipe.training_arguments("gflownet", recipe.output_dir)
        if args.needs_all_rewards:
            needy = ["flows known" if args.flows == "known" else f"loss_type {' '.join(args.loss_type)}"]
        sampler = build_sampler(recipe.sampler or "ground_truth", teacher=lambda histories: None)
        needy += ["the sampler reward"] if sampler.needs_all_rewards else []
    for number, spec in enumerate(recipe.rewards):
        where, options, found = f"rewards.{number}", options_of(spec), load_reward(spec, recipe)
        if "teacher" in spec:
            _check_texts(data, spec["teacher"], f"{where}.teacher")
        who = f"{where} ({spec.get('type') or spec['function']})"
        if isinstance(found, type):
            check_options(found, spec, where)
            needs = found.needs(options)
            _check_data(data, needs, who)
            scores_every_item = found.scores_every_item(options)
            if "language_model" in needs:
                load_config(recipe.local(spec["model"]))
        else:
            check_names(options, (), where)
            scores_every_item = hasattr(found, "score_items")
        if needy and not scores_every_item:
            raise ValueError(
                f"{who} scores drawn items only, but the reward of every item is needed by {' and '.join(needy)}. "
                f"Choose others, such as --loss_type vargrad --sampler on_policy, or give the reward a method "
                f"score_items (docs/rewards.md)."
            )


def _check_texts(data: RunData, spec: Mapping[str, Any], where: str) -> None:
    """Check that a teacher which reads the texts of items finds some."""
    if "texts" in needs_of_teacher(spec):
        try:
            item_texts(data.interactions)
        except ValueError:
            raise ValueError(
                f"{where} reads the texts of items, but no item of {data.interactions.name} has a title "
                f"or another text (items.jsonl, docs/data.md). Add texts, or leave this teacher out."
            ) from None


def _check_data(data: RunData, needs: set[str], who: str) -> None:
    """Check that the data hold what a reward needs; `who` names the reward in errors."""
    if "sessions" in needs and data.interactions.events is None:
        raise ValueError(
            f"{data.interactions.name} has no sessions (events.jsonl), which {who} reads: use ground_truth, with "
            f"weight 10 as in GFlowGR."
        )
    if "impressions" in needs and data.splits.impression_counts is None:
        raise ValueError(
            f"{data.interactions.name} has no impressions (impressions.json or events.jsonl; with data.split: "
            f"temporal only those with times count), which {who} reads: use popularity: interactions."
        )
    titles = data.titles if "titles" in needs else {}
    lacking = [item for item in data.interactions.items if item not in titles] if "titles" in needs else []
    if lacking:
        raise ValueError(
            f"{data.interactions.name} has no title for {len(lacking)} of {len(data.interactions.items)} items "
            f"(items.jsonl), for example {lacking[0]!r}; {who} needs one for each item."
        )


# -------------------------------------------------------------------------------------------- functions of the user's
def _takes_features(function: Callable) -> bool:
    return "item_features" in inspect.signature(function).parameters


def load_function(reference: str, folder: str = ".") -> Callable:
    """A function or class from `path/to/file.py:name`; the path is relative to the working directory or to `folder`,
    the recipe's.

    Raises:
        FileNotFoundError, ValueError: there is no such file, or no such function in it.
    """
    file, name = _function_file(reference, folder)
    spec = importlib.util.spec_from_file_location(f"gflowtrl_reward_{file.stem}", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    function = getattr(module, name, None)
    if not callable(function):
        raise ValueError(f"{file} defines no function or class {name!r}; the recipe names the reward {reference!r}.")
    return function


def _function_file(reference: str, folder: str) -> tuple[Path, str]:
    path, separator, name = reference.rpartition(":")
    if not separator:
        raise ValueError(f"The reward function {reference!r} must be given as path/to/file.py:function_name.")
    for file in (Path(path), Path(folder, path)):
        if file.is_file():
            return file, name
    raise FileNotFoundError(f"The file of the reward function {reference!r} was not found here or in {folder}.")
