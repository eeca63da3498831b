"""Samplers that select by the scores of a teacher or the policy, compared with a full sort."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from gflowtrl.data import Step
from gflowtrl.policy import StatelessNoise
from gflowtrl.samplers import (
    BeamSampler,
    CurriculumSampler,
    LowConfidenceSampler,
    MixtureSampler,
    StochasticBeamSampler,
    validate_trajectories,
)  # fmt: skip
from tests.rewards.world import TableTeacher, make_catalog, make_policy, make_step
from tests.tiny import catalog_of, random_paths


def draw(sampler, num, rows=(0, 1, 2, 3), step_number=0, policy=None, progress=0.0):
    step = make_step(rows, progress=progress)
    policy = policy or SimpleNamespace(catalog=make_catalog())
    drawn = sampler.sample(step, policy, None, num, StatelessNoise(42).at(step_number, step.row_ids))
    validate_trajectories(drawn, len(rows), num, 8)
    return drawn


def unobserved_by_score(row):
    """Return the unobserved leaves in ascending order of the teacher's score, the best of the items at each leaf."""
    catalog, columns, teacher = make_catalog(), make_step((row,)).columns, TableTeacher()
    scores = dict(zip(teacher.items, teacher.score(columns["history"])[0].tolist(), strict=True))
    seen = set(catalog.leaf_of([*columns["history"][0], *columns["target"]]).tolist())
    best = {leaf: max(scores[item] for item in catalog.items_of(leaf)) for leaf in range(8)}
    return sorted(set(range(8)) - seen, key=best.get)


# --------------------------------------------------------------------------------------------------------- curriculum
@pytest.mark.parametrize(("progress", "expected"), [(0.0, slice(0, 2)), (0.5, slice(1, 3)), (0.99, slice(2, 4))])
def test_window_moves_from_the_easiest_to_the_hardest_of_the_pool(progress, expected):
    """The pool is the four best leaves of the teacher. The two worst of them come first, the two best last."""
    drawn = draw(CurriculumSampler(TableTeacher(), 4, pool="teacher"), 2, progress=progress)
    for row in range(4):
        assert drawn.leaves[row].tolist() == unobserved_by_score(row)[-4:][expected]
    assert not drawn.log_q.any()


def test_a_pool_of_all_unobserved_leaves():
    """The random draw does not change a pool that contains all unobserved leaves."""
    for step_number, progress in enumerate((0.0, 0.4, 0.9)):
        for row in range(4):
            order = unobserved_by_score(row)
            first = round(progress * (len(order) - 2))
            drawn = draw(CurriculumSampler(TableTeacher(), 8), 2, (row,), step_number, progress=progress)
            assert drawn.leaves[0].tolist() == order[first : first + 2]
            assert drawn.log_q is None


def large_catalog(rows=40):
    catalog = catalog_of(random_paths(200, depth=3, codes=7))
    table = torch.randn(rows, 200, generator=torch.Generator().manual_seed(0))
    columns = {"history": [[row, row + 1] for row in range(rows)], "target": list(range(100, 100 + rows))}
    step = Step({}, torch.arange(rows), catalog.leaf_of(columns["target"]), columns)
    return catalog, step, lambda histories: table[[history[0] for history in histories]]


def test_scores_rise_with_the_progress():
    """The mean scores of K of 2 K + 1 random candidates equal the order statistics of a normal distribution."""
    catalog, step, teacher = large_catalog()
    sampler, means = CurriculumSampler(teacher), []
    scores = catalog.fold_items(teacher(step.columns["history"]))
    for progress in (0.0, 0.25, 0.5, 0.75, 1 - 1e-9):
        noise, policy = StatelessNoise(0).at(3, step.row_ids), SimpleNamespace(catalog=catalog)
        drawn = sampler.sample(replace(step, progress=progress), policy, None, 4, noise).leaves
        assert all(len(set(row)) == 4 for row in drawn.tolist())
        for row, leaves in enumerate(drawn):
            assert not set(leaves.tolist()) & set(catalog.leaf_of([row, row + 1, 100 + row]).tolist())
        means.append(scores.gather(1, drawn).mean().item())
    assert all(a < b - 0.1 for a, b in zip(means, means[1:], strict=False))
    # The expectations of the lowest four of nine standard normal values are -1.49, -0.93, -0.57 and -0.27.
    assert means[0] == pytest.approx(-0.815, abs=0.15) and means[-1] == pytest.approx(0.815, abs=0.15)


