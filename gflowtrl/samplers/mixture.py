"""Mixtures of samplers with fixed, scheduled or adaptive shares, and the construction of samplers by name."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from fractions import Fraction
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor

from gflowtrl.checks import SHARE, SHARE_BELOW_ONE, check_number
from gflowtrl.data import Step
from gflowtrl.policy import Noise, TreePolicy
from gflowtrl.rewards import StepReward

from .basic import (
    CollaborativeSampler,
    FunctionSampler,
    GroundTruthSampler,
    OnPolicySampler,
    RewardSampler,
    UniformSampler,
)
from .beam import BeamSampler, StochasticBeamSampler
from .curriculum import CurriculumSampler, LowConfidenceSampler
from .observed import HistorySampler, InteractionLogSampler, UnobservedSampler
from .replay import ReplaySampler
from .sampler import Feedback, Sampler, Trajectories, check_form, check_state, sum_over_processes
from .schedule import Schedule


T = TypeVar("T")


class MixtureSampler(Sampler):
    """Divides the K trajectories of every prompt among several samplers.

    The division is deterministic: the shares are rounded by the largest remainder method (ties go to the earlier
    source), and the trajectories are in the order of the sources. For example, K = 8 with
    `{"ground_truth": 1, "collaborative": 3, "on_policy": 4}` gives exactly 1, 3 and 4. Each source has its own random
    stream, so two samplers of the same kind do not draw the same leaves. Mixtures can be nested. The sources of an
    inner mixture, and its entries in state and metrics, are named "outer/inner".

    Args:
        sources: `{name: weight}` for samplers with a registered name, or `{any name: (spec, weight)}` with a spec for
            `build_sampler`, for example a `Sampler`.
        build: function that makes a sampler from a spec. The default is `build_sampler` without a teacher.
    """

    def __init__(self, sources: Mapping[str, Any], *, build: Callable[[Any], Sampler] | None = None):
        _check_sources(sources)
        pairs = {name: entry if isinstance(entry, list | tuple) else (name, entry) for name, entry in sources.items()}
        for name, pair in pairs.items():
            if len(pair) != 2:
                raise ValueError(
                    f"The source {name!r} of a mixture is {pair!r}; it must be a weight or a pair [spec, weight]."
                )
        self.weights = _checked_weights({name: weight for name, (_, weight) in pairs.items()})
        self.samplers = {name: (build or build_sampler)(spec) for name, (spec, _) in pairs.items()}
        self.source_names = tuple(
            name if len(sampler.source_names) == 1 else f"{name}/{inner}"
            for name, sampler in self.samplers.items()
            for inner in sampler.source_names
        )

    def _with_first_source(self) -> Iterator[tuple[Sampler, int]]:
        """Yield each sampler with the index of its first source."""
        first_source = 0
        for sampler in self.samplers.values():
            yield sampler, first_source
            first_source += len(sampler.source_names)

    @property
    def observes_group(self) -> bool:
        return any(sampler.observes_group for sampler in self.samplers.values())

    @property
    def needs_all_rewards(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        return any(sampler.needs_all_rewards for sampler in self.samplers.values())

    def allocate(self, num_generations: int) -> list[int]:
        """Return the number of trajectories of each source, with a total of K."""
        weights = [Fraction(weight) for weight in self.weights]  # exact, so that ties are detected
        shares = [num_generations * weight / sum(weights) for weight in weights]
        counts = [math.floor(share) for share in shares]
        by_remainder = sorted(range(len(shares)), key=lambda i: counts[i] - shares[i])
        for i in by_remainder[: num_generations - sum(counts)]:
            counts[i] += 1
        return counts

    def sample(
        self, step: Step, policy: TreePolicy, reward: StepReward | None, num_generations: int, noise: Noise
    ) -> Trajectories:
        parts, counts = [], self.allocate(num_generations)
        for name, (sampler, first_source), count in zip(self.samplers, self._with_first_source(), counts, strict=True):
            if count:
                part = sampler.sample(step, policy, reward, count, noise.named(name))
                check_form(part, len(step), count)
                parts.append(replace(part, source=part.source + first_source))
        known = all(part.log_q is not None for part in parts)
        return Trajectories(
            torch.cat([part.leaves for part in parts], 1),
            torch.cat([part.source for part in parts], 1),
            torch.cat([part.log_q for part in parts], 1) if known else None,
        )

    # ---------------------------------------------------------------------------------------------- calls of the parts
    def observe(self, step: Step, trajectories: Trajectories, feedback: Feedback) -> None:
        """Pass each sampler its own trajectories, or the whole group if it sets `observes_group`."""
        for sampler, first_source in self._with_first_source():
            part, part_feedback = replace(trajectories, source=trajectories.source - first_source), feedback
            if not sampler.observes_group:
                columns = _is_source_of(sampler, part.source)[0].nonzero()[:, 0]  # the same columns in every row
                part, part_feedback = part.columns(columns), feedback.columns(columns)
            if part.leaves.shape[1]:
                sampler.observe(step, part, part_feedback)

    def state_dict(self) -> dict[str, Tensor]:
        return _flatten({name: sampler.state_dict() for name, sampler in self.samplers.items()})

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        states = {name: {} for name in self.samplers}
        for entry, tensor in state.items():
            # Names can contain slashes, so the longest matching name is the right one.
            owner = max((name for name in states if entry.startswith(f"{name}/")), key=len, default="")
            if not owner:
                check_state(self, state, self.state_dict())
            states[owner][entry.removeprefix(f"{owner}/")] = tensor
        for name, sampler in self.samplers.items():
            sampler.load_state_dict(states[name])

    def metrics(self) -> dict[str, float]:
        return _flatten({name: sampler.metrics() for name, sampler in self.samplers.items()})


class ScheduledMixtureSampler(MixtureSampler):
    """A mixture whose weights depend on the progress of the training, with linear interpolation.

    Args:
        schedule: `[(progress, {name: weight}), ...]`. A source that is missing at a point has weight 0 there. For
            example, `[(0, {"ground_truth": 1, "collaborative": 7}), (1, {"ground_truth": 1, "on_policy": 7})]` starts
            with items of the teacher and ends with items of the policy.
        sources: `{name: spec}` for sources with options or without a registered name.
        build: as for `MixtureSampler`.
    """

    def __init__(
        self,
        schedule: Sequence[tuple[float, Mapping[str, float]]],
        sources: Mapping[str, Any] | None = None,
        *,
        build: Callable[[Any], Sampler] | None = None,
    ):
        try:
            points = [(progress, dict(weights)) for progress, weights in schedule]
        except (TypeError, ValueError):
            points = []
        if not points:
            raise ValueError(
                f"The schedule of ScheduledMixtureSampler is {schedule!r}; it must list pairs [progress, "
                f"{{name: weight}}]."
            )
        names = list(dict.fromkeys(name for _, weights in points for name in weights))
        specs = dict(zip(names, names, strict=True)) | dict(_check_sources(sources or {}))
        for name in specs:
            if name not in names:
                raise ValueError(
                    f"The source {name!r} of ScheduledMixtureSampler does not occur in its schedule; add or remove it."
                )
        rows = [_checked_weights({name: weights.get(name, 0) for name in names}) for _, weights in points]
        super().__init__({name: (specs[name], w) for name, w in zip(names, rows[0], strict=True)}, build=build)
        pairs = [(progress, row) for (progress, _), row in zip(points, rows, strict=True)]
        self.schedule = Schedule(pairs, "ScheduledMixtureSampler")

    def sample(
        self, step: Step, policy: TreePolicy, reward: StepReward | None, num_generations: int, noise: Noise
    ) -> Trajectories:
        self.weights = self.schedule.at(step.progress).tolist()
        return super().sample(step, policy, reward, num_generations, noise)

    def metrics(self) -> dict[str, float]:
        """Return the metrics of the sources, and `weight/SOURCE`, the shares of the last step."""
        return {**super().metrics(), **_share_metrics(self)}


class AdaptiveMixtureSampler(MixtureSampler):
    """A mixture that draws more trajectories from the sources with the largest balance residuals.

    The residual r of a source is the running mean of |log Z + log pi - log R| over its trajectories. For m sources
    with weights w, the share of a source is

        floor + (1 - m * floor) * w r / (sum of w r over the sources),

    and the trajectories are divided as in `MixtureSampler`. Before the first measurement, all r are equal. A source
    without trajectories in a step is treated as average: its running mean moves toward the mean of the measured
    sources, so that a single low measurement does not exclude it. To give a source a fixed share, such as the ground
    truth, put this mixture into another one:
    `{"ground_truth": (..., 1), "rest": (AdaptiveMixtureSampler(...), 7)}`.

    Residuals are summed over all processes, so that all processes use the same shares.

    Args:
        sources, build: as for `MixtureSampler`; all weights must be > 0.
        floor: smallest share of a source, in [0, 1 / m). A source gets at least one of K trajectories if
            floor * K >= 1.
        decay: weight of the past in the running mean, in [0, 1). 0.95 averages over about 20 steps.
    """

    def __init__(
        self,
        sources: Mapping[str, Any],
        floor: float = 0.05,
        decay: float = 0.95,
        *,
        build: Callable[[Any], Sampler] | None = None,
    ):
        super().__init__(sources, build=build)
        count = len(self.samplers)
        if not all(self.weights):
            raise ValueError(
                f"The weights of AdaptiveMixtureSampler are {self.weights}; they must be > 0. Remove unused sources."
            )
        check_number("The floor of AdaptiveMixtureSampler", floor, SHARE)
        check_number("The decay of AdaptiveMixtureSampler", decay, SHARE_BELOW_ONE)
        if not floor * count < 1:
            raise ValueError(
                f"The floor of AdaptiveMixtureSampler is {floor}; with {count} sources it must be below {1 / count:g}."
            )
        self.base_weights, self.floor, self.decay = list(self.weights), floor, decay
        self.residuals = torch.zeros(0, dtype=torch.float64)  # running mean of each source; empty before measurements
        self._set_weights()

    def observe(self, step: Step, trajectories: Trajectories, feedback: Feedback) -> None:
        measured = self._measured(trajectories.source, feedback.residual.double())
        known = ~measured.isnan()
        if known.any():
            measured = torch.where(known, measured, measured[known].mean())
            past = self.residuals if len(self.residuals) else measured
            self.residuals = self.decay * past + (1 - self.decay) * measured
            self._set_weights()
        super().observe(step, trajectories, feedback)

    def _measured(self, source: Tensor, residual: Tensor) -> Tensor:
        """Return the mean residual of each source in this step over all processes, `(m,)`; NaN if not measured."""
        sums = []
        for sampler, first_source in self._with_first_source():
            mask = _is_source_of(sampler, source - first_source) & residual.isfinite()
            sums.append(torch.stack([residual[mask].sum(), mask.double().sum()]))
        total, count = sum_over_processes(torch.stack(sums)).cpu().unbind(1)
        return total / count

    def _set_weights(self) -> None:
        weights = torch.tensor(self.base_weights, dtype=torch.float64)
        if len(self.residuals) and self.residuals.any():
            weights = weights * self.residuals
        self.weights = (self.floor + (1 - len(weights) * self.floor) * weights / weights.sum()).tolist()

    def state_dict(self) -> dict[str, Tensor]:
        return {**super().state_dict(), "residuals": self.residuals.clone()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        if "residuals" not in state:
            check_state(self, state, self.state_dict())
        residuals = state["residuals"].to("cpu", torch.float64, copy=True)
        if len(residuals) not in (0, len(self.samplers)):
            raise ValueError(
                f"The saved AdaptiveMixtureSampler has {len(residuals)} sources, but this one has "
                f"{len(self.samplers)}. Resume with the sampler of the checkpoint, or start a new training."
            )
        super().load_state_dict({name: tensor for name, tensor in state.items() if name != "residuals"})
        self.residuals = residuals
        self._set_weights()

    def metrics(self) -> dict[str, float]:
        """Return the metrics of the sources, `weight/SOURCE` (shares) and `residual/SOURCE` (running means)."""
        residuals = zip(self.samplers, self.residuals.tolist(), strict=False)  # empty before the first measurement
        return {**super().metrics(), **_share_metrics(self), **{f"residual/{name}": r for name, r in residuals}}


def _flatten(parts: Mapping[str, Mapping[str, T]]) -> dict[str, T]:
    """Return the entries of all parts under the keys "part/entry"."""
    return {f"{name}/{entry}": value for name, entries in parts.items() for entry, value in entries.items()}


def _is_source_of(sampler: Sampler, source: Tensor) -> Tensor:
    """Mask of the trajectories of a sampler, given source indices relative to its first source."""
    return (source >= 0) & (source < len(sampler.source_names))


def _share_metrics(mixture: MixtureSampler) -> dict[str, float]:
    total = sum(mixture.weights)
    return {f"weight/{name}": w / total for name, w in zip(mixture.samplers, mixture.weights, strict=True)}


def _checked_weights(weights: Mapping[str, float]) -> list[float]:
    for name, weight in weights.items():
        if isinstance(weight, bool) or not isinstance(weight, int | float):
            raise ValueError(
                f"The weight of the source {name!r} is {weight!r}; it must be a number. Write a source with options "
                f"as a pair: {{{name!r}: [{{'type': ..., option: ...}}, weight]}}."
            )
    values = [float(weight) for weight in weights.values()]
    if not any(values) or not all(math.isfinite(value) and value >= 0 for value in values):
        raise ValueError(f"The weights of a mixture are {values}; they must be finite, >= 0 and not all zero.")
    return values


def _check_sources(sources: Any) -> Mapping[str, Any]:
    if not isinstance(sources, Mapping):
        raise ValueError(f"The sources of a mixture are {sources!r}; they must map names to weights or samplers.")
    return sources


# ----------------------------------------------------------------------------------------------------------- by name
#: A new sampler is a class and a line here.
SAMPLERS: dict[str, type[Sampler]] = {
    "ground_truth": GroundTruthSampler,
    "on_policy": OnPolicySampler,
    "collaborative": CollaborativeSampler,
    "uniform": UniformSampler,
    "reward": RewardSampler,
    "interaction_log": InteractionLogSampler,
    "history": HistorySampler,
    "unobserved": UnobservedSampler,
    "curriculum": CurriculumSampler,
    "beam": BeamSampler,
    "stochastic_beam": StochasticBeamSampler,
    "low_confidence": LowConfidenceSampler,
    "replay": ReplaySampler,
    "scheduled_mixture": ScheduledMixtureSampler,
    "adaptive_mixture": AdaptiveMixtureSampler,
}


class _MissingTeacher(ValueError):
    pass


def build_sampler(
    spec: str | Mapping | Sampler | type[Sampler] | Callable,
    teacher: Any = None,
    temperature: float = 1.0,
    epsilon: float = 0.0,
    teacher_temperature: float = 1.0,
) -> Sampler:
    """Build a sampler from its specification in a recipe.

    Args:
        spec: a name of `SAMPLERS`; a name with options `{"type": name, option: value, ...}`; a mixture
            `{name: weight}` or `{any name: [spec, weight]}`; a sampler, its class, or a function (see
            `FunctionSampler`). The options `fallback` of "replay" and `sources` of the mixtures contain specs too.
        teacher: teacher of the samplers that need one.
        temperature, epsilon: defaults of "on_policy"; the temperature is also the default of "stochastic_beam".
        teacher_temperature: default of "collaborative".

    Raises:
        ValueError, TypeError: an unknown name or option, an invalid value, or a missing teacher. The error names it.
    """
    if isinstance(spec, Sampler):
        return spec
    if isinstance(spec, type) and issubclass(spec, Sampler):
        return spec()
    context: dict[str, Any] = {
        "teacher": teacher, "temperature": temperature, "epsilon": epsilon, "teacher_temperature": teacher_temperature,
    }  # fmt: skip
    context["build"] = partial(build_sampler, **context)
    if isinstance(spec, Mapping) and not isinstance(spec.get("type"), str):
        return MixtureSampler(spec, build=context["build"])
    if callable(spec):
        return FunctionSampler(spec)
    options: dict[str, Any] = dict(spec) if isinstance(spec, Mapping) else {"type": spec}
    name = options.pop("type")
    _check_options(name, options, teacher)
    return SAMPLERS[name].from_spec(options, context)


def uses_teacher(spec: Any) -> bool:
    """Whether `build_sampler(spec)` needs a teacher."""
    try:
        build_sampler(spec)
    except _MissingTeacher:
        return True
    return False


def _check_options(name: object, options: Mapping[str, Any], teacher: Any) -> None:
    """Raise an error for an unknown sampler, an unknown option, a missing option, or a missing teacher."""
    if not isinstance(name, str) or name not in SAMPLERS:
        raise ValueError(f"Unknown sampler {name!r}; choose from {sorted(SAMPLERS)}.")
    parameters = inspect.signature(SAMPLERS[name]).parameters
    known = {key: parameter.default for key, parameter in parameters.items() if key not in ("teacher", "build")}
    for option in options:
        if option not in known:
            raise ValueError(
                f"The sampler {name!r} has no option {option!r}; its options: {', '.join(known) or 'none'}."
            )
    for option, default in known.items():
        if option not in options and default is inspect.Parameter.empty:
            raise ValueError(f"The sampler {name!r} needs the option {option!r}.")
    if "teacher" in parameters and teacher is None:
        raise _MissingTeacher(
            f"The sampler {name!r} needs a teacher; pass a teacher, or a {SAMPLERS[name].__name__}(teacher)."
        )
