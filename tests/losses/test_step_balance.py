"""Detailed, subtrajectory and contrastive balance: hand-computed cases, brute force, and identities between them."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from gflowtrl.losses import contrastive_balance, detailed_balance, subtrajectory_balance, trajectory_balance, vargrad
from gflowtrl.losses.common import penalize
from tests.losses.tabular import TabularPolicy, random_tree


def random_case(seed: int, batch: int = 2, count: int = 4) -> dict[str, Tensor]:
    """Scores of a random policy with random (wrong) flows, on a random tree with ids of different lengths."""
    tree = random_tree(seed, num_paths=20)
    generator = torch.Generator().manual_seed(seed)
    logits, flows, rewards = (
        torch.randn(batch, width, dtype=torch.double, generator=generator)
        for width in (tree.num_nodes, tree.num_nodes, tree.num_leaves)
    )
    leaves = torch.randint(tree.num_leaves, (batch, count), generator=generator)
    scores = TabularPolicy(tree, logits).score(leaves, tree.log_flows(2 * rewards), flows)
    return {name: scores[name] for name in ("log_probs", "log_flows", "log_rewards", "lengths")}


def brute_force(case: dict[str, Tensor], lam: float, huber_delta: float | None) -> Tensor:
    """The definition, one sub-path at a time."""
    losses = torch.zeros_like(case["log_rewards"])
    for b, k in torch.cartesian_prod(*map(torch.arange, losses.shape)).tolist():
        length = int(case["lengths"][b, k])
        flows = [*case["log_flows"][b, k, :length].tolist(), case["log_rewards"][b, k].item()]
        steps = case["log_probs"][b, k].tolist()
        above = below = 0.0
        for i in range(length):
            for j in range(i + 1, length + 1):
                residual = torch.tensor(flows[i] + sum(steps[i:j]) - flows[j], dtype=torch.double)
                above += lam ** (j - i) * penalize(residual, huber_delta)
                below += lam ** (j - i)
        losses[b, k] = above / below
    return losses


SEEDS = st.integers(0, 10_000)
DELTAS = st.sampled_from([None, 0.5, 2.0])


@settings(max_examples=15, deadline=None)
@given(SEEDS, st.floats(0.05, 3.0), DELTAS)
def test_subtrajectory_balance_equals_its_definition(seed, lam, huber_delta):
    case = random_case(seed)
    loss = subtrajectory_balance(**case, lam=lam, huber_delta=huber_delta)
    assert loss.allclose(brute_force(case, lam, huber_delta))


@settings(max_examples=15, deadline=None)
@given(SEEDS, DELTAS)
def test_its_limits_are_trajectory_balance_and_detailed_balance(seed, huber_delta):
    """A huge lambda leaves only the longest sub-path, a tiny one the mean over single steps."""
    case = random_case(seed)
    log_z = case["log_flows"][:, 0, 0]  # log F of the root, the same for all trajectories of a prompt
    assert torch.equal(case["log_flows"][:, :, 0], log_z[:, None].expand_as(case["log_rewards"]))
    full = subtrajectory_balance(**case, lam=1e200, huber_delta=huber_delta)
    assert full.allclose(trajectory_balance(case["log_probs"], case["log_rewards"], log_z, huber_delta))
    steps = subtrajectory_balance(**case, lam=1e-12, huber_delta=huber_delta)
    assert steps.allclose(detailed_balance(**case, huber_delta=huber_delta) / case["lengths"], rtol=1e-6, atol=1e-9)


@settings(max_examples=30, deadline=None)
@given(SEEDS)
def test_steps_telescope_so_detailed_balance_bounds_trajectory_balance(seed):
    """The residuals of the steps add up to the trajectory's, so TB <= length * DB (Cauchy-Schwarz)."""
    case = random_case(seed)
    whole = trajectory_balance(case["log_probs"], case["log_rewards"], case["log_flows"][:, 0, 0])
    assert (whole <= case["lengths"] * detailed_balance(**case) * (1 + 1e-12)).all()


def test_equal_step_residuals_reach_the_bound():
    """A residual of 1/2 at each of three steps: DB 3/4, TB (3/2)^2 = 3 * 3/4."""
    log_probs = torch.tensor([[[-1.0, -2.0, -3.0]]], dtype=torch.double)
    log_flows = torch.tensor([[[5.0, 3.5, 1.0]]], dtype=torch.double)
    log_rewards = torch.tensor([[-2.5]], dtype=torch.double)
    assert detailed_balance(log_probs, log_flows, log_rewards, torch.tensor([[3]])).item() == 0.75
    assert trajectory_balance(log_probs, log_rewards, log_flows[:, 0, 0]).item() == 2.25


