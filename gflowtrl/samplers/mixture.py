"""Several sources in one group, with fixed, scheduled or measured shares; and samplers by name."""

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
from .observed import InteractionLogSampler, UnobservedSampler
from .replay import ReplaySampler
from .sampler import Feedback, Sampler, Trajectories, check_state, over_processes
from .schedule import Schedule


T = TypeVar("T")


class MixtureSampler(Sampler):
    """Divides the K trajectories of every prompt among several samplers.

    The division is fixed, not drawn: shares by largest remainder (ties to the earlier source), slots in the given
    order. `{"ground_truth": 1, "collaborative": 3, "on_policy": 4}` with K = 8 gives exactly 1, 3 and 4. Each source
    draws from a random stream of its own, so two samplers of one kind do not repeat each other. A mixture may hold
    mixtures; their sources are called "outer/inner", and so are the entries of state and metrics.

    Args:
        sources: `{name: weight}` for samplers known by name, or `{any name: (spec, weight)}` with what `build_sampler`
            takes, a `Sampler` for example.
        build: makes a sampler of a spec; by default `build_sampler` without a teacher.
    """

    def __init__(self, sources: Mapping[str, Any], *, build: Callable[[Any], Sampler] | None = None):
        _check_sources(sources)
        pairs = {name: entry if isinstance(entry, list | tuple) else (name, entry) for name, entry in sources.items()}
        for name, pair in pairs.items():
            if len(pair) != 2:
                raise ValueError(
                    f"The source {name!r} of a mixture must be a weight or a pair [spec, weight], got {pair!r}."
                )
        self.weights = _checked_weights({name: weight for name, (_, weight) in pairs.items()})
        self.samplers = {name: (build or build_sampler)(spec) for name, (spec, _) in pairs.items()}
        self.source_names = tuple(
            name if len(sampler.source_names) == 1 else f"{name}/{inner}"
            for name, sampler in self.samplers.items()
            for inner in sampler.source_names
        )

    def _with_first_source(self) -> Iterator[tuple[Sampler, int]]:
        """The samplers, each with the number of its first source."""
        first_source = 0
        for sampler in self.samplers.values():
            yield sampler, first_source
            first_source += len(sampler.source_names)

    @property
    def observes_group(self) -> bool:
        return any(sampler.observes_group for sampler in self.samplers.values())

    def allocate(self, num_generations: int) -> list[int]:
        """How many of K trajectories each source gets."""
        weights = [Fraction(weight) for weight in self.weights]  # exact, so that ties are ties
        shares = [num_generations * weight / sum(weights) for weight in weights]
        counts = [math.floor(share) for share in shares]
        by_remainder = sorted(range(len(shares)), key=lambda i: counts[i] - shares[i])
        for i in by_remainder[: num_generations - sum(counts)]:
            counts[i] += 1
        return counts

    def sample(
        self, step: Step, policy: TreePolicy, reward: StepReward | None, num_generations: int, noise: Noise
    ) -> Trajectories:
        drawn, counts = [], self.allocate(num_generations)
        for name, (sampler, first_source), count in zip(self.samplers, self._with_first_source(), counts, strict=True):
            if count:
                part = sampler.sample(step, policy, reward, count, noise.named(name))
                drawn.append(replace(part, source=part.source + first_source))
        known = all(part.log_q is not None for part in drawn)
        return Trajectories(
            torch.cat([part.leaves for part in drawn], 1),
            torch.cat([part.source for part in drawn], 1),
            torch.cat([part.log_q for part in drawn], 1) if known else None,
        )

    # ------------------------------------------------------------------------------------------------ handed to parts
    def observe(self, step: Step, trajectories: Trajectories, feedback: Feedback) -> None:
        """Tells every source of its own trajectories, or of all where it `observes_group`."""
        for sampler, first_source in self._with_first_source():
            told, heard = replace(trajectories, source=trajectories.source - first_source), feedback
            if not sampler.observes_group:
                own = _own(told.source, sampler)[0].nonzero()[:, 0]  # the same places in every row
                told, heard = told.columns(own), heard.columns(own)
            if told.leaves.shape[1]:
                sampler.observe(step, told, heard)

    def state_dict(self) -> dict[str, Tensor]:
        return _flat({name: sampler.state_dict() for name, sampler in self.samplers.items()})

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        own = {name: {} for name in self.samplers}
        for entry, tensor in state.items():
            # A name may itself hold a slash: the longest that fits is meant.
            owner = max((name for name in own if entry.startswith(f"{name}/")), key=len, default="")
            if not owner:
                check_state(self, state, self.state_dict())
            own[owner][entry.removeprefix(f"{owner}/")] = tensor
        for name, sampler in self.samplers.items():
            sampler.load_state_dict(own[name])

    def metrics(self) -> dict[str, float]:
        return _flat({name: sampler.metrics() for name, sampler in self.samplers.items()})


