"""Samplers follow their distribution, return its log-probabilities, and depend on the row only."""

import math
from dataclasses import replace

import pytest
import scipy
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gflowtrl.policy import StatelessNoise
from gflowtrl.rewards import (
    CollaborativeReward,
    DenseReward,
    RewardResult,
    SampledReward,
    draw_leaves,
)
from gflowtrl.samplers import (
    CollaborativeSampler,
    FunctionSampler,
    GroundTruthSampler,
    MixtureSampler,
    OnPolicySampler,
    RewardSampler,
    Trajectories,
    UniformSampler,
    build_sampler,
    validate_trajectories,
)  # fmt: skip
from tests.rewards.world import TableTeacher, make_catalog, make_policy, make_step


LOG_REWARDS = torch.randn(4, 8, generator=torch.Generator().manual_seed(3))


def reward_of(rows=(0, 1, 2, 3)):
    log_rewards = LOG_REWARDS[list(rows)]
    return DenseReward(RewardResult(log_rewards, log_rewards.exp(), {}, torch.zeros(())), make_catalog().tree)


def draw(sampler, num, rows=(0, 1, 2, 3), step_number=5, policy=None):
    step = make_step(rows)
    policy = policy or make_policy(make_catalog())
    drawn = sampler.sample(step, policy, reward_of(rows), num, StatelessNoise(42).at(step_number, step.row_ids))
    validate_trajectories(drawn, len(rows), num, 8)
    return drawn


def distributions():
    """Return samplers with their exact distributions over leaves (4, 8)."""
    catalog, step = make_catalog(), make_step()
    items = CollaborativeReward(TableTeacher(), 0.6).bind(catalog).score_items(step)
    policy = make_policy(catalog).leaf_log_probs(step.prompts).exp()
    return {
        "collaborative": (CollaborativeSampler(TableTeacher(), 0.6), catalog.fold_items(items)),
        "uniform": (UniformSampler(), torch.full((4, 8), 1 / 8)),
        "reward": (RewardSampler(), LOG_REWARDS.softmax(1)),
        "tempered_reward": (RewardSampler(2.0), (LOG_REWARDS / 2).softmax(1)),
        "on_policy": (OnPolicySampler(), policy),
    }


@pytest.mark.parametrize("name", ["collaborative", "uniform", "reward", "tempered_reward", "on_policy"])
def test_draws_follow_the_distribution(name):
    sampler, expected = distributions()[name]
    num = 1000 if name == "on_policy" else 4000
    drawn = draw(sampler, num)
    torch.testing.assert_close(drawn.log_q, expected.log().gather(1, drawn.leaves), atol=1e-4, rtol=1e-4)
    for leaves, probabilities in zip(drawn.leaves, expected.double(), strict=True):
        counts = torch.bincount(leaves, minlength=8)
        assert scipy.stats.chisquare(counts, num * probabilities / probabilities.sum()).pvalue > 1e-3


def test_on_policy_passes_its_options():
    class Recorder:
        def sample(self, prompts, num, noise, temperature, epsilon):
            return torch.zeros(4, num, dtype=torch.long), torch.full((4, num), temperature + epsilon)

    drawn = draw(OnPolicySampler(2.0, 0.25), 3, policy=Recorder())
    assert drawn.log_q.unique().tolist() == [2.25]


def test_ground_truth():
    drawn = draw(GroundTruthSampler(), 2)
    expected = make_catalog().leaf_of(make_step().columns["target"])
    assert torch.equal(drawn.leaves, expected[:, None].expand(4, 2)) and not drawn.log_q.any()
    step = replace(make_step(), target_leaves=torch.tensor([4, 5, 6, 7]))
    assert GroundTruthSampler().sample(step, None, None, 1, None).leaves.flatten().tolist() == [4, 5, 6, 7]


def all_sources():
    return MixtureSampler(
        {
            "ground_truth": 1,
            "on_policy": 2,
            "uniform": 2,
            "reward": 2,
            "teacher": (CollaborativeSampler(TableTeacher()), 2),
        }
    )


@pytest.mark.parametrize("rows", [(2,), (3, 1), (1, 0, 3, 2)])
def test_a_row_draws_the_same_in_any_batch(rows):
    whole, part = draw(all_sources(), 36), draw(all_sources(), 36, rows)
    assert torch.equal(part.leaves, whole.leaves[list(rows)])
    torch.testing.assert_close(part.log_q, whole.log_q[list(rows)], atol=1e-5, rtol=1e-5)


def test_steps_and_rows_differ():
    first = draw(all_sources(), 36).leaves
    assert torch.equal(first, draw(all_sources(), 36).leaves)
    assert not torch.equal(first, draw(all_sources(), 36, step_number=6).leaves)
    uniform = draw(UniformSampler(), 36).leaves
    assert len(uniform.unique(dim=0)) == 4


