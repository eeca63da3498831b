"""Rival objectives compared with plain loops, which reproduce figures computed with the authors' own code.

The loops know an old policy, for several updates per group. The library makes one update, where the old policy is the
policy itself.
"""

import math

import pytest
import torch
from torch import Tensor

from gflowtrl.losses import bear, flowrl, gbpo, group_advantages, grpo, ipa, sibling_grpo
from gflowtrl.losses.sibling_grpo import sibling_advantages


# One prompt, three ids of up to three tokens.
LENGTHS = [3, 2, 3]
REWARDS = torch.tensor([[1.0, 0.2, 0.5]], dtype=torch.double)
LOG_PROBS = torch.tensor([[[-0.5, -1.0, -0.2], [-0.7, -0.3, 0.0], [-1.2, -0.6, -0.4]]], dtype=torch.double)
REFERENCE = torch.tensor([[[-0.6, -0.9, -0.4], [-0.5, -0.5, 0.0], [-1.0, -0.8, -0.3]]], dtype=torch.double)
OLD = torch.tensor([[[-0.8, -1.1, -0.2], [-0.9, -0.6, 0.0], [-1.3, -0.3, -0.5]]], dtype=torch.double)
NUM_TOKENS = torch.tensor([LENGTHS])
CENTERED = [r - 17 / 30 for r in (1.0, 0.2, 0.5)]
NORMALIZED = [c / (math.sqrt(sum(d * d for d in CENTERED) / 2) + 1e-4) for c in CENTERED]


def close(value, expected) -> bool:
    """Whether all figures are equal to 6 digits after the point."""
    value = torch.as_tensor(value, dtype=torch.double)
    return torch.allclose(value, torch.tensor(expected, dtype=torch.double).view_as(value), rtol=0, atol=6e-7)


def gradient_of(loss, *tensors: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(loss, tensors))


def clipped(ratio: Tensor, advantage: float, low: float, high: float) -> Tensor:
    """PPO's clipped term, as a loss."""
    return -torch.minimum(ratio * advantage, ratio.clamp(1 - low, 1 + high) * advantage)


def by_hand(
    log_probs: Tensor, old: Tensor, advantages: list[float], average: str = "grpo", level: str = "token",
    clip: tuple[float, float] = (0.2, 0.2), beta: float = 0.0, corrected: bool = True, early: float | None = None,
) -> Tensor:  # fmt: skip
    """The losses of TRL's GRPOTrainer and ECPO (`early` is its delta) with an old policy, per trajectory `(3,)`.

    `average`: tokens within each trajectory, over the batch, by the longest id, or not at all ("sum").
    """
    rows = []
    for k, length in enumerate(LENGTHS):
        new, before = log_probs[0, k, :length], old[0, k, :length]
        if level == "sequence":  # GSPO, its mean over tokens; ECPO uses the sum
            change = (new - before).sum() / (1 if average == "sum" else length)
            ratio = change.exp().expand(length) if average != "sum" else change.exp()[None]
        else:
            ratio = (new - before).exp()
        if early is not None:
            most = 1 + clip[0] + early
            ratio = torch.where(ratio.detach() > most, most * ratio / ratio.detach(), ratio)
        tokens = clipped(ratio, advantages[k], *clip)
        d = REFERENCE[0, k, :length] - new
        divergence = d.exp() - d - 1
        if beta:
            tokens = tokens + beta * divergence * (ratio if corrected else 1.0)
        scale = {"grpo": 1 / length, "batch": 3 / sum(LENGTHS), "dr_grpo": 1 / 3, "sum": 1.0}[average]
        rows.append(tokens.sum() * scale)
    return torch.stack(rows)


