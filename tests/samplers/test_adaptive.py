"""Mixtures with changing shares, calls from a mixture to its samplers, and samplers by name and options."""

import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gflowtrl.data import Step
from gflowtrl.policy import StatelessNoise
from gflowtrl.samplers import (
    SAMPLERS,
    AdaptiveMixtureSampler,
    Feedback,
    MixtureSampler,
    OnPolicySampler,
    ReplaySampler,
    Sampler,
    ScheduledMixtureSampler,
    Trajectories,
    UniformSampler,
    build_sampler,
    mixture,
    uses_teacher,
)
from gflowtrl.samplers.schedule import Schedule


POLICY = SimpleNamespace(catalog=SimpleNamespace(tree=SimpleNamespace(num_leaves=50)))
STEP = Step(
    prompts={"input_ids": torch.zeros(2, 1, dtype=torch.long)},
    row_ids=torch.tensor([4, 9]),
    target_leaves=torch.tensor([1, 2]),
    columns={},
)


def draw(sampler, num, progress=0.0, step=0):
    noise = StatelessNoise(42).at(step, STEP.row_ids)
    return sampler.sample(replace(STEP, progress=progress), POLICY, None, num, noise)


def feedback_of(values):
    return Feedback(log_rewards=values, residual=values, log_pi=-values)


# ----------------------------------------------------------------------------------------------------------- schedules
def test_schedule_is_piecewise_linear():
    schedule = Schedule([(0.2, (0, 4)), (0.6, (2, 4)), (0.6, (10, 0)), (1.0, (10, 1))], "x")
    table = {0.0: (0, 4), 0.2: (0, 4), 0.3: (0.5, 4), 0.5: (1.5, 4), 0.6: (10, 0), 0.8: (10, 0.5), 1.0: (10, 1)}
    for progress, expected in table.items():
        assert schedule.at(progress).tolist() == pytest.approx(expected), progress


def test_scheduled_shares():
    sampler = ScheduledMixtureSampler(
        [(0.0, {"ground_truth": 1, "uniform": 7}), (1.0, {"ground_truth": 1, "other": 7})], {"other": UniformSampler()}
    )
    assert sampler.source_names == ("ground_truth", "uniform", "other")
    counts = {}
    for progress in (0.0, 0.25, 0.5, 0.75, 0.999):
        drawn = draw(sampler, 8, progress)
        counts[progress] = torch.bincount(drawn.source[0], minlength=3).tolist()
        shares = [1 / 8, (1 - progress) * 7 / 8, progress * 7 / 8]
        weights = [sampler.metrics()[f"weight/{name}"] for name in sampler.source_names]
        assert weights == pytest.approx(shares)
        assert all(abs(n - 8 * share) < 1 for n, share in zip(counts[progress], shares, strict=True))
    assert counts[0.0] == [1, 7, 0] and counts[0.999] == [1, 0, 7]
    assert torch.equal(draw(sampler, 8, 0.25).leaves, draw(sampler, 8, 0.25).leaves)
    assert sampler.state_dict() == {}


# ------------------------------------------------------------------------------------------------------------ adaptive
def adaptive(floor=0.1, decay=0.5, weights=(1, 1, 1)):
    names = zip("abc", weights, strict=True)
    return AdaptiveMixtureSampler({name: (UniformSampler(), weight) for name, weight in names}, floor, decay)


def observe(sampler, source, residual):
    source = torch.as_tensor(source)
    residual = torch.as_tensor(residual, dtype=torch.float32).expand(source.shape)
    sampler.observe(STEP, Trajectories(torch.zeros_like(source), source), feedback_of(residual))


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    st.lists(st.lists(st.floats(0, 1e6, width=32), min_size=6, max_size=6), min_size=1, max_size=6),
    st.floats(0, 0.33),
    st.floats(0, 0.99),
    st.lists(st.sampled_from([0.5, 1.0, 3.0]), min_size=3, max_size=3),
)
def test_shares_follow_the_formula(steps, floor, decay, weights):
    """Compares with running means and shares in plain Python. Shares are never below the floor."""
    sampler, means = adaptive(floor, decay, weights), None
    for residual in steps:
        observe(sampler, [[0, 0, 1, 2, 2, 2]], [residual])
        new = [sum(residual[:2]) / 2, residual[2], sum(residual[3:]) / 3]
        means = new if means is None else [decay * m + (1 - decay) * n for m, n in zip(means, new, strict=True)]
        parts = [w * m for w, m in zip(weights, means, strict=True)] if any(means) else weights
        expected = [floor + (1 - 3 * floor) * part / sum(parts) for part in parts]
        assert sampler.weights == pytest.approx(expected, rel=1e-5, abs=1e-7)
        assert min(sampler.weights) >= floor - 1e-12 and sum(sampler.weights) == pytest.approx(1)
    metrics = sampler.metrics()
    assert [metrics[f"residual/{name}"] for name in "abc"] == pytest.approx(means, rel=1e-5)
    assert [metrics[f"weight/{name}"] for name in "abc"] == pytest.approx(sampler.weights)


