"""Losses compared with enumeration of all leaves: fixed points, identities, gradients, learning on a small tree."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from gflowtrl.losses import (
    LOSSES,
    LossInputs,
    contrastive_balance,
    detailed_balance,
    exact_flow,
    get_loss,
    normalized_flows,
    sft,
    subtrajectory_balance,
    trajectory_balance,
    vargrad,
)
from gflowtrl.losses.common import penalize
from gflowtrl.rewards import DenseReward, RewardResult
from tests.losses.tabular import TabularPolicy, random_tree


PROMPTS = 3
SEEDS = (0, 1, 2)
# Without sft, which has no target distribution: it follows its data.
BALANCE = (
    "trajectory_balance", "vargrad", "contrastive_balance", "detailed_balance", "subtrajectory_balance", "exact_flow",
)  # fmt: skip


class Problem:
    """A random tree, three prompts with different rewards (log R of standard deviation 2), all in double precision."""

    def __init__(self, seed: int, num_paths: int = 40):
        self.tree = random_tree(seed, num_paths)
        self.generator = torch.Generator().manual_seed(100 + seed)
        self.log_rewards = 2 * self.randn(PROMPTS, self.tree.num_leaves)
        self.log_flows = self.tree.log_flows(self.log_rewards)
        self.log_z = self.log_rewards.logsumexp(1)
        self.target = self.log_rewards - self.log_z[:, None]
        self.all_leaves = torch.arange(self.tree.num_leaves).expand(PROMPTS, -1)

    def randn(self, *shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.double, generator=self.generator)

    def random_policy(self) -> TabularPolicy:
        return TabularPolicy(self.tree, self.randn(PROMPTS, self.tree.num_nodes).requires_grad_())

    def ideal_policy(self) -> TabularPolicy:
        """Softmax over siblings of log F is F(child) / F(state): the target policy."""
        return TabularPolicy(self.tree, self.log_flows.clone().requires_grad_())

    def loss(
        self, name: str, policy: TabularPolicy, leaves: Tensor, log_z: Tensor | None = None,
        learned: Tensor | None = None, **options,
    ) -> Tensor:  # fmt: skip
        """`learned (B, M)`: the flow head's log F of every node."""
        return LOSSES[name](LossInputs(**policy.score(leaves, self.log_flows, learned), log_z=log_z), **options)


@pytest.fixture(params=SEEDS)
def problem(request) -> Problem:
    return Problem(request.param)


def test_the_random_trees_have_ids_of_different_length(problem):
    assert problem.tree.leaf_lengths.unique().numel() > 1
    assert problem.random_policy().leaf_log_probs().exp().sum(1).allclose(torch.ones(1, dtype=torch.double))


# ------------------------------------------------------------------------------------------------------ fixed points
@pytest.mark.parametrize(
    "given",
    [
        {}, {"huber_delta": 1.0, "delta": 1.0}, {"penalty": "shifted_cosh", "delta": None},
        {"penalty": "linex", "delta": None}, {"penalty": "linex", "delta": None, "linex_alpha": -0.5},
    ],
    ids=["squared", "huber", "shifted cosh", "linex", "linex -.5"],
)  # fmt: skip
@pytest.mark.parametrize("name", BALANCE)
def test_loss_and_gradient_are_zero_at_the_target_and_nowhere_else(problem, name, given):
    log_z, flows = problem.log_z.clone().requires_grad_(), problem.log_flows.clone().requires_grad_()
    ideal, other = problem.ideal_policy(), problem.random_policy()
    options = {option: value for option, value in given.items() if option in LOSSES[name].options}
    loss = problem.loss(name, ideal, problem.all_leaves, log_z, flows, **options)
    assert loss.shape == problem.all_leaves.shape
    assert loss.abs().max() < 1e-20 or (name == "exact_flow" and loss.abs().max() < 1e-13)
    inputs = LOSSES[name].inputs
    parameters = [ideal.logits] + [log_z] * ("log_z" in inputs) + [flows] * ("log_flows" in inputs)
    for gradient in torch.autograd.grad(loss.sum(), parameters):
        assert gradient.abs().max() < 1e-12

    loss = problem.loss(name, other, problem.all_leaves, log_z, flows, **options)
    (gradient,) = torch.autograd.grad(loss.sum(), other.logits)
    assert (loss.mean(1) > 0.1).all() and gradient.abs().max() > 0.1