# ------------------------------------------------------------------------------------------------------ inverse CDF
def test_draw_leaves_on_a_grid():
    """Evenly spaced numbers hit each leaf in proportion to its probability, and never a leaf of probability zero."""
    probabilities = torch.tensor([[0.0, 3.0, 0.0, 1.0, 0.0], [2.0, 0.0, 0.0, 0.0, 6.0]])
    grid = ((torch.arange(800, dtype=torch.float64) + 0.5) / 800).expand(2, -1)
    leaves, log_q = draw_leaves(probabilities, grid)
    assert [torch.bincount(row, minlength=5).tolist() for row in leaves] == [[0, 600, 0, 200, 0], [200, 0, 0, 0, 600]]
    torch.testing.assert_close(log_q, (probabilities / probabilities.sum(1, keepdim=True)).gather(1, leaves).log())
    edges = torch.tensor([[2.0**-60, 1 - 2.0**-53, 1.0]], dtype=torch.float64).expand(2, -1)
    assert draw_leaves(probabilities, edges)[0].tolist() == [[1, 3, 3], [0, 4, 4]]


def test_draw_leaves_reaches_the_end_of_a_large_catalog():
    """A 32-bit cumulative sum of many small numbers is not precise enough."""
    size = 3_000_000
    expected = torch.tensor([[0, 1_234_567, size - 2, size - 1]])
    leaves, _ = draw_leaves(torch.full((1, size), 1 / size), (expected.double() + 0.5) / size)
    assert leaves.tolist() == expected.tolist()


# ---------------------------------------------------------------------------------------------------------- mixtures
@settings(max_examples=60, deadline=None)
@given(st.lists(st.floats(0, 100), min_size=1, max_size=6).filter(any), st.integers(0, 64))
def test_allocation_is_by_largest_remainder(weights, num):
    sampler = MixtureSampler({str(i): (UniformSampler(), weight) for i, weight in enumerate(weights)})
    counts = sampler.allocate(num)
    shares = [num * weight / sum(weights) for weight in weights]
    assert sum(counts) == num
    assert all(abs(count - share) < 1 + 1e-9 for count, share in zip(counts, shares, strict=True))


def test_allocation_examples():
    three = MixtureSampler({"ground_truth": 1, "uniform": 3, "on_policy": 4})
    assert three.allocate(8) == [1, 3, 4]
    assert three.allocate(16) == [2, 6, 8]
    assert MixtureSampler({"ground_truth": 1, "uniform": 1, "on_policy": 1}).allocate(4) == [2, 1, 1]
    assert MixtureSampler({"a": (UniformSampler(), 0.1), "b": (UniformSampler(), 0.1)}).allocate(3) == [2, 1]


def test_source_names_of_nested_mixtures():
    inner = MixtureSampler({"uniform": 1, "ground_truth": 1})
    sampler = MixtureSampler({"ground_truth": 1, "never": (RewardSampler(), 0), "wide": (inner, 2), "on_policy": 1})
    assert sampler.source_names == ("ground_truth", "never", "wide/uniform", "wide/ground_truth", "on_policy")
    drawn = draw(sampler, 8)
    assert drawn.source.tolist() == [[0, 0, 2, 2, 3, 3, 4, 4]] * 4
    target = make_catalog().leaf_of(make_step().columns["target"])[:, None]
    assert (drawn.leaves[:, [0, 1, 4, 5]] == target).all()
    assert not drawn.log_q[:, [0, 1, 4, 5]].any()
    torch.testing.assert_close(drawn.log_q[:, 2:4], torch.full((4, 2), -math.log(8)))


def test_two_sources_of_the_same_kind_draw_different_leaves():
    drawn = draw(MixtureSampler({"a": (UniformSampler(), 1), "b": (UniformSampler(), 1)}), 40)
    assert not torch.equal(drawn.leaves[:, :20], drawn.leaves[:, 20:])


def test_log_q_is_unknown_if_it_is_unknown_for_one_source():
    def first_leaf(step, policy, reward, num_generations, noise):
        return torch.zeros(4, num_generations, dtype=torch.long)

    sampler = build_sampler({"uniform": 1, "first_leaf": [first_leaf, 1]})
    assert sampler.source_names == ("uniform", "first_leaf")
    assert draw(sampler, 4).log_q is None and draw(build_sampler({"uniform": 1}), 4).log_q is not None