class ScheduledMixtureSampler(MixtureSampler):
    """A mixture whose weights follow the progress of the training, linearly between given points.

    Args:
        schedule: `[(progress, {name: weight}), ...]`; a source that a point does not name has weight 0 there.
            `[(0, {"ground_truth": 1, "collaborative": 7}), (1, {"ground_truth": 1, "on_policy": 7})]` begins with
            the teacher's items and ends with the policy's.
        sources: `{name: spec}` for names that are not known samplers, or have options.
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
                f"The schedule of ScheduledMixtureSampler must be a list of pairs [progress, {{name: weight}}], got "
                f"{schedule!r}."
            )
        names = list(dict.fromkeys(name for _, weights in points for name in weights))
        specs = dict(zip(names, names, strict=True)) | dict(_check_sources(sources or {}))
        for name in specs:
            if name not in names:
                raise ValueError(f"The schedule of ScheduledMixtureSampler never names the source {name!r}.")
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
        """The parts' metrics, and `weight/SOURCE`, the shares of the last step."""
        return {**super().metrics(), **_shares(self)}


class AdaptiveMixtureSampler(MixtureSampler):
    """A mixture that gives more trajectories to the sources whose trajectories the policy balances worst.

    A source's r is the running mean of |log Z + log pi - log R| over its trajectories. With given weights w of m
    sources, its share is

        floor + (1 - m * floor) * w r / (sum of w r over the sources),

    divided as in every mixture. Before anything is measured r is taken to be equal. A source that got no trajectory in
    a step is taken to be average (its running mean moves towards the mean of the measured ones), so that one low
    measurement does not shut it out. A source that shall keep a fixed share, such as the ground truth, goes into a
    mixture around this one: `{"ground_truth": (..., 1), "rest": (AdaptiveMixtureSampler(...), 7)}`.

    Residuals are summed over processes, which therefore agree on the shares.

    Args:
        sources, build: as of `MixtureSampler`; all weights > 0.
        floor: the smallest share of a source, in [0, 1 / m). One of K trajectories is sure where floor * K >= 1.
        decay: weight of the past in the running mean, in [0, 1); 0.95 forgets over about 20 steps.
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
                f"The weights of AdaptiveMixtureSampler must be > 0, got {self.weights}; leave unused sources out."
            )
        check_number("The floor of AdaptiveMixtureSampler", floor, SHARE)
        check_number("The decay of AdaptiveMixtureSampler", decay, SHARE_BELOW_ONE)
        if not floor * count < 1:
            raise ValueError(
                f"The floor of AdaptiveMixtureSampler with {count} sources must be in [0, {1 / count:g}), got {floor}."
            )
        self.base_weights, self.floor, self.decay = list(self.weights), floor, decay
        self.residuals = torch.zeros(0, dtype=torch.float64)  # running mean of each source; empty: not measured yet
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
        """Mean residual of each source over the step's trajectories on all processes: `(m,)`, NaN for none."""
        sums = []
        for sampler, first_source in self._with_first_source():
            own = _own(source - first_source, sampler) & residual.isfinite()
            sums.append(torch.stack([residual[own].sum(), own.double().sum()]))
        total, count = over_processes(torch.stack(sums)).cpu().unbind(1)
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
                f"The saved AdaptiveMixtureSampler has {len(residuals)} sources, this one has {len(self.samplers)}: "
                f"the checkpoint was written with another sampler. Resume with that one, or start afresh."
            )
        super().load_state_dict({name: tensor for name, tensor in state.items() if name != "residuals"})
        self.residuals = residuals
        self._set_weights()

    def metrics(self) -> dict[str, float]:
        """The parts' metrics, `weight/SOURCE` and `residual/SOURCE`: shares and running means after the last step."""
        residuals = zip(self.samplers, self.residuals.tolist(), strict=False)  # none before the first measurement
        return {**super().metrics(), **_shares(self), **{f"residual/{name}": value for name, value in residuals}}


def _flat(parts: Mapping[str, Mapping[str, T]]) -> dict[str, T]:
    """The entries of all parts under "part/entry"."""
    return {f"{name}/{entry}": value for name, entries in parts.items() for entry, value in entries.items()}


def _own(source: Tensor, sampler: Sampler) -> Tensor:
    """Where the sources, counted from a sampler's first one, are its own: bool, of the same shape."""
    return (source >= 0) & (source < len(sampler.source_names))


