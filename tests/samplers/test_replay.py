"""The replay buffer, compared with a naive implementation in plain Python."""

import math
from types import SimpleNamespace

import pytest
import scipy
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from gflowtrl.data import Step
from gflowtrl.policy import StatelessNoise
from gflowtrl.samplers import (
    Feedback,
    FunctionSampler,
    GroundTruthSampler,
    MixtureSampler,
    OnPolicySampler,
    ReplaySampler,
    Trajectories,
    UniformSampler,
    validate_trajectories,
)


NUM_LEAVES = 12
POLICY = SimpleNamespace(catalog=SimpleNamespace(tree=SimpleNamespace(num_leaves=NUM_LEAVES)))


def step_of(ids):
    ids = torch.tensor(list(ids))
    return Step({"input_ids": torch.zeros(len(ids), 1, dtype=torch.long)}, ids, torch.full_like(ids, -1), {})


def feedback_of(log_rewards):
    return Feedback(log_rewards, residual=log_rewards.abs(), log_pi=log_rewards)


def observe(sampler, ids, leaves, log_rewards, source=1):
    leaves = torch.as_tensor(leaves)
    source = torch.as_tensor(source).expand(leaves.shape)
    feedback = feedback_of(torch.as_tensor(log_rewards, dtype=torch.float32))
    sampler.observe(step_of(ids), Trajectories(leaves, source), feedback)


def draw(sampler, num, ids, step_number=0):
    step = step_of(ids)
    drawn = sampler.sample(step, POLICY, None, num, StatelessNoise(42).at(step_number, step.row_ids))
    validate_trajectories(drawn, len(step), num, NUM_LEAVES)
    return drawn


class NaiveBuffers:
    """Buffers as `{row id: [(leaf, log R), ...]}`, most recent first."""

    def __init__(self, capacity):
        self.capacity, self.rows = capacity, {}

    def observe(self, ids, leaves, log_rewards, source):
        for row, new, rewards, sources in zip(ids, leaves, log_rewards, source, strict=True):
            old = self.rows.get(row, [])
            latest = {leaf: reward for leaf, reward in reversed(list(zip(new, rewards, strict=True)))}
            stored = [leaf for leaf, _ in old]
            replayed = {n for n, s in zip(new, sources, strict=True) if s == 0 and n in stored}
            first = [leaf for leaf, s in zip(new, sources, strict=True) if not (s == 0 and leaf in stored)]
            order = list(dict.fromkeys([*first, *stored]))
            known = dict(old) | {leaf: latest[leaf] for leaf in {*first, *replayed}}
            order = [leaf for leaf in order if math.isfinite(known[leaf])]
            half = math.ceil(self.capacity / 2)
            others = sorted(order[half:], key=lambda leaf: -known[leaf])[: self.capacity - half]  # noqa: B023
            self.rows[row] = [(leaf, known[leaf]) for leaf in order if leaf in order[:half] or leaf in others]


def contents(sampler):
    state = sampler.state_dict()
    triples = zip(state["row_ids"].tolist(), state["leaves"].tolist(), state["log_rewards"].tolist(), strict=True)
    return {
        row: [(leaf, reward) for leaf, reward in zip(leaves, rewards, strict=True) if leaf >= 0]
        for row, leaves, rewards in triples
    }


@st.composite
def groups(draw):
    """Draw steps: row ids with repetitions, and K leaves per row, each with a log R and a source.

    A leaf has the same reward within a group, as in a training.
    """
    steps, width = [], draw(st.integers(1, 4))
    for _ in range(draw(st.integers(1, 5))):
        ids = draw(st.lists(st.sampled_from([-(2**40), 3, 5, 7]), min_size=1, max_size=3))
        leaves = [draw(st.lists(st.integers(0, 7), min_size=width, max_size=width)) for _ in ids]
        value = st.sampled_from([-math.inf, -1.0, 0.0, 0.5, 2.0])
        table = [draw(st.lists(value, min_size=8, max_size=8)) for _ in ids]
        rewards = [[row[leaf] for leaf in group] for row, group in zip(table, leaves, strict=True)]
        source = [draw(st.lists(st.integers(-1, 1), min_size=width, max_size=width)) for _ in ids]
        # Each leaf of a group has one source, because the rules for new and for replayed leaves differ.
        source = [[kinds[group.index(leaf)] for leaf in group] for kinds, group in zip(source, leaves, strict=True)]
        steps.append((ids, leaves, rewards, source))
    return steps


@settings(max_examples=50, deadline=None, derandomize=True)
@given(groups(), st.integers(1, 6))
def test_contents_equal_the_naive_buffer(steps, capacity):
    sampler, naive = ReplaySampler(capacity), NaiveBuffers(capacity)
    for ids, leaves, rewards, source in steps:
        observe(sampler, ids, leaves, rewards, source)
        naive.observe(ids, leaves, rewards, source)
    assert contents(sampler) == naive.rows
    stored = sum(map(len, naive.rows.values()))
    assert sampler.metrics() == {"prompts": len(naive.rows), "trajectories": stored / len(naive.rows)}


