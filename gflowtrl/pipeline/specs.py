"""What a recipe may say of teachers and rewards, checked before any work begins."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from gflowtrl import rewards
from gflowtrl.checks import FINITE, POSITIVE, check_choice, check_number
from gflowtrl.rewards.title_likelihood import check_title_options
from gflowtrl.teachers import EASE, MixtureTeacher, Popularity, SASRec

from .configuration import check_names


TEACHERS = {"sasrec": SASRec, "ease": EASE, "popularity": Popularity, "mixture": MixtureTeacher}
REWARDS = {
    "ground_truth": rewards.GroundTruthReward,
    "interaction": rewards.InteractionReward,
    "token_similarity": rewards.TokenSimilarityReward,
    "collaborative": rewards.CollaborativeReward,
    "likelihood": rewards.LikelihoodReward,
    "rank_penalty": rewards.RankPenaltyReward,
    "title_likelihood": rewards.TitleLikelihoodReward,
}
#: The weight that validation rows decide, and the rewards they can judge: those that do not read the target.
LEARNED = "learned"
WEIGHABLE = ("collaborative", "likelihood", "title_likelihood")
#: Options of a reward whose values are names: the first is the default.
REWARD_CHOICES = {"popularity": ("interactions", "impressions"), "of": ("sft", "policy")}
#: Arguments of a teacher's `fit` and of a reward that the pipeline fills in.
FILLED_IN = {"train_sequences", "items", "validation", "device", "progress", "config", "max_history_items"}
FILLED_IN_OF_REWARDS = {"item_counts", "tokenizer", "titles"}


def check_teacher(spec: Any, where: str) -> None:
    """Refuses a teacher that does not exist, or an option that it does not have."""
    kind = spec.get("type") if isinstance(spec, Mapping) else None
    if kind not in TEACHERS:
        raise ValueError(f"{where}.type is {kind!r}; choose from {', '.join(TEACHERS)}.")
    if kind != "mixture":
        check_names(spec, {"type", "weight"} | fit_arguments(kind) - FILLED_IN, where)
        check_number(f"{where}.weight", spec.get("weight", 1.0), POSITIVE)
        try:
            TEACHERS[kind].check_options(**{name: value for name, value in spec.items() if name != "weight"})
        except ValueError as error:
            raise ValueError(f"{where}.{error}") from None
        return
    check_names(spec, {"type", "parts", "normalization"}, where)
    check_choice(f"{where}.normalization", spec.get("normalization", "softmax"), ("softmax", "zscore"))
    if not isinstance(spec.get("parts"), list) or not spec["parts"]:
        raise ValueError(f"{where}.parts must list the mixture's teachers, each with type, weight and options.")
    for number, part in enumerate(spec["parts"]):
        check_teacher(part, f"{where}.parts.{number}")


def fit_arguments(kind: str) -> set[str]:
    """What the `fit` of a teacher takes, with what it hands on to the constructor as `**config`."""
    names = {*inspect.signature(TEACHERS[kind].fit).parameters}
    return names | {*inspect.signature(TEACHERS[kind]).parameters} if "config" in names else names


def check_reward(reward: Any, where: str) -> None:
    """Refuses a reward that does not exist, an option that it does not have, or a value that its class refuses."""
    if not isinstance(reward, Mapping) or ("type" in reward) == ("function" in reward):
        raise ValueError(f"{where} needs either a type ({', '.join(REWARDS)}) or a function (file.py:name).")
    _check_weight(reward, where)
    if "function" in reward:
        check_names(reward, ["function", "weight"], where)
        return
    kind = reward["type"]
    if kind not in REWARDS:
        raise ValueError(f"{where}.type is {kind!r}; choose from {', '.join(REWARDS)}, or give a function.")
    own = {*inspect.signature(REWARDS[kind]).parameters} - FILLED_IN_OF_REWARDS
    known = {"likelihood": {"of"}, "collaborative": own | {"popularity"}}.get(kind, own)
    check_names(reward, {"type", "weight"} | known, where)
    for name, choices in REWARD_CHOICES.items():
        if name in reward and reward[name] not in choices:
            raise ValueError(f"{where}.{name} is {reward[name]!r}; choose {' or '.join(choices)}.")
    if kind == "title_likelihood" and not isinstance(reward.get("model"), str):
        raise ValueError(f"{where}.model must name the language model that reads the titles: a folder, say.")
    if "teacher" in reward:
        check_teacher(reward["teacher"], f"{where}.teacher")
    named = {"type", "weight", "teacher", "model", *REWARD_CHOICES}
    try:
        _check_values(kind, {name: value for name, value in reward.items() if name not in named})
    except (TypeError, ValueError) as error:
        raise type(error)(f"{where}: {error}") from None


def _check_weight(reward: Mapping[str, Any], where: str) -> None:
    weight = reward.get("weight", 1.0)
    if weight != LEARNED and not isinstance(weight, int | float):
        raise TypeError(f"{where}.weight must be a number or {LEARNED!r}, but it is {weight!r}.")
    if weight != LEARNED:
        check_number(f"{where}.weight", weight, FINITE)
    if weight == LEARNED and (reward.get("type") not in WEIGHABLE or reward.get("of") == "policy"):
        raise ValueError(
            f"{where}.weight is {LEARNED!r}, which validation rows decide before the training. That is possible for "
            f"{', '.join(WEIGHABLE)}, of models that are fixed and do not read the target; give a number here."
        )


def _check_values(kind: str, options: Mapping[str, Any]) -> None:
    """Make the reward, without what takes time, for the errors of its class."""
    if kind == "title_likelihood":
        bound = inspect.signature(REWARDS[kind]).bind_partial(**options)
        bound.apply_defaults()
        check_title_options(*(bound.arguments[name] for name in inspect.signature(check_title_options).parameters))
    elif kind == "collaborative":
        REWARDS[kind](None, item_counts=(), **options)
    else:
        REWARDS[kind](**options)
