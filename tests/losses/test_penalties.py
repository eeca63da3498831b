"""Penalties of residuals compared with figures of torchgfn 2.4.1 and with the divergences that they stand for."""

import pytest
import torch

from gflowtrl.losses import contrastive_balance, trajectory_balance
from gflowtrl.losses.common import penalize


POINTS = [-2.0, -0.5, 0.5, 2.0]
# Penalty, slope, values and derivatives of torchgfn's loss at POINTS.
TORCHGFN = [
    ("squared", None, [4, 0.25, 0.25, 4], [-4, -1, 1, 4]),
    ("shifted_cosh", None, [5.524391, 0.255252, 0.255252, 5.524391], [-7.253721, -1.042191, 1.042191, 7.253721]),
    ("linex", 1.0, [1.135335, 0.106531, 0.148721, 4.389056], [-0.864665, -0.393469, 0.648721, 6.389056]),
    ("linex", 0.5, [1.471518, 0.115203, 0.136102, 2.873127], [-1.264241, -0.442398, 0.568051, 3.436564]),
    ("linex", -1.0, [4.389056, 0.148721, 0.106531, 1.135335], [-6.389056, -0.648721, 0.393469, 0.864665]),
]


def close(found, expected) -> bool:
    return torch.allclose(found, torch.tensor(expected, dtype=torch.double), rtol=0, atol=6e-7)


@pytest.mark.parametrize(("penalty", "alpha", "values", "slopes"), TORCHGFN)
def test_penalties(penalty, alpha, values, slopes):
    """linex is applied to minus the residual."""
    points = torch.tensor(POINTS, dtype=torch.double, requires_grad=True)
    residual = -points if penalty == "linex" else points
    found = penalize(residual, None, penalty, alpha)
    assert close(found, values)
    assert close(torch.autograd.grad(found.sum(), points)[0], slopes)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, [1.96, 0.827077, 1.456494]), ({"penalty": "shifted_cosh"}, [2.301797, 0.885677, 1.642084]),
        ({"penalty": "linex"}, [1.655200, 0.312188, 1.136094]),
        ({"penalty": "linex", "linex_alpha": -1.0}, [0.646597, 0.573489, 0.505990]),  # torchgfn's sign
        ({"penalty": "linex", "linex_alpha": 0.5}, [1.255011, 0.357381, 0.899786]),
        ({"penalty": "linex", "linex_alpha": -0.5}, [0.786341, 0.484046, 0.601443]),
    ],
)  # fmt: skip
def test_trajectory_balance_with_each_penalty(options, expected):
    log_probs = torch.tensor([[[-0.5, -1, -0.2], [-0.7, -0.3, 0], [-1.2, -0.6, -0.4]]], dtype=torch.double)
    rewards = torch.tensor([[1.0, 0.2, 0.5]], dtype=torch.double)
    assert close(trajectory_balance(log_probs, rewards.log(), torch.tensor([0.3]).double(), **options)[0], expected)


@pytest.mark.parametrize(
    ("options", "divergence", "expected"),
    [
        ({"penalty": "linex"}, lambda p, pi: (p * (p / pi).log()).sum(), [-0.277248, -0.104241, 0.381489]),
        (
            {"penalty": "linex", "linex_alpha": -1.0}, lambda p, pi: ((pi - p).square() / p).sum() / 2,
            [-0.671889, -0.385086, 1.056975],
        ),
        ({}, lambda p, pi: 2 * (pi * (pi / p).log()).sum(), None),
    ],
    ids=["linex: KL(R/Z || pi)", "torchgfn's linex: chi-squared", "squared: 2 KL(pi || R/Z)"],
)  # fmt: skip
def test_on_policy_gradients_are_those_of_divergences(options, divergence, expected):
    logits = torch.tensor([0.3, -0.2, 0.7], dtype=torch.double, requires_grad=True)
    target = torch.tensor([0.6, 0.3, 0.1], dtype=torch.double)
    log_pi = logits.log_softmax(-1)
    loss = trajectory_balance(
        log_pi[None, :, None], (5 * target).log()[None], torch.tensor([5.0]).double().log(), **options
    )
    ours = torch.autograd.grad((log_pi.exp().detach() * loss[0]).sum(), logits, retain_graph=True)[0]
    theirs = torch.autograd.grad(divergence(target, log_pi.exp()), logits)[0]
    assert torch.allclose(ours, theirs, atol=1e-12)
    if expected is not None:
        assert close(ours, expected)


def test_linex_of_pairs_is_half_of_shifted_cosh():
    log_probs, log_rewards = torch.randn(2, 4, 3), torch.randn(2, 4)
    linex, cosh = (
        contrastive_balance(log_probs, log_rewards, None, penalty).sum(1) for penalty in ("linex", "shifted_cosh")
    )
    assert torch.allclose(linex, cosh / 2)


@pytest.mark.parametrize(("penalty", "alpha"), [("shifted_cosh", None), ("linex", 1.0), ("linex", -1.0)])
def test_large_residuals_stay_finite_and_never_grow(penalty, alpha):
    residual = torch.tensor([-1e4, -90.0, 90.0, 1e4], requires_grad=True)
    found = penalize(residual, None, penalty, alpha)
    slopes = torch.autograd.grad(found.sum(), residual)[0]
    assert found.isfinite().all() and slopes.isfinite().all()
    assert (slopes * residual >= 0).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"penalty": "huber"}, "penalty is 'huber'; choose 'squared' or 'shifted_cosh' or 'linex'"),
        ({"penalty": "linex", "linex_alpha": 0}, "linex_alpha is 0; it must be a finite number other than 0"),
        (
            {"linex_alpha": 1.0},
            "linex_alpha is 1.0, but penalty is 'squared'; use penalty='linex', or linex_alpha=None",
        ),
        (
            {"penalty": "linex", "huber_delta": 1.0},
            "huber_delta is 1.0, but penalty is 'linex'; use penalty='squared'",
        ),
        (
            {"penalty": "linex", "huber_delta": 1.0, "delta_name": "delta"},
            "^delta is 1.0, but penalty is 'linex'; use penalty='squared', or delta=None",
        ),
    ],
)
def test_options_of_another_penalty_are_errors(options, message):
    with pytest.raises(ValueError, match=message):
        penalize(torch.zeros(2), **options)
