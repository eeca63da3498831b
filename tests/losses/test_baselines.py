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
    rewards = torch.randn(2, 4, dtype=torch.double, generator=torch.Generator().manual_seed(5))
    advantages = (rewards - rewards.mean(1, keepdim=True)) / (rewards.std(1, keepdim=True) + 1e-4)
    leaf = log_probs.clone().requires_grad_()
    grpo(leaf, reference, lengths, rewards, beta=0.2).sum().backward()
    for row in range(2):
        for k in range(4):
            for step in range(3):
                d = float(reference[row, k, step] - log_probs[row, k, step])
                expected = (-float(advantages[row, k]) + 0.2 * (1 - math.exp(d))) / int(lengths[row, k])
                expected = expected if step < int(lengths[row, k]) else 0.0
                assert float(leaf.grad[row, k, step]) == pytest.approx(expected)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6), st.floats(0, 0.99), st.booleans())
def test_label_smoothing_over_the_children(seed, smoothing, token_mean):
    """-(1 - s) log pi(taken) - s / C sum of log pi over the C children, in plain loops. C differs from state to state;
    the first step of the first id has one child."""
    log_probs, child, lengths = some(seed)
    counts = torch.randint(1, 6, log_probs.shape, generator=torch.Generator().manual_seed(seed))
    counts[0, 0, 0] = 1
    child = child.masked_fill(torch.arange(5) >= counts[..., None], -torch.inf)
    child = child - child.logsumexp(-1, keepdim=True).masked_fill(child[..., :1] == -torch.inf, 0.0)
    log_probs = child[..., 0].masked_fill(child[..., 0] == -torch.inf, 0.0)
    child, log_probs = child.requires_grad_(), log_probs.requires_grad_()
    loss = sft(log_probs, lengths, child, token_mean, smoothing)
    found = loss.tolist()
    for row in range(2):
        for k in range(4):
            expected, length = 0.0, int(lengths[row, k])
            for step in range(length):
                values = child[row, k, step, : counts[row, k, step]].tolist()
                expected -= (1 - smoothing) * values[0] + smoothing / len(values) * sum(values)
            assert found[row][k] == pytest.approx(expected / length if token_mean else expected, abs=1e-12)
    first = sft(log_probs, lengths.clamp(max=1), child, label_smoothing=smoothing)
    assert first.tolist()[0][0] == 0.0
    loss.sum().backward()
    assert log_probs.grad.isfinite().all() and (child.grad is None or child.grad.isfinite().all())


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6), st.floats(0, 0.99))
def test_label_smoothing_on_one_level_is_torchs_cross_entropy(seed, smoothing):
    """In value and in gradient."""
    generator = torch.Generator().manual_seed(seed)
    logits = (3 * torch.randn(6, 5, generator=generator, dtype=torch.double)).requires_grad_()
    targets = torch.randint(5, (6,), generator=generator)
    child = logits.log_softmax(-1)
    taken = child.gather(1, targets[:, None])
    ours = sft(taken[:, :, None], torch.ones(6, 1, dtype=torch.long), child[:, None, None], label_smoothing=smoothing)
    expected = torch.nn.functional.cross_entropy(logits, targets, reduction="none", label_smoothing=smoothing)
    torch.testing.assert_close(ours[:, 0], expected)
    torch.testing.assert_close(*(torch.autograd.grad(each.sum(), logits)[0] for each in (ours, expected)))


def test_label_smoothing_needs_the_children():
    log_probs, child, lengths = some(0)
    with pytest.raises(ValueError, match="label_smoothing spreads over the children of each state and needs child"):
        sft(log_probs, lengths, label_smoothing=0.1)
    with pytest.raises(ValueError, match=r"child_log_probs has shape .*, but this loss needs \(B, K, L, C\)"):
        sft(log_probs, lengths, child[:, :1], label_smoothing=0.1)
    assert torch.equal(sft(log_probs, lengths, child), sft(log_probs, lengths))


def test_no_nan_beyond_the_end_of_an_id():
    log_probs, child, lengths = some(0)
    child = child.requires_grad_()
    msl(log_probs, child, lengths, 0.5).sum().backward()
    assert child.grad.isfinite().all()
