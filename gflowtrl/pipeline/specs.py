"""Names of teachers and rewards in recipes, and checks of their options before any work begins."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from gflowtrl import rewards
from gflowtrl.checks import FINITE, POSITIVE, check_number, short_repr
from gflowtrl.configuration import check_names, locate_errors
from gflowtrl.rewards import Reward
from gflowtrl.teachers import (
    EASE,
    ContentSASRec,
    ItemKNN,
    ItemText,
    MixtureTeacher,
    Popularity,
    SASRec,
    TeacherModule,
    Transitions,
)
from gflowtrl.teachers.cross_fit import FOLDS
from gflowtrl.teachers.mixture import LEARNED


#: A new teacher or reward is a class and a line here.
TEACHERS: dict[str, type[TeacherModule]] = {
    "sasrec": SASRec,
    "content_sasrec": ContentSASRec,
    "transitions": Transitions,
    "item_knn": ItemKNN,
    "ease": EASE,
    "text": ItemText,
    "popularity": Popularity,
    "mixture": MixtureTeacher,
}
REWARDS: dict[str, type[Reward]] = {
    "ground_truth": rewards.GroundTruthReward,
    "uniform": rewards.UniformReward,
    "interaction": rewards.InteractionReward,
    "token_similarity": rewards.TokenSimilarityReward,
    "collaborative": rewards.CollaborativeReward,
    "likelihood": rewards.LikelihoodReward,
    "rank_penalty": rewards.RankPenaltyReward,
    "title_likelihood": rewards.TitleLikelihoodReward,
}


def options_of(spec: Mapping[str, Any]) -> dict[str, Any]:
    """The options of a teacher or reward itself, without its name, weight and folds."""
    return {name: value for name, value in spec.items() if name not in ("type", "function", "weight", "folds")}


def needs_of(spec: Mapping[str, Any]) -> set[str]:
    """What a reward of the library needs of the run (`Reward.needs`)."""
    return REWARDS[spec["type"]].needs(options_of(spec)) if "type" in spec else set()


def check_teacher(spec: Any, where: str, is_part: bool = False) -> None:
    """Check a teacher's type and options.

    Args:
        spec: the teacher's section.
        where: its place in the recipe.
        is_part: whether it is a part of a mixture, whose weight may be learned.
    """
    kind = spec.get("type") if isinstance(spec, Mapping) else None
    if kind not in [*TEACHERS]:
        raise ValueError(f"{where}.type is {kind!r}; choose from {', '.join(TEACHERS)}.")
    check_names(spec, {"type", "weight", "folds"} | TEACHERS[kind].option_names(), where)
    check_number(f"{where}.folds", spec.get("folds"), FOLDS, optional=True)
    if spec.get("folds") and "parts" in TEACHERS[kind].option_names():
        raise ValueError(f"{where}.folds is set, but its parts are fitted one by one: set folds in the parts.")
    if not (is_part and spec.get("weight") == LEARNED):
        check_number(f"{where}.weight", spec.get("weight", 1.0), POSITIVE)
    with locate_errors(where, TEACHERS[kind].option_names()):
        TEACHERS[kind].check_options(**options_of(spec))
    for number, part in enumerate(spec.get("parts", ())):
        check_teacher(part, f"{where}.parts.{number}", is_part=True)


def needs_of_teacher(spec: Mapping[str, Any]) -> set[str]:
    """What a teacher or the parts of a mixture need of the run (`TeacherModule.needs`)."""
    return set(TEACHERS[spec["type"]].needs).union(*map(needs_of_teacher, spec.get("parts", ())))


def check_reward(spec: Any, where: str) -> None:
    """Check a reward's type, weight and options. A function, which other files define, is checked by `check_needs`."""
    if not isinstance(spec, Mapping) or ("type" in spec) == ("function" in spec):
        raise ValueError(f"{where} needs either a type ({', '.join(REWARDS)}) or a function (file.py:name).")
    if "type" in spec and not isinstance(spec["type"], str):
        raise TypeError(f"{where}.type must be text, but it is {short_repr(spec['type'])}.")
    _check_weight(spec, where)
    if "function" in spec:
        return
    if spec["type"] not in REWARDS:
        raise ValueError(f"{where}.type is {spec['type']!r}; choose from {', '.join(REWARDS)}, or give a function.")
    check_options(REWARDS[spec["type"]], spec, where)


def check_options(kind: type[Reward], spec: Mapping[str, Any], where: str) -> None:
    """Check the options of a reward of the class `kind`."""
    check_names(options_of(spec), kind.option_names(), where)
    for name, parameter in inspect.signature(kind).parameters.items():
        if isinstance(parameter.default, bool) and not isinstance(spec.get(name, False), bool):
            raise TypeError(f"{where}.{name} must be true or false, but it is {short_repr(spec[name])}.")
    if "teacher" in spec:
        check_teacher(spec["teacher"], f"{where}.teacher")
    with locate_errors(where, kind.option_names()):
        kind.check_spec(options_of(spec))


def _check_weight(spec: Mapping[str, Any], where: str) -> None:
    weight = spec.get("weight", 1.0)
    if weight != LEARNED:
        if not isinstance(weight, int | float):
            raise TypeError(f"{where}.weight must be a number or {LEARNED!r}, but it is {weight!r}.")
        check_number(f"{where}.weight", weight, FINITE)
        return
    kind = REWARDS.get(spec.get("type", ""))
    if kind is None or kind.reads_target or "policy" in kind.needs(spec):
        known = ", ".join(name for name, one in REWARDS.items() if not one.reads_target)
        raise ValueError(
            f"{where}.weight is {LEARNED!r}: validation rows decide it before training starts. That works only for "
            f"rewards of fixed models that do not read the target ({known}); give a number here."
        )