def test_eviction_by_example():
    """A capacity of 4 keeps the two most recent and the two best of the others. Replaying does not move a leaf."""
    sampler = ReplaySampler(4)
    observe(sampler, [9], [[0, 1, 2]], [[5.0, 1.0, 2.0]])
    observe(sampler, [9], [[3, 4]], [[0.0, 0.0]])
    assert contents(sampler)[9] == [(3, 0.0), (4, 0.0), (0, 5.0), (2, 2.0)]
    observe(sampler, [9], [[0, 4]], [[6.0, 0.5]], source=0)
    assert contents(sampler)[9] == [(3, 0.0), (4, 0.5), (0, 6.0), (2, 2.0)]
    observe(sampler, [9], [[2, 2]], [[2.0, 2.0]])
    assert contents(sampler)[9] == [(2, 2.0), (3, 0.0), (4, 0.5), (0, 6.0)]


# ---------------------------------------------------------------------------------------------------------------- draw
def test_draws_follow_their_distribution():
    """Half of the draws are uniform over the 3 most recent of 5, the other half in proportion to R ** (1 / 2)."""
    sampler = ReplaySampler(5, temperature=2.0)
    observe(
        sampler, [4, 8], [[7, 1, 5, 3, 9], [2, 2, 0, 2, 0]], [[0.0, 1.0, 2.0, 3.0, 0.5], [1.0, 1.0, 0.0, 1.0, 0.0]]
    )
    drawn = draw(sampler, 4001, [8, 4])
    rewarded = torch.tensor([1.0, 0.0]).div(2).softmax(0)
    split = 2001
    recent, by_reward = drawn.leaves[0, :split], drawn.leaves[0, split:]
    for leaves, expected in ((recent, torch.tensor([0.5, 0.5])), (by_reward, rewarded)):
        counts = torch.stack([(leaves == leaf).sum() for leaf in (2, 0)])
        assert scipy.stats.chisquare(counts, expected.double() / expected.double().sum() * len(leaves)).pvalue > 1e-3
    recent, by_reward = drawn.leaves[1, :split], drawn.leaves[1, split:]
    counts = torch.stack([(recent == leaf).sum() for leaf in (7, 1, 5)])
    assert counts.sum() == split and scipy.stats.chisquare(counts).pvalue > 1e-3
    weights = torch.tensor([0.0, 1.0, 2.0, 3.0, 0.5]).div(2).softmax(0)
    counts = torch.stack([(by_reward == leaf).sum() for leaf in (7, 1, 5, 3, 9)])
    assert scipy.stats.chisquare(counts, weights.double() / weights.double().sum() * 2000).pvalue > 1e-3
    torch.testing.assert_close(drawn.log_q[1, :split], torch.full((split,), -math.log(3)))
    index = torch.tensor([[7, 1, 5, 3, 9].index(leaf) for leaf in by_reward.tolist()])
    torch.testing.assert_close(drawn.log_q[1, split:], weights.log()[index])
    assert not drawn.source.any()


@pytest.mark.parametrize(("share", "recent"), [(0.0, 0), (0.3, 2), (0.5, 3), (1.0, 5)])
def test_recent_share(share, recent):
    """One leaf has such a high reward that only the draw by recency returns another leaf."""
    sampler = ReplaySampler(4, share)
    observe(sampler, [1], [[0, 1, 2]], [[0.0, 0.0, 99.0]])
    leaves = draw(sampler, 5, [1]).leaves[0]
    assert (leaves[:recent] < 2).all() and (leaves[recent:] == 2).all()


def test_prompts_without_a_buffer_use_the_fallback():
    sampler = ReplaySampler(4, fallback=UniformSampler())
    observe(sampler, [1, 2], [[3], [5]], [[0.0], [-math.inf]])
    drawn = draw(sampler, 50, [6, 1, 2])
    step = step_of([6, 1, 2])
    alone = UniformSampler().sample(step, POLICY, None, 50, StatelessNoise(42).at(0, step.row_ids))
    assert drawn.source.tolist() == [[1] * 50, [0] * 50, [1] * 50]
    assert torch.equal(drawn.leaves[[0, 2]], alone.leaves[[0, 2]]) and (drawn.leaves[1] == 3).all()
    assert torch.equal(drawn.log_q[[0, 2]], alone.log_q[[0, 2]]) and not drawn.log_q[1].any()


def test_the_fallback_is_called_only_when_needed():
    def never(step, policy, reward, num_generations, noise):
        raise AssertionError("every prompt has a buffer")

    sampler = ReplaySampler(4, fallback=FunctionSampler(never))
    observe(sampler, [1], [[3]], [[0.0]])
    assert draw(sampler, 2, [1]).leaves.tolist() == [[3, 3]]
    assert isinstance(ReplaySampler().fallback, OnPolicySampler)