def test_custom_schedules():
    """One schedule is hard from the start, the other one jumps halfway."""
    hard = CurriculumSampler(TableTeacher(), 4, "teacher", [[0, 1]])
    jump = CurriculumSampler(TableTeacher(), 4, "teacher", [[0.5, 0], [0.5, 1]])
    easy_leaves = draw(CurriculumSampler(TableTeacher(), 4, "teacher"), 2, progress=0.0).leaves
    hard_leaves = draw(hard, 2, progress=0.0).leaves
    assert not torch.equal(easy_leaves, hard_leaves)
    assert torch.equal(draw(jump, 2, progress=0.49).leaves, easy_leaves)
    assert torch.equal(draw(jump, 2, progress=0.5).leaves, hard_leaves)


def test_fewer_candidates_than_trajectories():
    drawn = draw(CurriculumSampler(TableTeacher()), 12, progress=0.3)
    for row in range(4):
        order = unobserved_by_score(row)
        assert drawn.leaves[row].tolist() == (order * 12)[:12]


@pytest.mark.parametrize("rows", [(2,), (3, 1), (1, 0, 3, 2)])
@pytest.mark.parametrize("pool", ["random", "teacher"])
def test_a_row_draws_the_same_in_any_batch(pool, rows):
    sampler = CurriculumSampler(TableTeacher(), 3, pool)
    whole, part = draw(sampler, 2, progress=0.3), draw(sampler, 2, rows, progress=0.3)
    assert torch.equal(part.leaves, whole.leaves[list(rows)])


# ------------------------------------------------------------------------------------------------------ low confidence
def test_low_confidence_selects_the_least_probable_leaves():
    policy = make_policy(make_catalog())
    policy.model.train()
    policy.model.config.attention_dropout = 0.5
    drawn = draw(LowConfidenceSampler(TableTeacher(), 4), 2, policy=policy)
    assert policy.model.training
    policy.model.eval()
    log_probs = policy.leaf_log_probs(make_step().prompts)
    for row in range(4):
        pool = unobserved_by_score(row)[-4:]
        assert drawn.leaves[row].tolist() == sorted(pool, key=lambda leaf: log_probs[row, leaf].item())[:2]  # noqa: B023
    assert not drawn.log_q.any() and not drawn.log_q.requires_grad
    few = draw(LowConfidenceSampler(TableTeacher()), 9, policy=policy)
    for row in range(4):
        assert set(few.leaves[row].tolist()) == set(unobserved_by_score(row))


# --------------------------------------------------------------------------------------------------------------- beams
def test_beam_is_the_top_of_the_exact_distribution():
    policy = make_policy(make_catalog())
    best = policy.leaf_log_probs(make_step().prompts).argsort(1, descending=True)
    drawn = draw(BeamSampler(), 8, policy=policy)
    assert torch.equal(drawn.leaves, best) and not drawn.log_q.any()
    assert torch.equal(draw(BeamSampler(), 11, policy=policy).leaves, torch.cat([best, best[:, :3]], 1))