def test_a_wrong_log_z_is_seen_by_trajectory_balance(problem):
    loss = problem.loss("trajectory_balance", problem.ideal_policy(), problem.all_leaves, problem.log_z + 0.5)
    assert loss.allclose(torch.full_like(loss, 0.25))


def test_sft_under_the_target_is_stationary_at_the_target_and_equals_its_entropy(problem):
    policy = problem.ideal_policy()
    expected = (problem.target.exp() * problem.loss("sft", policy, problem.all_leaves)).sum(1)
    assert expected.allclose(-(problem.target.exp() * problem.target).sum(1))
    assert torch.autograd.grad(expected.sum(), policy.logits)[0].abs().max() < 1e-12


# -------------------------------------------------------------------------------------------------------- identities
@pytest.mark.parametrize("loss", [vargrad, contrastive_balance])
def test_scaling_the_reward_changes_nothing(problem, loss):
    scores = problem.random_policy().score(problem.all_leaves, problem.log_flows)
    factor = problem.randn(PROMPTS, 1)
    one = loss(scores["log_probs"], scores["log_rewards"])
    other = loss(scores["log_probs"], scores["log_rewards"] + factor)
    assert one.allclose(other)
    tb = [trajectory_balance(scores["log_probs"], scores["log_rewards"] + f, problem.log_z) for f in (0, factor)]
    assert not tb[0].allclose(tb[1])


def test_vargrad_is_the_sum_over_pairs_of_contrastive_residuals(problem):
    """In value and in gradient, with the pairs computed by brute force and by the loss."""
    policy = problem.random_policy()
    scores = policy.score(problem.all_leaves[:, :6], problem.log_flows)
    surplus = (scores["log_probs"].sum(-1) - scores["log_rewards"]).T
    pairs = sum((surplus[i] - surplus[j]).square() for i, j in itertools.combinations(range(6), 2))
    ours = contrastive_balance(scores["log_probs"], scores["log_rewards"], delta=None).sum(1) * 5 / 2
    theirs = 6 * vargrad(scores["log_probs"], scores["log_rewards"]).sum(1)
    assert pairs.allclose(ours) and pairs.allclose(theirs)
    one, other = (torch.autograd.grad(loss.sum(), policy.logits, retain_graph=True)[0] for loss in (ours, theirs))
    assert one.allclose(other, atol=1e-12) and one.abs().max() > 0.1


def test_vargrad_is_trajectory_balance_with_the_mean_log_z(problem):
    scores = problem.random_policy().score(problem.all_leaves, problem.log_flows)
    log_z = (scores["log_rewards"] - scores["log_probs"].sum(-1)).mean(1)
    assert vargrad(scores["log_probs"], scores["log_rewards"]).allclose(
        trajectory_balance(scores["log_probs"], scores["log_rewards"], log_z)
    )


def test_stopping_the_gradient_of_the_mean_matters_only_with_huber(problem):
    policy = problem.random_policy()
    scores = policy.score(problem.all_leaves, problem.log_flows)
    surplus = scores["log_probs"].sum(-1) - scores["log_rewards"]
    residual = surplus - surplus.mean(1, keepdim=True)  # the mean with its gradient
    for huber_delta, same in ((None, True), (0.5, False)):
        stopped = vargrad(scores["log_probs"], scores["log_rewards"], huber_delta).mean()
        flowing = penalize(residual, huber_delta).mean()
        one, other = (torch.autograd.grad(loss, policy.logits, retain_graph=True)[0] for loss in (stopped, flowing))
        assert stopped.allclose(flowing) and one.allclose(other, atol=1e-14) == same