def _shares(mixture: MixtureSampler) -> dict[str, float]:
    total = sum(mixture.weights)
    return {f"weight/{name}": w / total for name, w in zip(mixture.samplers, mixture.weights, strict=True)}


def _checked_weights(weights: Mapping[str, float]) -> list[float]:
    for name, weight in weights.items():
        if isinstance(weight, bool) or not isinstance(weight, int | float):
            raise ValueError(
                f"The weight of the source {name!r} must be a number, got {weight!r}. A source with options is "
                f"written as a pair: {{{name!r}: [{{'type': ..., option: ...}}, weight]}}."
            )
    values = [float(weight) for weight in weights.values()]
    if not any(values) or not all(math.isfinite(value) and value >= 0 for value in values):
        raise ValueError(f"The weights of a mixture must be >= 0, finite and not all zero, got {values}.")
    return values


def _check_sources(sources: Any) -> Mapping[str, Any]:
    if not isinstance(sources, Mapping):
        raise ValueError(f"The sources of a mixture must be names with weights or samplers, got {sources!r}.")
    return sources


# ----------------------------------------------------------------------------------------------------------- by name
SAMPLERS: dict[str, type[Sampler]] = {
    "ground_truth": GroundTruthSampler,
    "on_policy": OnPolicySampler,
    "collaborative": CollaborativeSampler,
    "uniform": UniformSampler,
    "reward": RewardSampler,
    "interaction_log": InteractionLogSampler,
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
    """A sampler from what a recipe says.

    Args:
        spec: a name of `SAMPLERS`; a name with options `{"type": name, option: value, ...}`; a mixture
            `{name: weight}` or `{any name: [spec, weight]}`; a sampler, its class, or a function (see
            `FunctionSampler`). The options `fallback` of "replay" and `sources` of the mixtures hold specs in turn.
        teacher: of the samplers that need one.
        temperature, epsilon: of "on_policy"; the first of "stochastic_beam" too. Options of the spec go before.
        teacher_temperature: of "collaborative".

    Raises:
        ValueError, TypeError: an unknown name or option, a bad value, a missing teacher; the error names it.
    """
    if isinstance(spec, Sampler):
        return spec
    if isinstance(spec, type) and issubclass(spec, Sampler):
        return spec()
    build = partial(
        build_sampler, teacher=teacher, temperature=temperature, epsilon=epsilon,
        teacher_temperature=teacher_temperature,
    )  # fmt: skip
    if isinstance(spec, Mapping) and not isinstance(spec.get("type"), str):
        return MixtureSampler(spec, build=build)
    if callable(spec):
        return FunctionSampler(spec)
    options: dict[str, Any] = dict(spec) if isinstance(spec, Mapping) else {"type": spec}
    name = options.pop("type")
    _check_options(name, options, teacher)
    given = {"teacher": teacher, "build": build} | {
        "on_policy": {"temperature": temperature, "epsilon": epsilon},
        "stochastic_beam": {"temperature": temperature},
        "collaborative": {"temperature": teacher_temperature},
    }.get(name, {})
    if name == "replay":
        options["fallback"] = build(options.get("fallback", "on_policy"))
    parameters = inspect.signature(SAMPLERS[name]).parameters
    return SAMPLERS[name](**{option: value for option, value in given.items() if option in parameters} | options)


def uses_teacher(spec: Any) -> bool:
    """Whether `build_sampler(spec)` needs a teacher."""
    try:
        build_sampler(spec)
    except _MissingTeacher:
        return True
    return False


def _check_options(name: object, options: Mapping[str, Any], teacher: Any) -> None:
    """Refuse an unknown sampler, options that it does not have, and to leave out what it needs."""
    if not isinstance(name, str) or name not in SAMPLERS:
        raise ValueError(f"Unknown sampler {name!r}; known are {sorted(SAMPLERS)}.")
    parameters = inspect.signature(SAMPLERS[name]).parameters
    known = {key: parameter.default for key, parameter in parameters.items() if key not in ("teacher", "build")}
    for option in options:
        if option not in known:
            raise ValueError(f"The sampler {name!r} has no option {option!r}; it has {', '.join(known) or 'none'}.")
    for option, default in known.items():
        if option not in options and default is inspect.Parameter.empty:
            raise ValueError(f"The sampler {name!r} needs the option {option!r}.")
    if "teacher" in parameters and teacher is None:
        raise _MissingTeacher(
            f"The sampler {name!r} needs a teacher: give one, or a {SAMPLERS[name].__name__}(teacher)."
        )