# ---------------------------------------------------------------------------------------------------- by name, errors
def test_build_sampler():
    teacher = TableTeacher()
    assert isinstance(build_sampler("ground_truth"), GroundTruthSampler)
    assert isinstance(build_sampler(UniformSampler), UniformSampler)
    policy = build_sampler("on_policy", temperature=2.0, epsilon=0.1)
    assert (policy.temperature, policy.epsilon) == (2.0, 0.1)
    assert build_sampler(policy) is policy
    mixture = build_sampler(
        {"ground_truth": 1, "collaborative": 3, "explore": ["on_policy", 4]}, teacher=teacher, teacher_temperature=3.0
    )
    assert mixture.source_names == ("ground_truth", "collaborative", "explore")
    assert mixture.samplers["collaborative"].distribution.temperature == 3.0
    assert isinstance(build_sampler(lambda *_: None), FunctionSampler)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: build_sampler("beans"), r"Unknown sampler 'beans'; choose from \['adaptive_mixture', 'beam', 'c"),
        (lambda: build_sampler("collaborative"), "'collaborative' needs a teacher"),
        (lambda: MixtureSampler({"uniform": 0}), "weights of a mixture .* must be finite, >= 0 and not all zero"),
        (lambda: MixtureSampler({"uniform": -1, "reward": 2}), "weights of a mixture"),
        (lambda: OnPolicySampler(0.0), "temperature of OnPolicySampler is 0.0; it must be"),
        (lambda: OnPolicySampler(epsilon=1.5), r"epsilon of OnPolicySampler is 1.5; it must be a number in \[0, 1\]"),
        (lambda: RewardSampler(-1), "temperature of RewardSampler is -1; it must be"),
        (
            lambda: RewardSampler().sample(make_step(), None, SampledReward(lambda *_: None), 1, None),
            "needs the rewards of all leaves",
        ),
        (lambda: RewardSampler().sample(make_step(), None, None, 1, None), "the reward is None; pass reward_funcs"),
    ],
)
def test_invalid_options_raise_errors(make, message):
    with pytest.raises(ValueError, match=message):
        make()


GOOD = torch.tensor([[0, 1, 7], [2, 2, 3]])


@pytest.mark.parametrize(
    ("leaves", "source", "log_q", "message"),
    [
        (
            torch.tensor([[0, 1, 7], [2, 8, -1]]),
            GOOD,
            None,
            "returned 8 as trajectory 1 of row 1, which is not a leaf",
        ),
        (
            torch.tensor([[0, -1, 7], [2, 8, 1]]),
            GOOD,
            None,
            "returned -1 as trajectory 1 of row 0, which is not a leaf",
        ),
        (GOOD[:, :2], GOOD, None, r"leaves of shape \(2, 2\); it must be \(2, 3\): 2 prompts with num_generations=3"),
        (GOOD, GOOD[0], None, r"source of shape \(3,\)"),
        (GOOD.float(), GOOD, None, "leaves of torch.float32; they must be integers"),
        (GOOD, GOOD, torch.zeros(2), r"log_q of shape \(2,\)"),
        (GOOD, GOOD, GOOD, "log_q of torch.int64; they must be floating-point numbers"),
        (
            GOOD,
            torch.tensor([[0, 1, 8], [0, 0, 0]]),
            None,
            "source 8 for trajectory 2 of row 0; sources are .* 0 to 7",
        ),
        (GOOD, GOOD - 9, None, "returned source -[0-9]+ for trajectory 0 of row 0"),
    ],
)
def test_invalid_trajectories(leaves, source, log_q, message):
    validate_trajectories(Trajectories(GOOD, GOOD, torch.zeros(2, 3)), 2, 3, 8, 8)
    with pytest.raises(ValueError, match=message):
        validate_trajectories(Trajectories(leaves, source, log_q), 2, 3, 8, 8)


def test_results_of_the_wrong_type():
    with pytest.raises(TypeError, match="returned list; it must return Trajectories"):
        validate_trajectories([[0, 1]], 1, 2, 8)
    with pytest.raises(TypeError, match="returned leaves as list; it must be a tensor"):
        validate_trajectories(Trajectories([[0, 1]], torch.zeros(1, 2)), 1, 2, 8)

    def lists(*_):
        return [[0]]

    with pytest.raises(TypeError, match="sampler 'lists' returned list"):
        FunctionSampler(lists).sample(make_step(), None, None, 1, None)
    for wrong in ([0.0], GOOD.to("meta"), GOOD.to_sparse()):
        with pytest.raises(TypeError, match="returned log_q as"):
            validate_trajectories(Trajectories(GOOD, GOOD, wrong), 2, 3, 8)


def test_functions_that_cannot_be_samplers():
    for function in (lambda step: step, lambda: None, int.from_bytes):
        with pytest.raises(TypeError, match="The sampler .* cannot be called .*; it must be a Sampler or function"):
            FunctionSampler(function)
    FunctionSampler(lambda *given: given[0])


def test_parts_of_a_mixture_are_checked():
    policy, noise = make_policy(make_catalog()), StatelessNoise(0).at(0, make_step().row_ids)
    wide = MixtureSampler({"ground_truth": 1, "own": (lambda step, *_: step.target_leaves[:, None], 3)})
    with pytest.raises(ValueError, match=r"leaves of shape \(\d+, 1\); it must be \(\d+, 3\)"):
        wide.sample(make_step(), policy, None, 4, noise)
