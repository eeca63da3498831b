"""Tests of stochastic beam search against enumeration: order, sets and inclusion probabilities."""

import itertools

import pytest
import scipy
import torch

from gflowtrl.policy import CausalTreePolicy, Seq2SeqTreePolicy, StatelessNoise, StochasticBeams
from gflowtrl.policy.stochastic_beam import conditional_gumbels, log1mexp, log_inclusion
from tests.tiny import assert_distributed, catalog_of, ragged_prompts, random_paths, tiny_model, tiny_seq2seq


VOCAB = 30


def build(num_leaves=20, ragged=False, kind=CausalTreePolicy):
    model = tiny_model(VOCAB) if kind is CausalTreePolicy else tiny_seq2seq(VOCAB)
    return kind(model, catalog_of(random_paths(num_leaves, ragged=ragged)))


def draw(
    policy, rows: int, count: int, temperature: float = 1.0, seed: int = 3
) -> tuple[torch.Tensor, StochasticBeams]:
    """Return the exact log-probabilities `(N,)` of a prompt, and the beams of many rows with this prompt."""
    prompt = {name: value[:1, -5:] for name, value in ragged_prompts(1, VOCAB).items()}
    prompts = {name: value.expand(rows, -1) for name, value in prompt.items()}
    noise = StatelessNoise(seed).at(0, torch.arange(rows))
    return policy.leaf_log_probs(prompt)[0], policy.stochastic_beam_search(prompts, count, noise, temperature)


@pytest.mark.parametrize("kind", [CausalTreePolicy, Seq2SeqTreePolicy])
@pytest.mark.parametrize("ragged", [False, True])
def test_a_sample_is_a_prefix_of_every_larger_one(kind, ragged):
    policy = build(ragged=ragged, kind=kind)
    prompts, noise = ragged_prompts(4, VOCAB), StatelessNoise(1).at(5, torch.arange(4))
    size = policy.catalog.tree.num_leaves
    exact = policy.leaf_log_probs(prompts)
    every = policy.stochastic_beam_search(prompts, size + 2, noise)
    assert torch.equal(every.leaves[:, :size].sort(1).values, torch.arange(size).expand(4, -1))
    assert (every.leaves[:, size:] == -1).all() and (every.log_probs[:, size:] == -torch.inf).all()
    assert (every.log_inclusion == 0).all() and (every.threshold == -torch.inf).all()
    torch.testing.assert_close(every.log_probs[:, :size], exact.gather(1, every.leaves[:, :size]), rtol=0, atol=1e-4)
    assert (every.perturbed.diff(dim=1)[:, : size - 1] <= 0).all()
    for count in (1, 3, size - 1):
        beams = policy.stochastic_beam_search(prompts, count, noise)
        assert torch.equal(beams.leaves, every.leaves[:, :count])
        torch.testing.assert_close(beams.perturbed, every.perturbed[:, :count], rtol=0, atol=1e-4)
        torch.testing.assert_close(beams.threshold, every.perturbed[:, count], rtol=0, atol=1e-4)


def test_every_leaf_has_independent_gumbel_noise():
    policy = build(12, ragged=True)
    exact, beams = draw(policy, 400, 12)
    by_leaf = torch.zeros(beams.leaves.shape).scatter(1, beams.leaves, beams.perturbed - beams.log_probs)
    assert scipy.stats.kstest(by_leaf.flatten().numpy(), "gumbel_r").pvalue > 1e-3
    correlation = torch.corrcoef(by_leaf.T) - torch.eye(len(exact))
    assert float(correlation.abs().max()) < 4.5 / 400**0.5


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_the_first_leaf_is_an_ordinary_sample(temperature):
    policy = build(ragged=True)
    exact, beams = draw(policy, 3000, 1, temperature)
    if temperature != 1.0:
        every = draw(policy, 1, policy.catalog.tree.num_leaves, temperature)[1]
        exact = torch.empty_like(exact).scatter(0, every.leaves[0], every.log_probs[0])
        prompt = {name: value[:1, -5:] for name, value in ragged_prompts(1, VOCAB).items()}
        leaves, log_q = policy.sample(prompt, 50, StatelessNoise(0).at(0, torch.zeros(1, dtype=int)), temperature)
        torch.testing.assert_close(log_q[0], exact[leaves[0]], rtol=0, atol=1e-4)
    assert_distributed(beams.leaves[:, 0], exact.exp())