def test_shares_move_to_the_source_with_the_larger_residual():
    sampler = adaptive()
    assert sampler.weights == pytest.approx([1 / 3] * 3) and sampler.allocate(6) == [2, 2, 2]
    shares = []
    for _ in range(12):
        observe(sampler, [[0, 1, 2]] * 2, [[1.0, 8.0, 1.0]] * 2)
        shares.append(list(sampler.weights))
        observe(sampler, [[0, 1, 2]] * 2, [[1.0, 1.0, 1.0]] * 2) if len(shares) == 1 else None
    assert shares[0][1] > 1 / 3
    rising = [share[1] for share in shares[1:]]
    assert all(a < b for a, b in zip(rising, rising[1:], strict=False))
    assert rising[-1] == pytest.approx(0.1 + 0.7 * 0.8, abs=1e-2)
    assert sampler.allocate(10)[0] >= 1  # floor * K = 1
    drawn = draw(sampler, 10)
    assert torch.bincount(drawn.source[0], minlength=3).tolist() == sampler.allocate(10) == [2, 6, 2]


def test_a_source_without_trajectories_is_treated_as_average():
    sampler = adaptive(floor=0.0, decay=0.5)
    observe(sampler, [[0, 1, 2]], [[3.0, 3.0, 0.0]])
    assert sampler.weights == pytest.approx([0.5, 0.5, 0.0])
    observe(sampler, [[0, 1, 1]], [[3.0, 3.0, 3.0]])
    assert sampler.residuals.tolist() == [3.0, 3.0, 1.5]


def test_non_finite_and_foreign_residuals_are_ignored():
    sampler = adaptive()
    observe(sampler, [[0, 1, 2]], [[1.0, 2.0, 4.0]])
    before = list(sampler.weights)
    observe(sampler, [[0, 1, 2]], [[math.inf, math.inf, math.nan]])
    assert sampler.weights == before
    observe(sampler, [[3, -1, 7]], [[5.0, 5.0, 5.0]])  # trajectories of other samplers in an outer mixture
    assert sampler.weights == before


def test_residuals_are_summed_over_processes(monkeypatch):
    """Sums and counts are added before the division. A second process has 3 trajectories with a sum of 30."""
    other = torch.tensor([[30.0, 3.0], [0.0, 0.0], [0.0, 0.0]], dtype=torch.float64)
    monkeypatch.setattr(mixture, "sum_over_processes", lambda values: values + other)
    sampler = adaptive()
    observe(sampler, [[0, 1, 2]], [[2.0, 5.0, 6.0]])
    assert sampler.residuals.tolist() == [8.0, 5.0, 6.0]


def test_nested_sources_are_measured_together():
    inner = MixtureSampler({"x": (UniformSampler(), 1), "y": (UniformSampler(), 1)})
    sampler = AdaptiveMixtureSampler({"inner": (inner, 1), "z": (UniformSampler(), 1)}, decay=0.0)
    observe(sampler, [[0, 1, 2]], [[1.0, 3.0, 8.0]])
    assert sampler.residuals.tolist() == [2.0, 8.0]


def test_a_resumed_run_equals_an_uninterrupted_run():
    def run(sampler, steps):
        drawn = []
        for step in steps:
            group = draw(sampler, 9, step=step)
            sampler.observe(STEP, group, feedback_of((group.leaves * (group.source + 1)).float() / 10))
            drawn.append(group.leaves)
        return drawn

    def fresh():
        replay = ReplaySampler(4, fallback=UniformSampler())
        return AdaptiveMixtureSampler({"a": (UniformSampler(), 1), "replay": (replay, 1), "c": (UniformSampler(), 1)})

    whole, first, second = fresh(), fresh(), fresh()
    expected = run(whole, range(8))
    run(first, range(4))
    second.load_state_dict(first.state_dict())
    assert second.weights == first.weights
    for a, b in zip(expected[4:], run(second, range(4, 8)), strict=True):
        assert torch.equal(a, b)
    assert second.weights == whole.weights and second.metrics() == whole.metrics()
    unmeasured = fresh()
    unmeasured.load_state_dict(fresh().state_dict())
    assert unmeasured.weights == fresh().weights


