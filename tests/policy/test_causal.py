"""Tests against a naive reference: repeat the prompt, score the full sequence, mask, renormalize."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from gflowtrl.policy import CausalTreePolicy, StatelessNoise
from tests.tiny import (
    assert_close_gradients,
    assert_distributed,
    catalog_of,
    causal_log_probs,
    gradients,
    ragged_prompts,
    random_paths,
    tiny_model,
)


BATCH, VOCAB = 3, 30
CASES = [
    (kind, attention, ragged) for kind in ("llama", "qwen3") for attention in ("sdpa", "eager") for ragged in (0, 1)
]


def build(kind="llama", attention="sdpa", ragged=False, num_leaves=40, depth=3):
    catalog = catalog_of(random_paths(num_leaves, depth=depth, ragged=bool(ragged)))
    return CausalTreePolicy(tiny_model(VOCAB, kind, attention), catalog)


def every_leaf(policy, batch=BATCH):
    return torch.arange(policy.catalog.tree.num_leaves).expand(batch, -1)


@pytest.mark.parametrize(("kind", "attention", "ragged"), CASES)
def test_scores_equal_the_naive_reference_in_value_and_gradient(kind, attention, ragged):
    policy = build(kind, attention, ragged)
    prompts = ragged_prompts(BATCH, VOCAB)
    leaves = torch.randint(policy.catalog.tree.num_leaves, (BATCH, 5), generator=torch.Generator().manual_seed(1))
    weights = torch.randn(BATCH, 5, 3, generator=torch.Generator().manual_seed(2))
    packed = policy.score(prompts, leaves)
    naive = causal_log_probs(policy, prompts, leaves)
    torch.testing.assert_close(packed.log_probs, naive, rtol=0, atol=1e-5)
    assert_close_gradients(
        gradients(policy.model, (packed.log_probs * weights).sum()), gradients(policy.model, (naive * weights).sum())
    )
    assert torch.equal(packed.lengths, policy.catalog.tree.leaf_lengths[leaves])


@pytest.mark.parametrize("ragged", [0, 1])
def test_child_distributions_sum_to_one_and_hold_the_taken_token(ragged):
    policy = build(ragged=ragged)
    leaves = every_leaf(policy)
    scores = policy.score(ragged_prompts(BATCH, VOCAB), leaves)
    alive = torch.arange(3) < scores.lengths[..., None]
    torch.testing.assert_close(scores.child_log_probs.exp().sum(-1), alive.float())
    nodes = policy.catalog.tree.walk(leaves)
    taken = (scores.child_nodes == nodes[..., 1:, None]) & (scores.child_nodes >= 0)
    torch.testing.assert_close(
        scores.child_log_probs.exp().masked_fill(~taken, 0).sum(-1), scores.log_probs.exp() * alive
    )
    assert ((scores.child_nodes >= 0) == (scores.child_log_probs > -torch.inf)).all()


@pytest.mark.parametrize(("kind", "attention", "ragged"), CASES)
def test_leaf_log_probs_are_the_whole_distribution(kind, attention, ragged):
    policy = build(kind, attention, ragged)
    prompts = ragged_prompts(BATCH, VOCAB)
    exact = policy.leaf_log_probs(prompts, chunk_size=7)
    torch.testing.assert_close(exact, policy.leaf_log_probs(prompts), rtol=0, atol=1e-5)
    torch.testing.assert_close(exact.logsumexp(1), torch.zeros(BATCH), rtol=0, atol=1e-5)
    with torch.no_grad():
        naive = causal_log_probs(policy, prompts, every_leaf(policy)).sum(-1)
    torch.testing.assert_close(exact, naive, rtol=0, atol=2e-5)


@pytest.mark.parametrize(("kind", "attention", "ragged"), CASES)
def test_a_wide_beam_ranks_all_leaves(kind, attention, ragged):
    policy = build(kind, attention, ragged)
    prompts = ragged_prompts(BATCH, VOCAB)
    exact = policy.leaf_log_probs(prompts)
    wide = exact.shape[1] + 3
    leaves, log_probs = policy.beam_search(prompts, wide)
    ranked = exact.sort(1, descending=True)
    assert (leaves[:, -3:] == -1).all() and (log_probs[:, -3:] == -torch.inf).all()
    torch.testing.assert_close(log_probs[:, :-3], ranked.values, rtol=0, atol=2e-5)
    torch.testing.assert_close(exact.gather(1, leaves[:, :-3]), log_probs[:, :-3], rtol=0, atol=2e-5)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_beam_search_equals_constrained_generate(attention):
    policy = build(attention=attention, num_leaves=120)
    tree, beams, length = policy.catalog.tree, 6, 9
    prompts = ragged_prompts(BATCH, VOCAB, length)

    def allowed(_, sequence):
        node = torch.tensor(0)
        for token in sequence[length:]:
            node = tree.step(node, token)
        return tree.allowed_tokens(node, VOCAB).nonzero().squeeze(1).tolist()

    theirs = policy.model.generate(
        **prompts, num_beams=beams, num_return_sequences=beams, max_new_tokens=3, min_new_tokens=3, do_sample=False,
        prefix_allowed_tokens_fn=allowed, renormalize_logits=True, length_penalty=0.0, eos_token_id=None,
        output_scores=True, return_dict_in_generate=True,
    )  # fmt: skip
    leaves, log_probs = policy.beam_search(prompts, beams)
    assert torch.equal(tree.paths[leaves].long().view(BATCH * beams, 3), theirs.sequences[:, length:])
    torch.testing.assert_close(log_probs.flatten(), theirs.sequences_scores, rtol=0, atol=1e-4)


@pytest.mark.parametrize(("temperature", "epsilon", "ragged"), [(1.0, 0.0, 0), (1.0, 0.0, 1), (2.0, 0.3, 0)])
def test_samples_follow_the_exact_distribution(temperature, epsilon, ragged):
    policy = build(num_leaves=20, ragged=ragged)
    prompts = {name: value[:1].expand(50, -1) for name, value in ragged_prompts(1, VOCAB).items()}
    noise = StatelessNoise(5).at(0, torch.arange(50))
    leaves, log_q = policy.sample(prompts, 200, noise, temperature, epsilon)
    num_leaves = policy.catalog.tree.num_leaves
    exact = policy.leaf_log_probs({name: value[:1] for name, value in prompts.items()})[0]
    drawn_with = torch.full((num_leaves,), -torch.inf).scatter(0, leaves.flatten(), log_q.flatten())
    if (temperature, epsilon) == (1.0, 0.0):
        seen = drawn_with > -torch.inf
        torch.testing.assert_close(drawn_with[seen], exact[seen], rtol=0, atol=1e-4)
        expected = exact.exp()
    else:
        expected = drawn_with.exp()
        assert abs(float(expected.sum()) - 1) < 0.02  # leaves that were never drawn have little probability
        expected /= expected.sum()
    assert_distributed(leaves.flatten(), expected)


def test_cached_log_probabilities_equal_recomputed_ones():
    policy = build()
    prompts = ragged_prompts(BATCH, VOCAB)
    leaves, log_q = policy.sample(prompts, 8, StatelessNoise(0).at(3, torch.arange(BATCH)))
    torch.testing.assert_close(log_q, policy.score(prompts, leaves).trajectory_log_probs, rtol=0, atol=1e-4)


def test_a_row_draws_the_same_trajectories_in_any_batch():
    policy = build()
    prompts = ragged_prompts(4, VOCAB)
    whole, _ = policy.sample(prompts, 6, StatelessNoise(1).at(9, torch.tensor([10, 11, 12, 13])))
    half = {name: value[2:] for name, value in prompts.items()}
    part, _ = policy.sample(half, 4, StatelessNoise(1).at(9, torch.tensor([12, 13])))
    assert torch.equal(whole[2:, :4], part)
    later, _ = policy.sample(prompts, 6, StatelessNoise(1).at(10, torch.tensor([10, 11, 12, 13])))
    assert not torch.equal(whole, later)


def test_decoding_disables_dropout_and_restores_the_mode():
    policy = build()
    policy.model.config.attention_dropout = 0.5
    for layer in policy.model.model.layers:
        layer.self_attn.attention_dropout = 0.5
    prompts = ragged_prompts(BATCH, VOCAB)
    expected = policy.leaf_log_probs(prompts)
    policy.model.train()
    torch.testing.assert_close(policy.leaf_log_probs(prompts), expected)
    assert policy.model.training


def test_errors():
    policy = build()
    prompts = ragged_prompts(BATCH, VOCAB)
    with pytest.raises(ValueError, match="temperature is .*; it must be a finite number above 0"):
        policy.sample(prompts, 2, StatelessNoise(0).at(0, torch.arange(BATCH)), temperature=0.0)
    policy.model.config._attn_implementation = "flash_attention_2"
    with pytest.raises(ValueError, match="attn_implementation='sdpa'"):
        CausalTreePolicy(policy.model, policy.catalog)


@pytest.mark.parametrize(
    ("kind", "size", "message"),
    [
        ("mamba", {"hidden_size": 8, "state_size": 2, "num_hidden_layers": 1}, "MambaForCausalLM carries a state"),
        ("bloom", {"hidden_size": 8, "n_layer": 1, "n_head": 1}, "BloomForCausalLM takes no position_ids"),
    ],
)
def test_models_that_cannot_separate_branches_raise(kind, size, message):
    config = AutoConfig.for_model(kind, vocab_size=16, **size)
    with pytest.raises(ValueError, match=message):
        CausalTreePolicy(AutoModelForCausalLM.from_config(config), catalog_of(torch.tensor([[3, 4], [3, 5]])))
