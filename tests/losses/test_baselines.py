"""The baseline losses compared with their formulas in plain loops, in float64."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gflowtrl.losses import grpo, msl, sdpo, sft


def some(seed: int, batch: int = 2, count: int = 4, steps: int = 3, children: int = 5):
    """Log-probabilities of children (the first is the token taken), and lengths of 1 to `steps`."""
    generator = torch.Generator().manual_seed(seed)
    shape = (batch, count, steps, children)
    child = (2 * torch.randn(shape, generator=generator, dtype=torch.double)).log_softmax(-1)
    lengths = torch.randint(1, steps + 1, (batch, count), generator=generator)
    real = torch.arange(steps) < lengths[..., None]
    child = child.masked_fill(~real[..., None], -torch.inf)
    return torch.where(real, child[..., 0], 0.0), child, lengths


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6), st.floats(0.2, 3))
def test_msl(seed, temperature):
    log_probs, child, lengths = some(seed)
    found = msl(log_probs, child, lengths, temperature)
    for row in range(2):
        for k in range(4):
            expected = 0.0
            for step in range(int(lengths[row, k])):
                logits = [value / temperature for value in child[row, k, step].tolist()]
                expected -= logits[0] - math.log(sum(math.exp(value) for value in logits))
            assert float(found[row, k]) == pytest.approx(expected)
    torch.testing.assert_close(msl(log_probs, child, lengths), sft(log_probs, lengths))


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6), st.floats(0.1, 3))
def test_sdpo(seed, beta):
    log_probs, _, lengths = some(seed)
    reference, _, _ = some(seed + 1)
    leaves = torch.tensor([[3, 5, 3, 8], [2, 2, 2, 2]])  # all negatives equal the target
    found = sdpo(log_probs, reference, lengths, leaves, beta)
    gains = [
        sum(float(log_probs[0, k, step] - reference[0, k, step]) for step in range(int(lengths[0, k])))
        for k in range(4)
    ]
    inside = -math.log(sum(math.exp(beta * (gains[k] - gains[0])) for k in (1, 3)))
    assert float(found[0, 0]) == pytest.approx(math.log1p(math.exp(-inside)))  # -log sigmoid(x)
    assert float(found[1, 0]) == 0.0


def test_grpos_gradient_is_the_policy_gradient():
    """d/d theta of -(1 / |o|) sum_t [A log pi_t - kl (exp d - d - 1)], by hand."""
    log_probs, _, lengths = some(3)
    reference, _, _ = some(4)
    advantages = torch.randn(2, 4, dtype=torch.double)
    leaf = log_probs.clone().requires_grad_()
    grpo(leaf, reference, lengths, advantages, beta=0.2).sum().backward()
    for row in range(2):
        for k in range(4):
            for step in range(3):
                d = float(reference[row, k, step] - log_probs[row, k, step])
                expected = (-float(advantages[row, k]) + 0.2 * (1 - math.exp(d))) / int(lengths[row, k])
                expected = expected if step < int(lengths[row, k]) else 0.0
                assert float(leaf.grad[row, k, step]) == pytest.approx(expected)


def test_no_nan_beyond_the_end_of_an_id():
    log_probs, child, lengths = some(0)
    child = child.requires_grad_()
    msl(log_probs, child, lengths, 0.5).sum().backward()
    assert child.grad.isfinite().all()