# -------------------------------------------------------------------------------------------------- calls of the parts
class Recorder(Sampler):
    def __init__(self, names=("recorder",), observes_group=False):
        self.source_names, self.observes_group, self.observed = names, observes_group, []

    def sample(self, step, policy, reward, num_generations, noise):
        source = torch.arange(num_generations).remainder(len(self.source_names)).expand(2, -1)
        return Trajectories(torch.zeros_like(source), source, torch.zeros(source.shape))

    def observe(self, step, trajectories, feedback):
        self.observed.append((trajectories, feedback))

    def state_dict(self):
        return {"x": torch.tensor([float(len(self.observed))])}

    def load_state_dict(self, state):
        self.loaded = state

    def metrics(self):
        return {"calls": float(len(self.observed))}


def test_each_source_of_a_mixture_observes_its_own_trajectories():
    one, two, group, idle = Recorder(), Recorder(("p", "q")), Recorder(observes_group=True), Recorder()
    inner = MixtureSampler({"two": (two, 2), "group": (group, 1)})
    sampler = MixtureSampler({"one": (one, 1), "idle": (idle, 0), "inner": (inner, 3)})
    drawn = draw(sampler, 8)
    assert drawn.source.tolist() == [[0, 0, 2, 3, 2, 3, 4, 4]] * 2
    values = torch.arange(16.0).view(2, 8)
    sampler.observe(STEP, drawn, feedback_of(values))
    assert not idle.observed
    for recorder, columns, first in ((one, slice(0, 2), 0), (two, slice(2, 6), 2), (group, slice(0, 8), 4)):
        ((trajectories, feedback),) = recorder.observed
        assert torch.equal(trajectories.source, drawn.source[:, columns] - first)
        assert torch.equal(trajectories.leaves, drawn.leaves[:, columns])
        assert trajectories.log_q.shape == trajectories.leaves.shape
        assert torch.equal(feedback.residual, values[:, columns])
        assert torch.equal(feedback.log_pi, -values[:, columns])
    assert sampler.metrics() == {
        "one/calls": 1.0, "idle/calls": 0.0, "inner/two/calls": 1.0, "inner/group/calls": 1.0,
    }  # fmt: skip
    state = sampler.state_dict()
    assert sorted(state) == ["idle/x", "inner/group/x", "inner/two/x", "one/x"]
    sampler.load_state_dict(state)
    assert two.loaded == {"x": state["inner/two/x"]} and idle.loaded == {"x": state["idle/x"]}


def test_stateless_samplers_have_an_empty_state():
    sampler = MixtureSampler({"uniform": 1, "ground_truth": 1})
    sampler.observe(STEP, draw(sampler, 4), feedback_of(torch.zeros(2, 4)))
    assert sampler.state_dict() == {} and sampler.metrics() == {}
    sampler.load_state_dict({})


# ------------------------------------------------------------------------------------------------------------- by name
OPTIONS = {
    "ground_truth": {}, "on_policy": {"temperature": 2.0}, "collaborative": {"temperature": 0.5}, "uniform": {},
    "reward": {"temperature": 2.0}, "interaction_log": {"column": "clicks"}, "unobserved": {}, "history": {},
    "curriculum": {"pool_size": 9, "pool": "teacher", "schedule": [[0, 0.2], [0.8, 1.0]]}, "beam": {},
    "stochastic_beam": {"temperature": 1.5}, "low_confidence": {"pool_size": 7},
    "replay": {"capacity": 8, "recent_share": 0.25, "temperature": 2.0, "fallback": {"uniform": 1}},
    "scheduled_mixture": {
        "schedule": [[0, {"collaborative": 1}], [1, {"hot": 1, "collaborative": 1}]],
        "sources": {"hot": {"type": "on_policy", "temperature": 3.0}},
    },
    "adaptive_mixture": {"sources": {"curriculum": 2, "hot": [{"type": "on_policy"}, 1]}, "floor": 0.2, "decay": 0.5},
}  # fmt: skip


def test_every_sampler_by_name_and_options():
    assert OPTIONS.keys() == SAMPLERS.keys()
    samplers = build_sampler(
        {name: [{"type": name, **options}, 1] for name, options in OPTIONS.items()}, teacher=lambda histories: None
    ).samplers
    for name, options in OPTIONS.items():
        assert type(samplers[name]) is SAMPLERS[name]
        for option in options.keys() & {"temperature", "capacity", "recent_share", "column", "floor", "decay"}:
            owner = samplers[name].distribution if name == "collaborative" else samplers[name]
            assert getattr(owner, option) == options[option]
    assert samplers["curriculum"].pool.size == 9 and samplers["low_confidence"].pool.size == 7
    assert samplers["scheduled_mixture"].samplers["hot"].temperature == 3.0
    assert list(samplers["adaptive_mixture"].samplers) == ["curriculum", "hot"]
    assert isinstance(samplers["replay"].fallback, MixtureSampler)