# Rows of: options of `by_hand` with the old policy, the loss, its gradient. From TRL 1.16's GRPOTrainer.
WITH_OLD = {
    "grpo": (
        {}, 0.050201,
        [[0, -0.131633, -0.119106], [0.184644, 0.204063, 0], [0.020251, 0, 0.020251]],
    ),
    "grpo, KL": (
        {"beta": 0.04}, 0.050874,
        [[0.000600, -0.132124, -0.118217], [0.183015, 0.205863, 0], [0.019269, 0.000659, 0.019760]],
    ),
    "grpo, KL without correction": (
        {"beta": 0.04, "corrected": False}, 0.050798,
        [[0.000423, -0.132100, -0.118301], [0.183168, 0.205271, 0], [0.019267, 0.000806, 0.019784]],
    ),
    "dapo": (
        {"average": "batch", "clip": (0.2, 0.28)}, -0.100008,
        [[0, -0.148087, -0.133995], [0.138483, 0.153047, 0], [0.022783, 0, 0.022783]],
    ),
    "bnpo": (
        {"average": "batch"}, -0.089288,
        [[0, -0.148087, -0.133995], [0.138483, 0.153047, 0], [0.022783, 0, 0.022783]],
    ),
    "dr_grpo": (
        {"average": "dr_grpo", "advantages": CENTERED}, -0.032084,
        [[0, -0.053212, -0.048148], [0.049761, 0.054994, 0], [0.008186, 0, 0.008186]],
    ),
    "gspo": (
        {"level": "sequence"}, 0.033107,
        [[-0.136095] * 3, [0.194110, 0.194110, 0], [0.017723] * 3],
    ),
    "gspo, narrow": (
        {"level": "sequence", "clip": (3e-4, 4e-4)}, 0.085715,
        [[0] * 3, [0.194110, 0.194110, 0], [0] * 3],
    ),
}  # fmt: skip
# From the paper of ECPO (OneRec, arXiv 2506.13695), for which no code is public.
WITH_OLD["ecpo, sequence"] = (
    {"level": "sequence", "average": "sum", "early": 0.1}, 0.014009,
    [[0] * 3, [0.393051, 0.393051, 0], [0.049741] * 3],
)  # fmt: skip


@pytest.mark.parametrize("name", list(WITH_OLD))
def test_the_loops_reproduce_figures_of_the_authors_code(name):
    options, expected, gradient = WITH_OLD[name]
    options = {"advantages": NORMALIZED} | options
    log_probs = LOG_PROBS.clone().requires_grad_()
    loss = by_hand(log_probs, OLD, **options).mean()
    assert close(loss, [expected])
    assert close(gradient_of(loss, log_probs)[0], gradient)


def test_advantages():
    assert close(group_advantages(REWARDS), [1.071957, -0.907040, -0.164916])
    assert close(group_advantages(REWARDS), NORMALIZED) and close(group_advantages(REWARDS, "none"), CENTERED)
    for value in (0.25, 10.1, 1000.1):  # the mean of eight times 10.1 is rounded
        assert not group_advantages(torch.full((1, 8), value), epsilon=1e-6).any()
    with pytest.raises(ValueError, match="scale_rewards is 'batch'; choose 'group' or 'none'"):
        group_advantages(REWARDS, "batch")


# With one update per group: options of the library, and of the loops with old = log_probs.
FORMS = {
    "grpo": ({}, {}),
    "grpo, KL": ({"beta": 0.04}, {"beta": 0.04, "corrected": False}),
    "grpo, corrected KL": ({"beta": 0.04, "use_bias_correction_kl": True}, {"beta": 0.04}),
    "dapo, bnpo": ({"loss_type": "bnpo"}, {"average": "batch", "clip": (0.2, 0.28)}),
    "dr_grpo": (
        {"loss_type": "dr_grpo", "scale_rewards": "none"}, {"average": "dr_grpo", "advantages": CENTERED}
    ),
    "gspo": ({}, {"level": "sequence", "clip": (3e-4, 4e-4)}),
    "ecpo, tokens": ({}, {"early": 0.1}),
}  # fmt: skip


@pytest.mark.parametrize("name", list(FORMS))
def test_grpo_is_every_form_with_one_update_per_group(name):
    """In value and in gradient, on ids of different lengths."""
    options, other = FORMS[name]
    other = {"advantages": NORMALIZED} | other
    log_probs = LOG_PROBS.clone().requires_grad_()
    ours = grpo(log_probs, REFERENCE, NUM_TOKENS, REWARDS, **{"beta": 0.0} | options)
    theirs = by_hand(log_probs, LOG_PROBS, **other)
    assert torch.allclose(ours[0], theirs, atol=1e-12)
    assert torch.allclose(*(gradient_of(loss.mean(), log_probs)[0] for loss in (ours, theirs)), atol=1e-12)