def test_on_policy_gradient_of_trajectory_balance_is_twice_that_of_the_divergence(problem):
    policy = problem.random_policy()
    log_probs = policy.leaf_log_probs()
    for log_z in (problem.log_z, problem.log_z + 3):  # the expectation does not depend on log Z
        loss = problem.loss("trajectory_balance", policy, problem.all_leaves, log_z)
        expected = (log_probs.detach().exp() * loss).sum()
        divergence = (log_probs.exp() * (log_probs - problem.target)).sum()
        ours, theirs = (torch.autograd.grad(v, policy.logits, retain_graph=True)[0] for v in (expected, divergence))
        assert theirs.abs().max() > 0.01
        assert ours.allclose(2 * theirs, atol=1e-12)


@pytest.mark.parametrize("impossible", [False, True])
def test_exact_flow_under_the_target_is_the_divergence_over_leaves(problem, impossible):
    """The chain rule of the KL divergence, also if some leaves and whole subtrees have no reward."""
    if impossible:
        problem.log_rewards[:, : problem.tree.num_leaves // 3] = -torch.inf
        problem.log_flows = problem.tree.log_flows(problem.log_rewards)
        problem.target = problem.log_rewards.log_softmax(1)
    policy = problem.random_policy()
    weights = problem.target.exp()
    expected = (weights * problem.loss("exact_flow", policy, problem.all_leaves)).sum(1)
    log_ratio = torch.where(weights > 0, problem.target - policy.leaf_log_probs(), 0.0)
    divergence = (weights * log_ratio).sum(1)
    assert expected.allclose(divergence)
    ours, theirs = (torch.autograd.grad(v.sum(), policy.logits, retain_graph=True)[0] for v in (expected, divergence))
    assert ours.isfinite().all() and ours.allclose(theirs, atol=1e-12)


def test_normalized_flows_are_ratios_of_flows(problem):
    children = problem.random_policy().children_of(problem.all_leaves)
    result = RewardResult(problem.log_rewards, problem.log_rewards.exp(), {}, torch.zeros(()))
    targets = normalized_flows(DenseReward(result, problem.tree).log_flows(children))
    parents = problem.tree.walk(problem.all_leaves)[..., :-1]
    for b, k, step, c in torch.nonzero(children >= 0)[::7].tolist():
        flows = problem.log_flows[b]
        expected = flows[children[b, k, step, c]] - flows[parents[b, k, step]]
        assert targets[b, k, step, c].isclose(expected)
    assert (targets[children < 0] == -torch.inf).all()


# ---------------------------------------------------------------------------------------------- padding and gradients
#: Losses that need only scores and rewards; the others are in test_prefix.py and test_baselines.py.
ON_SCORES = sorted(name for name, loss in LOSSES.items() if loss.needs_log_rewards or name in ("sft", "msl", "bear"))


@pytest.mark.parametrize("name", ON_SCORES)
def test_padding_more_steps_and_children_changes_nothing(problem, name):
    policy = problem.random_policy()
    tensors = {**policy.score(problem.all_leaves, problem.log_flows), "log_z": problem.log_z}
    padded = dict(tensors)
    padded["log_probs"] = torch.nn.functional.pad(tensors["log_probs"], (0, 2))
    for key in ("child_log_probs", "child_target_log_probs"):
        padded[key] = torch.nn.functional.pad(tensors[key], (0, 3, 0, 2), value=-torch.inf)
    padded["log_flows"] = torch.nn.functional.pad(tensors["log_flows"], (0, 2), value=7.0)
    assert LOSSES[name](LossInputs(**padded)).allclose(LOSSES[name](LossInputs(**tensors)))


@pytest.mark.parametrize("name", [name for name in ON_SCORES if name != "bear"])  # its weights have no gradient
def test_gradients_are_those_of_the_value(name):
    problem = Problem(seed=0, num_paths=8)
    leaves = problem.all_leaves[:, :5]

    def loss(logits: Tensor, log_z: Tensor, flows: Tensor) -> Tensor:
        return problem.loss(name, TabularPolicy(problem.tree, logits), leaves, log_z, flows)

    logits = problem.randn(PROMPTS, problem.tree.num_nodes).requires_grad_()
    log_z = problem.randn(PROMPTS).requires_grad_("log_z" in LOSSES[name].inputs)
    flows = problem.randn(PROMPTS, problem.tree.num_nodes).requires_grad_("log_flows" in LOSSES[name].inputs)
    if name == "vargrad":  # its mean carries no gradient, so only the mean over the group is the value's gradient
        assert torch.autograd.gradcheck(lambda *inputs: loss(*inputs).mean(1), (logits, log_z, flows))
    else:
        assert torch.autograd.gradcheck(loss, (logits, log_z, flows))


def test_exact_flow_by_hand_with_padding_impossible_children_and_junk_after_the_end():
    """Target (3/4, 1/4, none) against (1/2, 1/2, none), then a certain child. The second id ends after one step."""
    first, junk = [0.75, 0.25, 0], [0.1, 0.2, 0.7]
    target = torch.tensor([[[first, [1, 0, 0]], [first, junk]]]).log()
    policy = torch.tensor([[[[0.5, 0.5, 0], [0.25, 0.75, 0]], [[0.5, 0.5, 0], [torch.nan, 0, 1]]]]).log()
    target.requires_grad_(), policy.requires_grad_()
    loss = exact_flow(policy, target, torch.tensor([[2, 1]]))
    kl = 0.75 * torch.tensor(1.5).log() + 0.25 * torch.tensor(0.5).log()
    assert loss.allclose(torch.stack([kl + torch.tensor(4.0).log(), kl])[None])
    loss.sum().backward()
    assert policy.grad.tolist() == [[[[-0.75, -0.25, 0], [-1, 0, 0]], [[-0.75, -0.25, 0], [0, 0, 0]]]]
    assert target.grad.isfinite().all()


def test_values_after_the_end_of_an_id_are_ignored():
    log_probs = torch.tensor([[[-1.0, -2.0, -torch.inf], [-1.0, -2.0, -4.0]]], requires_grad=True)
    loss = sft(log_probs, torch.tensor([[2, 3]]))
    assert loss.tolist() == [[3.0, 7.0]]
    assert torch.autograd.grad(loss.sum(), log_probs)[0].tolist() == [[[-1, -1, 0], [-1, -1, -1]]]


def test_huber_by_hand():
    residual = torch.tensor([-3.0, -1.0, 0.5, 2.0])
    assert penalize(residual).tolist() == [9.0, 1.0, 0.25, 4.0]
    assert penalize(residual, 1.0).tolist() == [5.0, 1.0, 0.25, 3.0]
    assert torch.equal(penalize(residual, 100.0), penalize(residual))


# ---------------------------------------------------------------------------------------------- registry and bad input
def test_the_registry_states_what_each_loss_needs():
    needs = {
        n: (
            "log_z" in s.inputs,
            "log_flows" in s.inputs,
            s.needs_all_rewards,
            s.min_generations,
            s.needs_rewards,
            s.uses_target,
        )
        for n, s in LOSSES.items()
    }
    assert needs == {
        "trajectory_balance": (True, False, False, 1, True, False),
        "vargrad": (False, False, False, 2, True, False),
        "contrastive_balance": (False, False, False, 2, True, False),
        "detailed_balance": (False, True, False, 1, True, False),
        "subtrajectory_balance": (False, True, False, 1, True, False),
        "exact_flow": (False, False, True, 1, True, False),
        "sft": (False, False, False, 1, False, True),
        "prefix_pointwise": (False, False, False, 1, False, True),
        "prefix_pairwise": (False, False, False, 2, False, True),
        "msl": (False, False, False, 1, False, True),
        "sdpo": (False, False, False, 2, False, True),
        "bear": (False, False, False, 1, False, True),
        "ipa": (False, False, False, 2, True, False),
        "grpo": (False, False, False, 2, True, False),
        "sibling_grpo": (False, False, False, 2, True, False),
        "gbpo": (False, False, False, 1, True, False),
        "flowrl": (True, False, False, 2, True, False),
    }
    assert {n for n, s in LOSSES.items() if s.needs_reference} == {"sdpo", "ipa", "grpo", "sibling_grpo", "flowrl"}
    rewarded = {n for n, s in LOSSES.items() if s.needs_rewards}
    assert {n for n, s in LOSSES.items() if s.needs_log_rewards} == rewarded - {
        "ipa", "grpo", "sibling_grpo", "gbpo", "flowrl",
    }  # fmt: skip
    assert {n for n, s in LOSSES.items() if s.needs_flow_heads} == {
        "trajectory_balance", "detailed_balance", "subtrajectory_balance", "flowrl",
    }  # fmt: skip
    assert {n for n, s in LOSSES.items() if s.uses_negatives} == {"prefix_pairwise", "sdpo"}
    assert tuple(LOSSES["subtrajectory_balance"].options) == ("lam", "huber_delta", "penalty", "linex_alpha")
    assert tuple(LOSSES["contrastive_balance"].options) == ("delta", "penalty", "linex_alpha")


def test_an_unknown_loss_lists_the_known_ones():
    with pytest.raises(
        ValueError,
        match="'ppo'.*exact_flow, flowrl, gbpo, grpo, ipa, msl, .*sft, .*subtrajectory_balance, .*vargrad",
    ):
        get_loss("ppo")


@pytest.mark.parametrize("loss", [vargrad, contrastive_balance])
@pytest.mark.parametrize("num_generations", [0, 1])
def test_a_single_trajectory_cannot_be_compared(loss, num_generations):
    with pytest.raises(ValueError, match=f"{loss.__name__}.*least 2 of them, got num_generations={num_generations}"):
        loss(torch.zeros(2, num_generations, 3), torch.zeros(2, num_generations))


def test_shapes_that_would_broadcast_are_errors():
    with pytest.raises(ValueError, match=r"log_z has shape \(2, 1\)"):
        trajectory_balance(torch.zeros(2, 2, 3), torch.zeros(2, 2), torch.zeros(2, 1))
    with pytest.raises(ValueError, match=r"log_rewards has shape \(2, 1\)"):
        vargrad(torch.zeros(2, 2, 3), torch.zeros(2, 1))
    with pytest.raises(ValueError, match=r"child_target_log_probs has shape \(2, 1, 3, 4\)"):
        exact_flow(torch.zeros(2, 2, 3, 4), torch.zeros(2, 1, 3, 4), torch.ones(2, 2))
    with pytest.raises(ValueError, match=r"lengths has shape \(2,\)"):
        sft(torch.zeros(2, 2, 3), torch.ones(2))
    for loss in (detailed_balance, subtrajectory_balance):
        with pytest.raises(ValueError, match=r"log_flows has shape \(2, 1, 3\)"):
            loss(torch.zeros(2, 2, 3), torch.zeros(2, 1, 3), torch.zeros(2, 2), torch.ones(2, 2))
        with pytest.raises(ValueError, match=r"log_rewards has shape \(2, 1\)"):
            loss(torch.zeros(2, 2, 3), torch.zeros(2, 2, 3), torch.zeros(2, 1), torch.ones(2, 2))
    with pytest.raises(ValueError, match=r"log_rewards has shape \(1, 2\)"):
        contrastive_balance(torch.zeros(2, 2, 3), torch.zeros(1, 2))


def test_a_missing_tensor_and_a_bad_delta_are_named():
    with pytest.raises(ValueError, match="'trajectory_balance' needs log_z"):
        LOSSES["trajectory_balance"](LossInputs(torch.zeros(1, 1, 1), torch.ones(1, 1), log_rewards=torch.zeros(1, 1)))
    with pytest.raises(ValueError, match="huber_delta is 0; it must be a finite number above 0"):
        penalize(torch.zeros(1), 0)
    for lam in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match=f"lam is {lam}"):
            subtrajectory_balance(*[torch.zeros(1, 1, 1)] * 2, torch.zeros(1, 1), torch.ones(1, 1), lam=lam)