def test_pairs_are_drawn_without_replacement():
    policy = build(5)
    exact, beams = draw(policy, 4000, 2)
    p = exact.exp()
    pairs = torch.zeros(5, 5)
    for i, j in itertools.permutations(range(5), 2):
        pairs[i, j] = p[i] * p[j] / (1 - p[i])
    assert (beams.leaves[:, 0] != beams.leaves[:, 1]).all()
    assert_distributed(beams.leaves[:, 0] * 5 + beams.leaves[:, 1], pairs.flatten())


@pytest.mark.parametrize("count", [2, 4])
def test_estimated_means_are_unbiased(count):
    """Horvitz-Thompson with the inclusion probabilities; one draw of K leaves beats K draws with replacement."""
    exact, beams = draw(build(), 4000, count)
    p = exact.exp().double()
    weights = (beams.log_probs - beams.log_inclusion).double().exp()
    for f in (torch.ones(20), torch.randn(20, generator=torch.Generator().manual_seed(1)), torch.arange(20.0) ** 2):
        estimates = (weights * f.double()[beams.leaves]).sum(1)
        error = float(estimates.mean() - (p * f).sum())
        assert abs(error) < 4 * float(estimates.std()) / 4000**0.5 + 1e-6, f
    assert (beams.log_inclusion <= 0).all()


def test_a_row_draws_the_same_leaves_in_any_batch():
    policy, prompts = build(), ragged_prompts(4, VOCAB)
    whole = policy.stochastic_beam_search(prompts, 6, StatelessNoise(1).at(9, torch.tensor([10, 11, 12, 13])))
    half = {name: value[2:] for name, value in prompts.items()}
    part = policy.stochastic_beam_search(half, 6, StatelessNoise(1).at(9, torch.tensor([12, 13])))
    assert torch.equal(whole.leaves[2:], part.leaves)
    later = policy.stochastic_beam_search(prompts, 6, StatelessNoise(1).at(10, torch.tensor([10, 11, 12, 13])))
    assert not torch.equal(whole.leaves, later.leaves)


def test_results_are_finite_for_probabilities_near_0_and_1():
    log_probs = torch.tensor([[[0.0, -1e4, -50.0, -torch.inf], [-1e-12, -800.0, -1e6, -3.0]]], dtype=torch.double)
    uniform = torch.rand(log_probs.shape, dtype=torch.double, generator=torch.Generator().manual_seed(0))
    noise = -(-uniform.log()).log()
    parents = torch.tensor([[0.3, -900.0]], dtype=torch.double)
    result = conditional_gumbels(parents, log_probs, noise)
    torch.testing.assert_close(result.amax(-1), parents)
    assert torch.equal(result == -torch.inf, log_probs == -torch.inf) and not result.isnan().any()
    assert (conditional_gumbels(torch.full((1, 2), -torch.inf), log_probs, noise) == -torch.inf).all()

    tiny = torch.tensor([-1e-12, -1.0, -50.0], dtype=torch.double)
    expected = torch.tensor([-27.631021115928547, -0.45867514538708193, -1.9287498479639178e-22], dtype=torch.double)
    torch.testing.assert_close(log1mexp(tiny), expected, rtol=1e-9, atol=0)
    surplus = torch.tensor([[-40.0, 40.0, -torch.inf]], dtype=torch.double)
    torch.testing.assert_close(
        log_inclusion(surplus, torch.zeros(1)), torch.tensor([[-40.0, 0.0, 0.0]]).double(), rtol=1e-9, atol=1e-9
    )


def test_errors():
    policy, prompts = build(), ragged_prompts(2, VOCAB)
    noise = StatelessNoise(0).at(0, torch.arange(2))
    for count, temperature, message in ((0, 1.0, "num_generations is 0; it must"), (2, 0.0, "temperature is 0.0; it")):
        with pytest.raises(ValueError, match=message):
            policy.stochastic_beam_search(prompts, count, noise, temperature)