ONCE = {
    "TRL": (
        {"beta": 0.04, "use_bias_correction_kl": True}, 0.000597,
        [[-0.118662, -0.119551, -0.118217], [0.149840, 0.152507, 0], [0.017435, 0.019213, 0.017880]],
    ),
    "ReRe, beta .04": (
        {"beta": 0.04}, 0.000597,
        [[-0.118683, -0.119574, -0.118301], [0.149697, 0.152382, 0], [0.017340, 0.019130, 0.017857]],
    ),
    "ReRe": (
        {}, 0.000015,
        [[-0.119096, -0.119118, -0.119086], [0.151136, 0.151204, 0], [0.018299, 0.018344, 0.018312]],
    ),
    "ReRe's dapo": (
        {"loss_type": "bnpo"}, -0.113366,
        [[-0.133983, -0.134008, -0.133972], [0.113352, 0.113403, 0], [0.020587, 0.020637, 0.020601]],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", list(ONCE))
def test_grpo_with_one_update_gives_the_figures_of_trl_and_rere(name):
    options, expected, gradient = ONCE[name]
    log_probs = LOG_PROBS.clone().requires_grad_()
    loss = grpo(log_probs, REFERENCE, NUM_TOKENS, REWARDS, **options).mean()
    assert close(loss, [expected])
    assert close(gradient_of(loss, log_probs)[0], gradient)


def test_tokens_are_averaged_in_one_way_if_all_ids_have_one_length():
    two = torch.full((1, 3), 2)
    found = [
        grpo(LOG_PROBS[..., :2], REFERENCE[..., :2], two, REWARDS, loss_type=name)
        for name in ("grpo", "bnpo", "dr_grpo")
    ]
    assert torch.allclose(found[0], found[1]) and torch.allclose(found[0], found[2])
    assert not math.isclose(float(found[0][0, 0]), 0.0)


# --------------------------------------------------------------------------------------------------------- preferences
@pytest.mark.parametrize(("beta", "expected", "slope"), [(1.0, 0.598139, 0.450166), (0.1, 0.683197, 0.049500)])
def test_ipa_is_dpo_on_the_best_and_the_worst(beta, expected, slope):
    log_probs = LOG_PROBS.clone().requires_grad_()
    loss = ipa(log_probs, REFERENCE, NUM_TOKENS, REWARDS, beta)
    assert loss.shape == (1, 1) and close(loss, [expected])
    assert close(gradient_of(loss.sum(), log_probs)[0], [[-slope] * 3, [slope, slope, 0], [0] * 3])


def test_ipa_without_a_difference_in_reward_is_zero():
    """With zero gradient, next to a prompt that has a pair; ties are won by the first."""
    two, same = LOG_PROBS.repeat(2, 1, 1).requires_grad_(), torch.tensor([[0.3, 0.3, 0.3], [0.7, 0.7, 0.1]])
    loss = ipa(two, REFERENCE.repeat(2, 1, 1), NUM_TOKENS.repeat(2, 1), same)
    gradient = gradient_of(loss.sum(), two)[0]
    assert loss[0].tolist() == [0.0] and not gradient[0].any()
    assert gradient[1, 0].all() and not gradient[1, 1].any() and gradient[1, 2].all()


# -------------------------------------------------------------------------------------------------- bounded gradients
def gbpo_by_hand(log_probs: Tensor, old: Tensor, advantages: list[float], level: str) -> Tensor:
    """The formula of OneRec-V2 with an old policy, per trajectory `(3,)`."""
    rows = []
    for k, length in enumerate(LENGTHS):
        new, before = log_probs[0, k, :length], old[0, k, :length].exp()
        if level == "sequence":
            new, before = new.sum()[None], before.prod()[None]
        now = new.detach().exp()
        bound = torch.maximum(before, now if advantages[k] >= 0 else 1 - now)
        rows.append((-new.exp() / bound * advantages[k]).mean())
    return torch.stack(rows)


GBPO = {
    "sequence": (-0.097804, [[-0.333333] * 3, [0.193992, 0.193992, 0], [0.041537] * 3]),
    "token": (0.309049, [[-0.111111] * 3, [0.164406, 0.224976, 0], [0.047890, 0.082313, 0.122797]]),
}
SIGNS = torch.tensor([[1.0, -1.0, -1.0]], dtype=torch.double)


@pytest.mark.parametrize("level", list(GBPO))
def test_gbpo(level):
    """The loop reproduces the figures of the formula, and equals the loss with one update per group."""
    log_probs = LOG_PROBS.clone().requires_grad_()
    loss = gbpo_by_hand(log_probs, OLD, SIGNS[0].tolist(), level).mean()
    assert close(loss, [GBPO[level][0]])
    assert close(gradient_of(loss, log_probs)[0], GBPO[level][1])
    for signs in (SIGNS, -SIGNS, 0.5 * SIGNS):
        ours = gbpo(log_probs, NUM_TOKENS, signs, level)
        theirs = gbpo_by_hand(log_probs, LOG_PROBS, signs[0].tolist(), level)
        assert torch.allclose(ours[0], theirs, atol=1e-12)
        assert torch.allclose(*(gradient_of(each.mean(), log_probs)[0] for each in (ours, theirs)), atol=1e-12)


def test_gbpo_pushes_improbable_tokens_less():
    """The gradient of log pi is |A| pi / (1 - pi) below one half and |A| above; GRPO's is |A| everywhere."""
    probs = torch.tensor([[[1e-6], [0.1], [0.4], [0.8]]], dtype=torch.double)
    log_probs = probs.log().requires_grad_()
    loss = gbpo(log_probs, torch.ones(1, 4, dtype=torch.long), torch.full((1, 4), -2.0))
    found = gradient_of(loss.sum(), log_probs)[0].flatten()
    assert torch.allclose(found, 2 * torch.tensor([1e-6 / (1 - 1e-6), 1 / 9, 2 / 3, 1.0], dtype=torch.double))


# ------------------------------------------------------------------------------------------------------------ siblings
PATHS = torch.tensor([[[1, 4, 7], [1, 4, 8], [1, 5, 9], [2, 6, 10]]])  # distinct numbers, so they are nodes
SIBLINGS = torch.tensor(
    [[[-0.5, -1, -0.2], [-0.5, -1, -1.7], [-0.5, -0.4, -0.3], [-0.93, -0.1, -0.6]]], dtype=torch.double
)
SIBLING_REFERENCE = torch.tensor(
    [[[-0.6, -0.9, -0.4], [-0.6, -0.9, -1.1], [-0.6, -0.5, -0.2], [-0.8, -0.1, -0.7]]], dtype=torch.double
)
SIBLING_REWARDS = torch.tensor([[1.0, 0.1, 0.5, 0.2]], dtype=torch.double)
THREE = torch.full((1, 4), 3)
ADVANTAGES = [
    [0.999400, 0.996016, 0.999778],
    [0.999400, 0.996016, -0.999778],
    [0.999400, -0.996016, 0],
    [-0.999400, 0, 0],
]
CODE = [
    [-0.111044, -0.110668, -0.111086],
    [-0.111044, -0.110668, 0.111086],
    [-0.111044, 0.110668, 0],
    [0.111044, 0, 0],
]
CODE_KL = [
    [-0.110622, -0.111136, -0.110281], [-0.110622, -0.111136, 0.107433], [-0.110622, 0.111091, 0], [0.110427, 0, 0],
]  # fmt: skip
PAPER = [
    [-0.083283, -0.124502, -0.249944],
    [-0.083283, -0.124502, 0.249944],
    [-0.083283, 0.249004, 0],
    [0.249850, 0, 0],
]


def test_advantages_among_siblings():
    found, sharing = sibling_advantages(SIBLING_REWARDS, PATHS)
    assert close(found, ADVANTAGES)
    assert sharing.tolist() == [[[3, 2, 1], [3, 2, 1], [3, 1, 1], [1, 1, 1]]]


@pytest.mark.parametrize(
    ("options", "expected", "gradient"),
    [
        ({}, -0.332757, CODE), ({"beta": 1e-3}, -0.332726, None), ({"beta": 0.04}, -0.331516, CODE_KL),
        ({"variant": "paper"}, 0.0, PAPER),
    ],
)  # fmt: skip
def test_sibling_grpo(options, expected, gradient):
    """The figures of the authors' code, and of the paper's equation."""
    log_probs = SIBLINGS.clone().requires_grad_()
    loss = sibling_grpo(log_probs, SIBLING_REFERENCE, THREE, SIBLING_REWARDS, PATHS, **options).mean()
    assert close(loss, [expected])
    if gradient is not None:
        assert close(gradient_of(loss, log_probs)[0], gradient)


def test_siblings_are_those_of_one_prompt_and_end_with_the_id():
    """A second prompt with equal prefixes changes no advantage; nor does a shorter id, which has no later tokens."""
    other = torch.tensor([[5.0, 1.0, 0.0, 2.0]], dtype=torch.double)
    found, _ = sibling_advantages(torch.cat([SIBLING_REWARDS, other]), PATHS.repeat(2, 1, 1))
    assert close(found[0], ADVANTAGES)
    short = PATHS.clone()
    short[0, 3, 1:] = -1
    assert close(sibling_advantages(SIBLING_REWARDS, short)[0], ADVANTAGES)
    equal, _ = sibling_advantages(torch.full((1, 4), 0.1), PATHS)
    assert not equal.any()  # even if the means of equal rewards were rounded
    with pytest.raises(ValueError, match="beta is 0.001, but variant='paper' has no KL term"):
        sibling_grpo(SIBLINGS, SIBLING_REFERENCE, THREE, SIBLING_REWARDS, PATHS, 1e-3, "paper")


@pytest.mark.parametrize("variant", ["code", "paper"])
def test_without_siblings_nothing_is_learned(variant):
    log_probs = SIBLINGS.clone().requires_grad_()
    alone = PATHS[:, :1].expand(1, 4, 3)
    loss = sibling_grpo(log_probs, SIBLING_REFERENCE, THREE, SIBLING_REWARDS, alone, variant=variant)
    assert loss.tolist() == [[0.0] * 4] and not gradient_of(loss.sum(), log_probs)[0].any()


# -------------------------------------------------------------------------------------------------------------- FlowRL
LOG_Z = torch.tensor([0.3], dtype=torch.double)
# beta, clip of the importance weights, loss per trajectory, its gradient per token, that of log Z. The first row is
# from the authors' code, whose clipped weight is not used.
FLOWRL = [
    (15.0, None, [368.498933, 318.959189, 6.798210], [-5.210321, 7.643987, 0.551150], 1.310461),
    (15.0, (0.8, 1.2), [296.414666, 232.150233, 6.798210], None, None),
    (15.0, (0.8, 1.28), [316.175644, 247.626915, 6.798210], None, None),
    (1.0, (0.8, 1.28), [0.637190, 1.865578, 0.168570], [-0.200691, 0.515099, 0.086789], None),
]


@pytest.mark.parametrize(("beta", "clip", "expected", "slopes", "of_log_z"), FLOWRL)
def test_flowrl(beta, clip, expected, slopes, of_log_z):
    """With the weights of an old policy, which are 1 with one update per group."""
    log_probs, log_z = LOG_PROBS.clone().requires_grad_(), LOG_Z.clone().requires_grad_()
    weights = (LOG_PROBS - OLD).sum(-1).exp()
    weights = weights if clip is None else weights.clamp(*clip)
    loss = weights * flowrl(log_probs, REFERENCE, NUM_TOKENS, REWARDS, log_z, beta)
    assert close(loss[0], expected)
    gradients = gradient_of(loss.mean(), log_probs, log_z)
    if slopes is not None:
        by_token = [[slope] * 3 for slope in slopes]
        by_token[1][2] = 0
        assert close(gradients[0], by_token)
    if of_log_z is not None:
        assert close(gradients[1], [of_log_z])


def test_flowrl_balances_at_the_reference_times_a_power_of_the_reward():
    """pi = pi_ref (exp(beta A) / Z)^n: the loss and its gradient are zero."""
    advantages = torch.tensor(CENTERED, dtype=torch.double) / (REWARDS[0].std() + 1e-6)
    log_probs = (REFERENCE + (2 * advantages - 0.3)[:, None]).requires_grad_()
    loss = flowrl(log_probs, REFERENCE, NUM_TOKENS, REWARDS, LOG_Z, beta=2.0)
    assert loss.abs().max() < 1e-20 and gradient_of(loss.sum(), log_probs)[0].abs().max() < 1e-10
    assert flowrl(log_probs, REFERENCE, NUM_TOKENS, REWARDS, LOG_Z + 0.5, beta=2.0).allclose(loss + 0.25)


# ---------------------------------------------------------------------------------------------------------------- BEAR
LOGITS = torch.tensor(
    [[0.5, 1, -0.2, 0.1], [0.3, -0.4, -torch.inf, -torch.inf], [0.0, -torch.inf, -torch.inf, -torch.inf]]
).double()
TAKEN = torch.tensor([2, 0, 0])


@pytest.mark.parametrize(
    ("num_beams", "xi", "lam", "weights", "expected", "gradient"),
    [
        (
            3, 2.75, 0.25, [0.494990, 0.505010], 1.212950,
            [[0.129727, 0.213884, -0.430569, 0.086959], [-0.167568, 0.167568, 0, 0], [0] * 4],
        ),
        (2, 2.75, 0.25, [0.492967, 0.507033], 1.209640, None),
        (
            3, 1.0, 1.0, None, 1.156996,
            [[0.120763, 0.199105, -0.400818, 0.080950], [-0.178917, 0.178917, 0, 0], [0] * 4],
        ),
    ],
)  # fmt: skip
def test_bear(num_beams, xi, lam, weights, expected, gradient):
    """The figures of the authors' code: a state of four children, one of two, and one without a choice."""
    logits = LOGITS.clone().requires_grad_()
    child = logits.log_softmax(-1)[None, None]
    taken = child[0, 0].gather(1, TAKEN[:, None])[None, None, :, 0]
    loss = bear(taken, child, torch.tensor([[3]]), num_beams, xi, lam)
    assert close(loss, [expected])
    if gradient is not None:
        assert close(gradient_of(loss.sum(), logits)[0], gradient)
    if weights is not None:
        leaf = taken.detach().requires_grad_()
        found = gradient_of(bear(leaf, child.detach(), torch.tensor([[3]]), num_beams, xi, lam).sum(), leaf)[0]
        assert close(found, [-weights[0], -weights[1], 0])


def test_bear_is_a_weighted_mean_over_the_tokens_of_the_micro_batch():
    """Padding changes nothing, and without weights it is the mean of log pi over all tokens with an alternative."""
    child = LOGITS.log_softmax(-1)[None, None].repeat(2, 1, 1, 1)
    taken = child.gather(-1, TAKEN.expand(2, 1, 3)[..., None])[..., 0]
    lengths = torch.tensor([[3], [1]])
    child[1, 0, 1:], taken[1, 0, 1:] = -torch.inf, 0.0
    real = torch.stack([taken[0, 0, 0], taken[0, 0, 1], taken[1, 0, 0]])
    assert torch.allclose(bear(taken, child, lengths, lam=0.0).mean(), -real.mean())
    wide = torch.nn.functional.pad(child, (0, 2, 0, 1), value=-torch.inf), torch.nn.functional.pad(taken, (0, 1))
    assert torch.allclose(bear(wide[1], wide[0], lengths), bear(taken, child, lengths))
    assert bear(taken[..., 2:], child[..., 2:, :], torch.ones_like(lengths)).tolist() == [[0.0], [0.0]]