# ---------------------------------------------------------------------------------------------------------- learning
@pytest.mark.parametrize("name", ON_SCORES)
def test_learning_reaches_the_target_from_a_uniform_policy(name):
    """Total variation to R / Z over all leaves, from sampled trajectories: half uniform, half on policy."""
    problem = Problem(seed=3, num_paths=60)
    logits = torch.zeros(PROMPTS, problem.tree.num_nodes, dtype=torch.double, requires_grad=True)
    policy, log_z = TabularPolicy(problem.tree, logits), torch.zeros(PROMPTS, dtype=torch.double, requires_grad=True)
    flows = torch.zeros_like(logits, requires_grad=True)
    steps = 500
    optimizer = torch.optim.Adam([{"params": [logits], "lr": 0.1}, {"params": [log_z, flows], "lr": 0.3}])
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)

    def total_variation() -> float:
        return (0.5 * (policy.leaf_log_probs().exp() - problem.target.exp()).abs().sum(1)).max().item()

    def draw(probs: Tensor, num: int) -> Tensor:
        return torch.multinomial(probs, num, replacement=True, generator=problem.generator)

    untrained = total_variation()
    for _ in range(steps):
        if LOSSES[name].uses_target:  # supervised: observations are drawn from the target
            leaves = draw(problem.target.exp(), 64)
        else:
            leaves = torch.cat([draw(torch.ones_like(problem.target), 8), draw(policy.leaf_log_probs().exp(), 8)], 1)
        problem.loss(name, policy, leaves, log_z, flows).mean().backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    trained = total_variation()
    print(f"{name}: total variation {untrained:.3f} untrained, {trained:.4f} trained")
    assert untrained > 0.5 and trained < 0.05
    if name == "trajectory_balance":
        assert log_z.allclose(problem.log_z, atol=0.05)
    if "log_flows" in LOSSES[name].inputs:  # log F is learned too, at every state that is not a leaf
        inner = problem.tree.num_children > 0
        assert (flows - problem.log_flows)[:, inner].abs().max() < 0.3