def test_options_of_the_trainer_are_defaults_of_the_samplers():
    spec = {name: 1 for name in ("on_policy", "stochastic_beam", "replay", "collaborative")}
    spec["custom"] = [{"type": "on_policy", "epsilon": 0}, 1]
    parts = build_sampler(spec, lambda histories: None, 2.0, 0.25, 3.0).samplers
    assert (parts["on_policy"].temperature, parts["on_policy"].epsilon) == (2.0, 0.25)
    assert (parts["custom"].temperature, parts["custom"].epsilon) == (2.0, 0)
    assert parts["stochastic_beam"].temperature == 2.0
    assert isinstance(parts["replay"].fallback, OnPolicySampler) and parts["replay"].fallback.temperature == 2.0
    assert parts["collaborative"].distribution.temperature == 3.0


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ("on_policy", False),
        ({"ground_truth": 1, "replay": 1}, False),
        ("curriculum", True),
        ({"ground_truth": 1, "far": [{"type": "low_confidence"}, 1]}, True),
        ({"type": "replay", "fallback": "collaborative"}, True),
        ({"type": "scheduled_mixture", "schedule": [[0, {"uniform": 1}], [1, {"collaborative": 1}]]}, True),
    ],
)
def test_uses_teacher(spec, expected):
    assert uses_teacher(spec) is expected


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: build_sampler("beams"), r"Unknown sampler 'beams'; choose from \['adaptive_mixture', 'beam', "),
        (lambda: build_sampler(["beam"]), r"Unknown sampler \['beam'\]"),
        (lambda: build_sampler({"type": "beam", "width": 3}), "'beam' has no option 'width'; its options: none"),
        (lambda: build_sampler({"type": "on_policy", "heat": 3}), "'heat'; its options: temperature, epsilon"),
        (lambda: build_sampler({"type": "curriculum", "teacher": 3}), "'curriculum' has no option 'teacher'"),
        (lambda: build_sampler({"type": "adaptive_mixture"}), "'adaptive_mixture' needs the option 'sources'"),
        (lambda: build_sampler({"type": "adaptive_mixture", "sources": "beam"}), "sources of a mixture are 'beam'"),
        (lambda: build_sampler({"type": "scheduled_mixture"}), "'scheduled_mixture' needs the option 'schedule'"),
        (lambda: build_sampler({"type": "scheduled_mixture", "schedule": [[0, "beam"]]}), "must list pairs .progress"),
        (lambda: build_sampler("low_confidence"), r"needs a teacher; pass a teacher, or a LowConfidenceSampler"),
        (
            lambda: build_sampler({"x": [{"type": "beam"}]}),
            r"'x' of a mixture is \[\{'type': 'beam'\}\]; it must be a weight or a pair \[spec, weight\]",
        ),
        (
            lambda: build_sampler({"x": {"type": "beam"}}),
            r"weight of the source 'x' is \{'type': 'beam'\}; it must be",
        ),
        (lambda: build_sampler({"beam": "1"}), "weight of the source 'beam' is '1'; it must be a number"),
        (lambda: build_sampler({}), r"weights of a mixture are \[\]; they must be finite, >= 0 and not all zero"),
        (lambda: ScheduledMixtureSampler([(0, {"beam": 0})]), r"weights of a mixture are \[0.0\]"),
        (lambda: ScheduledMixtureSampler([(0.5, {"beam": 1}), (0.1, {"beam": 2})]), r"must ascend within \[0, 1\]"),
        (lambda: ScheduledMixtureSampler([(0, {"beam": 1})], {"x": UniformSampler()}), "source 'x' .* does not occur"),
        (lambda: adaptive(weights=(1, 0, 1)), r"weights of AdaptiveMixtureSampler are \[1.0, 0.0, 1.0\]"),
        (
            lambda: adaptive(floor=0.4),
            "floor of AdaptiveMixtureSampler is 0.4; with 3 sources it must be below 0.3333",
        ),
        (lambda: adaptive(floor=-1), r"floor of AdaptiveMixtureSampler is -1; it must be a number in \[0, 1\]"),
        (lambda: adaptive(decay=1), r"decay of AdaptiveMixtureSampler is 1; it must be a number in \[0, 1\)"),
        (lambda: adaptive().load_state_dict({}), r"has the entries \[\]; it must have \['residuals'\]"),
        (lambda: adaptive().load_state_dict({"residuals": torch.ones(2)}), "has 2 sources, but this one has 3"),
        (lambda: MixtureSampler({"uniform": 1}).load_state_dict({"y/x": torch.ones(1)}), "entries .'y/x'.; it must"),
        (
            lambda: MixtureSampler({"uniform": 1}).load_state_dict({"uniform/x": torch.ones(1)}),
            "of UniformSampler has",
        ),
    ],
)
def test_invalid_options_raise_errors(make, message):
    with pytest.raises(ValueError, match=message):
        make()