def test_stochastic_beam_returns_distinct_leaves_and_their_inclusion_probability():
    """The Horvitz-Thompson estimate of a mean under the policy is unbiased over rows."""
    policy, values = make_policy(make_catalog()), torch.arange(8.0)
    prompts = make_step((1,)).prompts
    log_pi = policy.leaf_log_probs(prompts)[0]
    many = {name: tensor.expand(600, -1) for name, tensor in prompts.items()}
    step = Step(many, torch.arange(600), torch.full((600,), -1), {})
    drawn = StochasticBeamSampler().sample(step, policy, None, 3, StatelessNoise(42).at(0, step.row_ids))
    assert all(len(set(leaves)) == 3 for leaves in drawn.leaves.tolist()) and (drawn.log_q <= 0).all()
    estimates = ((log_pi[drawn.leaves] - drawn.log_q).exp() * values[drawn.leaves]).sum(1)
    error = estimates.std() / len(estimates) ** 0.5
    assert abs(estimates.mean() - (log_pi.exp() * values).sum()) < 3.5 * error


def test_stochastic_beam_passes_its_temperature_and_repeats_leaves():
    class Recorder:
        def stochastic_beam_search(self, prompts, num_generations, noise, temperature):
            leaves = torch.tensor([[3, 1, -1, -1, -1]]).expand(4, -1)
            return SimpleNamespace(leaves=leaves, log_inclusion=torch.tensor([[-temperature, -1, 0, 0, 0.0]] * 4))

    drawn = draw(StochasticBeamSampler(2.5), 5, policy=Recorder())
    assert drawn.leaves.tolist() == [[3, 1, 3, 1, 3]] * 4 and drawn.log_q.tolist() == [[-2.5, -1, -2.5, -1, -2.5]] * 4


def test_beams_in_a_mixture():
    """Two stochastic beams in a mixture have separate random streams. A row gets the same leaves in any batch."""
    policy = make_policy(make_catalog())
    sampler = MixtureSampler({"a": (StochasticBeamSampler(), 1), "b": (StochasticBeamSampler(), 1), "beam": 1})
    whole, part = draw(sampler, 9, policy=policy), draw(sampler, 9, (2, 0), policy=policy)
    assert torch.equal(part.leaves, whole.leaves[[2, 0]])
    assert not torch.equal(whole.leaves[:, :3], whole.leaves[:, 3:6])


# -------------------------------------------------------------------------------------------------------------- errors
@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: CurriculumSampler(TableTeacher(), 0), "pool_size of CurriculumSampler is 0; .* of at least 1"),
        (lambda: CurriculumSampler(TableTeacher(), 2.5), "pool_size of CurriculumSampler is 2.5; it must be a whole"),
        (lambda: CurriculumSampler(TableTeacher(), pool="best"), "'best'; choose 'random' or 'teacher'"),
        (lambda: CurriculumSampler(TableTeacher(), schedule=[]), r"is \[\]; it needs at least one point"),
        (lambda: CurriculumSampler(TableTeacher(), schedule=[[0.5, 0], [0.2, 1]]), r"must ascend within \[0, 1\]"),
        (lambda: CurriculumSampler(TableTeacher(), schedule=[[0, 0], [2, 1]]), r"must ascend within \[0, 1\]"),
        (lambda: CurriculumSampler(TableTeacher(), schedule="linear"), "is 'linear'; it must list pairs"),
        (lambda: CurriculumSampler(TableTeacher(), schedule=[[0, 2]]), r"its hardness must be in \[0, 1\]"),
        (lambda: CurriculumSampler(TableTeacher(), schedule=[[0, [0, 1]]]), r"its hardness must be in \[0, 1\]"),
        (lambda: draw(CurriculumSampler(TableTeacher(), 2), 3), "pool_size of .* is 2; it must be at least 3"),
        (
            lambda: draw(CurriculumSampler(lambda h: torch.zeros(4, 2)), 2),
            r"shape \(4, 2\); it must return .*\(4, 9\)",
        ),
        (
            lambda: StochasticBeamSampler(0),
            "temperature of StochasticBeamSampler is 0; it must be a finite number above 0",
        ),
        (lambda: StochasticBeamSampler("warm"), "temperature of StochasticBeamSampler is 'warm'; it must be"),
    ],
)
def test_invalid_options_raise_errors(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_a_teacher_is_required():
    with pytest.raises(TypeError, match="teacher of LowConfidenceSampler is None; it must be a Teacher or a callable"):
        LowConfidenceSampler(None)
