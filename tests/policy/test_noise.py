"""Tests of stateless noise and of sampling with it."""

from fractions import Fraction

import scipy
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gflowtrl.policy import StatelessNoise, inverse_cdf


def test_numbers_are_uniform_and_independent_of_the_batch():
    ids = torch.arange(2000)
    drawn = StatelessNoise(7).at(3, ids).uniform("policy", 50)
    assert drawn.dtype == torch.float64 and drawn.min() > 0 and drawn.max() < 1
    assert scipy.stats.kstest(drawn.flatten().numpy(), "uniform").pvalue > 1e-3
    shuffled = torch.randperm(2000)
    assert torch.equal(StatelessNoise(7).at(3, ids[shuffled]).uniform("policy", 20), drawn[shuffled, :20])


def test_numbers_depend_on_the_index_only():
    noise = StatelessNoise(7).at(3, torch.arange(5))
    drawn = noise.uniform("policy", 50, depth=2)
    index = torch.randint(50, (5, 4, 3), generator=torch.Generator().manual_seed(0))
    expected = drawn.gather(1, index.flatten(1)).view(5, 4, 3)
    assert torch.equal(noise.uniform_at("policy", index, depth=2), expected)


def test_every_argument_changes_the_numbers():
    ids = torch.arange(500)
    base = StatelessNoise(0).at(0, ids).uniform("a", 40).flatten()
    others = [
        StatelessNoise(1).at(0, ids).uniform("a", 40),
        StatelessNoise(-1).at(0, ids).uniform("a", 40),
        StatelessNoise(2**63 + 5).at(0, ids).uniform("a", 40),
        StatelessNoise(0).at(1, ids).uniform("a", 40),
        StatelessNoise(0).at(0, ids + 1).uniform("a", 40),
        StatelessNoise(0).at(0, ids).uniform("b", 40),
        StatelessNoise(0).at(0, ids).uniform("a", 40, depth=1),
    ]
    for other in others:
        assert abs(float(torch.corrcoef(torch.stack([base, other.flatten()]))[0, 1])) < 0.03


# ------------------------------------------------------------------------------------------------------- named streams
def test_named_noise_is_independent():
    noise = StatelessNoise(0).at(3, torch.arange(500))
    others = [noise.named("a"), noise.named("b"), noise.named("a").named("b"), noise.named("b").named("a"), noise]
    drawn = [other.uniform("policy", 40).flatten() for other in others]
    correlation = torch.corrcoef(torch.stack(drawn)) - torch.eye(5)
    assert correlation.abs().max() < 0.03
    for kind in (noise.uniform_at, noise.gumbel_at):
        name, index = kind.__name__, torch.arange(40).expand(500, -1)
        named, plain = getattr(noise.named("a"), name)("policy", index).flatten(), kind("policy", index).flatten()
        assert abs(float(torch.corrcoef(torch.stack([named, plain]))[0, 1])) < 0.03


def test_named_noise_is_a_function_of_row_and_name():
    ids = torch.arange(20)
    drawn = StatelessNoise(7).at(3, ids).named("outer").named("inner").uniform("policy", 6, depth=2)
    again = StatelessNoise(7).at(3, ids[[4, 1]]).named("outer").named("inner")
    assert len(again) == 2 and torch.equal(again.uniform("policy", 6, depth=2), drawn[[4, 1]])
    # Resumed runs with mixtures continue with the same numbers.
    assert torch.equal(StatelessNoise(7).at(3, ids).uniform("outer/inner/policy", 6, depth=2), drawn)


# -------------------------------------------------------------------------------------------------------------- Gumbel
def test_gumbel_numbers_follow_their_distribution():
    noise = StatelessNoise(7).at(3, torch.arange(2000))
    index = torch.arange(50).expand(2000, -1)
    drawn = noise.gumbel_at("beam", index)
    assert drawn.dtype == torch.float64 and drawn.isfinite().all()
    assert scipy.stats.kstest(drawn.flatten().numpy(), "gumbel_r").pvalue > 1e-3
    torch.testing.assert_close(drawn, -(-noise.uniform_at("beam", index).log()).log(), rtol=0, atol=1e-12)
    chosen = torch.randint(50, (2000, 3, 2), generator=torch.Generator().manual_seed(0))
    assert torch.equal(noise.gumbel_at("beam", chosen), drawn.gather(1, chosen.flatten(1)).view(2000, 3, 2))


def test_gumbel_numbers_are_finite_at_the_ends(monkeypatch):
    """The largest uniform number rounds to 1 in double precision."""
    ends = torch.tensor([[2.0**-54, 1.0]], dtype=torch.float64)
    noise = StatelessNoise(7).at(3, torch.arange(1))
    monkeypatch.setattr(noise, "uniform_at", lambda purpose, index: ends)
    drawn = noise.gumbel_at("beam", torch.arange(2)[None])
    assert drawn.isfinite().all() and drawn[0, 0] < -3 and drawn[0, 1] > 36


# --------------------------------------------------------------------------------------------------------- inverse CDF
@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    st.lists(st.sampled_from([0.0, 0.25, 1.0, 3.0, 1e-3]), min_size=1, max_size=7).filter(any),
    st.lists(st.floats(1e-9, 1 - 1e-9), min_size=1, max_size=5),
    st.floats(0.1, 10),
)
def test_inverse_cdf_is_the_first_entry_whose_sum_exceeds_the_number(weights, uniforms, scale):
    """Compared in exact fractions; a number at a boundary may fall to either side."""
    exact = [Fraction(weight) for weight in weights]
    tensor = scale * torch.tensor(weights, dtype=torch.double)
    found = inverse_cdf(tensor, torch.tensor(uniforms, dtype=torch.double)).tolist()
    for index, uniform in zip(found, uniforms, strict=True):
        assert weights[index] > 0
        below, above = sum(exact[:index]) / sum(exact), sum(exact[: index + 1]) / sum(exact)
        assert below - Fraction(1, 10**12) <= uniform <= above + Fraction(1, 10**12)


def test_inverse_cdf_of_many_distributions_at_once():
    generator = torch.Generator().manual_seed(0)
    weights, uniforms = torch.rand(3, 4, 6, generator=generator), torch.rand(3, 4, 9, generator=generator)
    found = inverse_cdf(weights, uniforms)
    assert found.shape == (3, 4, 9) and found.dtype == torch.long
    for i in range(3):
        for j in range(4):
            assert torch.equal(found[i, j], inverse_cdf(weights[i, j], uniforms[i, j]))
    counts = torch.bincount(inverse_cdf(weights[0, 0], torch.linspace(5e-6, 1 - 5e-6, 100_000, dtype=torch.double)))
    torch.testing.assert_close(counts / 100_000, weights[0, 0] / weights[0, 0].sum(), rtol=0, atol=2e-5)


def test_inverse_cdf_near_0_and_1():
    """Never an entry of weight 0, even if the number rounds to 1; the last entry if all weights are 0."""
    weights = torch.tensor([[0.0, 2.0, 0.0, 1.0, 0.0], [0.0, 0.0, 0.0, 0.0, 0.0]])
    ends = torch.tensor([[2.0**-54, 2 / 3, 1.0]] * 2, dtype=torch.double)
    assert inverse_cdf(weights, ends).tolist() == [[1, 3, 3], [4, 4, 4]]