@pytest.mark.parametrize("seed", [0, 1])
def test_exact_flow_averages_different_rewards_of_a_prompt_and_vargrad_their_logarithms(seed):
    """One history with two targets: exact flows learn the mean of R / Z, VarGrad the geometric mean of R."""
    leaves = 7
    log_rewards = 2 * torch.randn(2, leaves, generator=torch.Generator().manual_seed(seed), dtype=torch.double)

    def gradients(policy: Tensor) -> dict[str, Tensor]:
        logits = policy.log().expand(2, -1).clone().requires_grad_()
        log_probs = logits.log_softmax(1)
        lengths = torch.ones(2, leaves, dtype=torch.long)
        every = [values[:, None, None].expand(-1, leaves, 1, -1) for values in (log_probs, log_rewards.log_softmax(1))]
        losses = {
            "vargrad": vargrad(log_probs[..., None], log_rewards).mean(),
            "exact_flow": exact_flow(*every, lengths).mean(),
        }
        return {n: torch.autograd.grad(loss, logits, retain_graph=True)[0].sum(0) for n, loss in losses.items()}

    arithmetic = gradients(log_rewards.softmax(1).mean(0))
    geometric = gradients(log_rewards.mean(0).softmax(0))
    assert arithmetic["exact_flow"].abs().max() < 1e-12 < 1e-3 < arithmetic["vargrad"].abs().max()
    assert geometric["vargrad"].abs().max() < 1e-12 < 1e-3 < geometric["exact_flow"].abs().max()