@pytest.mark.parametrize("ids", [(2,), (5, 1), (3, 1, 2, 5)])
def test_a_row_draws_the_same_in_any_batch(ids):
    sampler = ReplaySampler(6, fallback=UniformSampler())
    every = [1, 2, 3, 5]
    observe(sampler, every[:3], torch.arange(12).view(3, 4), torch.arange(12.0).view(3, 4) / 5)
    whole, part = draw(sampler, 8, every), draw(sampler, 8, ids)
    rows = [every.index(i) for i in ids]
    assert torch.equal(part.leaves, whole.leaves[rows]) and torch.equal(part.log_q, whole.log_q[rows])
    assert not torch.equal(draw(sampler, 8, every, step_number=1).leaves, whole.leaves)


# ------------------------------------------------------------------------------------------------------------ mixtures
def mixture():
    return MixtureSampler(
        {"uniform": 3, "replay": (ReplaySampler(5, fallback=UniformSampler()), 2), "wide": (UniformSampler(), 1)}
    )


def train(sampler, steps):
    """Return the draws of several steps over six prompts, three per step. log R depends on prompt and leaf."""
    history = []
    for step in steps:
        ids = [(step * 3 + i) % 6 for i in range(3)]
        drawn = draw(sampler, 6, ids, step)
        rewards = torch.sin(drawn.leaves * 1.7 + torch.tensor(ids)[:, None])
        sampler.observe(step_of(ids), drawn, feedback_of(rewards))
        history.append(drawn)
    return history


def test_in_a_mixture_the_buffer_stores_the_whole_group():
    sampler = mixture()
    first = train(sampler, [0])[0]
    stored = contents(sampler.samplers["replay"])
    for row in range(3):
        recent = [leaf for leaf, _ in stored[row]]
        assert recent[:3] == list(dict.fromkeys(first.leaves[row].tolist()))[:3]
    assert first.source.tolist() == [[0, 0, 0, 2, 2, 3]] * 3
    assert sampler.source_names == ("uniform", "replay/replay", "replay/fallback", "wide")
    assert train(sampler, [2])[0].source.tolist() == [[0, 0, 0, 1, 1, 3]] * 3
    outer = MixtureSampler({"ground_truth": 1, "inner": (mixture(), 6)})
    assert outer.observes_group and not MixtureSampler({"uniform": 1}).observes_group


def test_a_resumed_run_equals_an_uninterrupted_run(tmp_path):
    whole = MixtureSampler({"uniform": 1, "inner": (mixture(), 5)})
    uninterrupted = train(whole, range(8))
    first = MixtureSampler({"uniform": 1, "inner": (mixture(), 5)})
    train(first, range(4))
    save_file(first.state_dict(), tmp_path / "sampler.safetensors")
    train(first, range(4, 5))  # training after saving does not change the saved state
    second = MixtureSampler({"uniform": 1, "inner": (mixture(), 5)})
    second.load_state_dict(load_file(tmp_path / "sampler.safetensors"))
    for expected, drawn in zip(uninterrupted[4:], train(second, range(4, 8)), strict=True):
        assert torch.equal(expected.leaves, drawn.leaves) and torch.equal(expected.log_q, drawn.log_q)
    assert second.metrics() == whole.metrics()
    for name, tensor in whole.state_dict().items():
        assert torch.equal(tensor, second.state_dict()[name]), name
    assert sorted(whole.state_dict()) == [f"inner/replay/{entry}" for entry in ("leaves", "log_rewards", "row_ids")]


def test_an_empty_buffer_round_trips(tmp_path):
    save_file(ReplaySampler(3).state_dict(), tmp_path / "sampler.safetensors")
    sampler = ReplaySampler(3, fallback=UniformSampler())
    sampler.load_state_dict(load_file(tmp_path / "sampler.safetensors"))
    assert draw(sampler, 2, [1]).source.tolist() == [[1, 1]]
    assert sampler.metrics() == {"prompts": 0.0, "trajectories": 0.0}


# -------------------------------------------------------------------------------------------------------------- errors
@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ReplaySampler(0), "capacity of ReplaySampler is 0; it must be a whole number of at least 1"),
        (
            lambda: ReplaySampler(4, recent_share=1.5),
            r"recent_share of ReplaySampler is 1.5; it must be a number in \[0, 1\]",
        ),
        (
            lambda: ReplaySampler(4, temperature=-1),
            "temperature of ReplaySampler is -1; it must be a finite number above 0",
        ),
        (
            lambda: ReplaySampler(3).load_state_dict({}),
            r"has the entries \[\]; it must have \['leaves', 'log_rewards'",
        ),
        (lambda: ReplaySampler(3).load_state_dict(ReplaySampler(4).state_dict()), "capacity of 4, but capacity is 3"),
        (lambda: GroundTruthSampler().load_state_dict(ReplaySampler(4).state_dict()), "state of GroundTruthSampler"),
    ],
)
def test_invalid_options_raise_errors(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_the_fallback_must_be_a_sampler():
    with pytest.raises(TypeError, match="fallback of ReplaySampler is 'uniform'; it must be a Sampler"):
        ReplaySampler(fallback="uniform")