def test_step_balances_by_hand_with_junk_after_the_end():
    """log F = (3, 1), log pi = (-1, -2), log R = 0.5: steps 1 and -1.5, path -0.5. The second id has one token."""
    nan, inf = torch.nan, torch.inf
    log_probs = torch.tensor([[[-1.0, -2.0, nan], [-1.0, nan, -inf]]], requires_grad=True)
    log_flows = torch.tensor([[[3.0, 1.0, nan], [3.0, 8.0, inf]]], requires_grad=True)
    log_rewards, lengths = torch.tensor([[0.5, 0.5]]), torch.tensor([[2, 1]])
    case = (log_probs, log_flows, log_rewards, lengths)
    loss = detailed_balance(*case)
    assert loss.tolist() == [[1 + 2.25, 2.25]]
    assert detailed_balance(*case, huber_delta=1.0).tolist() == [[1 + 2.0, 2.0]]
    assert torch.autograd.grad(loss.sum(), log_probs)[0].tolist() == [[[2.0, -3.0, 0.0], [3.0, 0.0, 0.0]]]
    loss = detailed_balance(*case)
    assert torch.autograd.grad(loss.sum(), log_flows)[0].tolist() == [[[2.0, -5.0, 0.0], [3.0, 0.0, 0.0]]]
    loss = subtrajectory_balance(*case, lam=0.5)
    torch.testing.assert_close(loss, torch.tensor([[(0.5 * 3.25 + 0.25 * 0.25) / 1.25, 2.25]]))
    for gradient in torch.autograd.grad(loss.sum(), (log_probs, log_flows)):
        assert gradient.isfinite().all()


def test_contrastive_balance_by_hand():
    """Surpluses 0, 1 and 4: residuals 1, 4 and 3, of which Huber with delta 2 makes 1, 12 and 8."""
    log_probs = torch.tensor([[[-1.0, -1.0], [-1.0, 0.0], [-1.0, -1.0]]])
    log_rewards = torch.tensor([[-2.0, -2.0, -6.0]])
    assert contrastive_balance(log_probs, log_rewards, delta=None).tolist() == [[8.5, 5.0, 12.5]]
    assert contrastive_balance(log_probs, log_rewards, delta=2.0).tolist() == [[6.5, 4.5, 10.0]]
    assert torch.equal(
        contrastive_balance(log_probs, log_rewards), contrastive_balance(log_probs, log_rewards, delta=1.0)
    )


@settings(max_examples=20, deadline=None)
@given(SEEDS, st.sampled_from([None, 1.0]), st.floats(-50, 50), st.randoms())
def test_contrastive_balance_ignores_the_scale_and_follows_the_order(seed, delta, shift, chance):
    case = random_case(seed)
    loss = contrastive_balance(case["log_probs"], case["log_rewards"], delta)
    scaled = contrastive_balance(case["log_probs"], case["log_rewards"] + shift, delta)
    assert loss.allclose(scaled)
    order = chance.sample(range(4), 4)
    assert contrastive_balance(case["log_probs"][:, order], case["log_rewards"][:, order], delta).allclose(
        loss[:, order]
    )


def test_an_outlier_leaves_other_pairs_alone_but_moves_the_mean_of_vargrad():
    """Two balanced trajectories and one with an absurd reward: how strongly does it push the other two?"""
    surplus = torch.zeros(1, 3, 1, dtype=torch.double, requires_grad=True)
    log_rewards = torch.tensor([[0.0, 0.0, 100.0]], dtype=torch.double)
    pairs = contrastive_balance(surplus, log_rewards, delta=1.0).sum()
    group = vargrad(surplus, log_rewards).sum()
    one, other = (torch.autograd.grad(loss, surplus)[0].flatten() for loss in (pairs, group))
    assert one[0] == one[1] and one[0].abs() == 2.0  # one bounded pull
    assert math.isclose(other[0].item(), 200 / 3)


@pytest.mark.parametrize("loss", [detailed_balance, subtrajectory_balance])
def test_single_token_ids_make_all_step_balances_trajectory_balance(loss):
    case = {name: value[..., :1] if value.ndim == 3 else value for name, value in random_case(5).items()}
    case["lengths"] = torch.ones_like(case["lengths"])
    whole = trajectory_balance(case["log_probs"], case["log_rewards"], case["log_flows"][:, 0, 0])
    assert loss(**case).allclose(whole)
