"""Divergences, compared with scipy, and the bootstrap, compared with explicit resampling."""

import math

import numpy as np
import pytest
import scipy
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gflowtrl.metrics import jensen_shannon, mean_and_error, paired_bootstrap, total_variation


@given(st.integers(0, 10_000), st.integers(1, 12))
@settings(max_examples=60, deadline=None)
def test_divergences(seed, size):
    generator = np.random.default_rng(seed)
    p, q = generator.dirichlet(np.full(size, 0.5), size=(2, 3))
    # Total variation is the largest difference in probability over all sets of outcomes.
    events = ((np.arange(2**size)[:, None] >> np.arange(size)) & 1) @ (p - q).T
    p, q = torch.tensor(p), torch.tensor(q)
    torch.testing.assert_close(total_variation(p, q), torch.tensor(events.max(0)))
    expected = torch.tensor(scipy.spatial.distance.jensenshannon(p.numpy(), q.numpy(), axis=-1) ** 2)
    torch.testing.assert_close(jensen_shannon(p, q), expected, atol=1e-9, rtol=1e-6)


def test_extreme_values_of_the_divergences():
    p, q = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])
    assert total_variation(p, q) == 1 and total_variation(p, p) == 0
    assert jensen_shannon(p, q).item() == pytest.approx(math.log(2)) and jensen_shannon(p, p) == 0


def explicit_bootstrap(difference, samples):
    generator = np.random.default_rng(1)
    users = generator.integers(0, len(difference), size=(samples, len(difference)))
    return np.quantile(difference.numpy()[users].mean(1), [0.025, 0.975])


@pytest.mark.parametrize("continuous", [False, True])
def test_bootstrap_agrees_with_explicit_resampling(continuous):
    generator = torch.Generator().manual_seed(0)
    a, b = torch.rand(2, 400, generator=generator)
    if not continuous:
        a, b = (a < 0.4).float(), (b < 0.3).float()
    result = paired_bootstrap(a, b, samples=20_000)
    low, high = explicit_bootstrap((a - b).double(), 20_000)
    assert result["mean_difference"] == pytest.approx((a - b).double().mean().item(), abs=1e-9)
    width = high - low
    assert abs(result["low"] - low) < 0.05 * width and abs(result["high"] - high) < 0.05 * width


def test_bootstrap_is_paired_seeded_and_chunked():
    generator = torch.Generator().manual_seed(0)
    base = torch.rand(300, generator=generator, dtype=torch.double)
    shifted = paired_bootstrap(base + 0.25, base)
    assert shifted["low"] == pytest.approx(0.25) and shifted["high"] == pytest.approx(0.25)
    other = torch.rand(600, generator=generator)
    base = torch.rand(600, generator=generator)
    assert paired_bootstrap(other, base, samples=9000) == paired_bootstrap(other, base, samples=9000)
    assert paired_bootstrap(other, base, seed=1) != paired_bootstrap(other, base, seed=2)
    swapped = paired_bootstrap(base, other)
    assert swapped["mean_difference"] == pytest.approx(-paired_bootstrap(other, base)["mean_difference"])


def test_coverage_of_the_bootstrap_interval():
    """In 200 experiments with a true difference of 0.1, about 95 % of the intervals contain it."""
    generator = torch.Generator().manual_seed(3)
    covered = 0
    for seed in range(200):
        a = (torch.rand(300, generator=generator) < 0.5).float()
        b = (torch.rand(300, generator=generator) < 0.4).float()
        interval = paired_bootstrap(a, b, samples=1000, seed=seed)
        covered += interval["low"] <= 0.1 <= interval["high"]
    assert 0.90 <= covered / 200 <= 0.99


def test_bootstrap_needs_the_same_users():
    with pytest.raises(ValueError, match="same users"):
        paired_bootstrap(torch.rand(3), torch.rand(4))


def test_mean_and_error():
    mean, error = mean_and_error(torch.tensor([1.0, 0.0, 0.0, 1.0]))
    assert mean == 0.5
    assert error == pytest.approx(math.sqrt(1 / 3) / 2)
