"""Tests that prompts that share a trunk give the same results as separate prompts."""

import itertools

import pytest
import torch
from transformers import MistralConfig, MistralForCausalLM

from gflowtrl.policy import (
    CausalTreePolicy,
    Seq2SeqTreePolicy,
    StatelessNoise,
    attach_flow_heads,
    num_prompts,
    separate_prompts,
    some_prompts,
)  # fmt: skip
from tests.tiny import catalog_of, random_paths, tiny_model, tiny_seq2seq


def windows(catalog, bos=1, seed=0):
    """Return three trunks of whole items with a prompt up to each item, shuffled; the last item is only a target."""
    generator = torch.Generator().manual_seed(seed)
    ids = catalog.item_token_ids
    trunks, prompts = [], []
    for number, count in enumerate((2, 5, 3)):
        items = torch.randint(len(ids), (count,), generator=generator).tolist()
        pieces = [ids[item][ids[item] >= 0].tolist() for item in items]
        tokens = [bos]
        for piece, target in zip(pieces, items[1:], strict=False):
            tokens += piece
            prompts.append((number, len(tokens), target))
        trunks.append(tokens + pieces[-1][:-1])
    width = max(map(len, trunks))
    prompts = [prompts[i] for i in torch.randperm(len(prompts), generator=generator)]
    batch = {
        "input_ids": torch.tensor([[0] * (width - len(trunk)) + trunk for trunk in trunks]),
        "attention_mask": torch.tensor([[0] * (width - len(trunk)) + [1] * len(trunk) for trunk in trunks]),
        "trunk": torch.tensor([trunk for trunk, _, _ in prompts]),
        "cut": torch.tensor([cut for _, cut, _ in prompts]),
    }
    return batch, catalog.item_leaf[torch.tensor([target for _, _, target in prompts])]


def world(kind="llama", attention="sdpa", ragged=False, heads=False, **paths):
    catalog = catalog_of(random_paths(40, ragged=ragged, **paths))
    model = tiny_model(catalog.tree.num_tokens, kind, attention)
    if heads:
        torch.nn.init.normal_(attach_flow_heads(model).flow_heads.outer.weight)
    return model, CausalTreePolicy(model, catalog)


def gradients(model, scores):
    model.zero_grad()
    # Every state has a different weight, so that swapped states change the gradient.
    weights = torch.linspace(0.5, 1.5, scores.log_probs.numel()).view_as(scores.log_probs)
    total = (scores.log_probs * weights).sum() + (scores.log_flows * weights.flip(1)).sum()
    (total + scores.log_z.square().sum()).backward()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def assert_close(actual, expected):
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5)


def test_windows_as_separate_prompts():
    _, policy = world()
    prompts, _ = windows(policy.catalog)
    separate = separate_prompts(prompts)
    assert num_prompts(prompts) == num_prompts(separate) == len(separate["input_ids"]) == 7
    for row in range(7):
        trunk, cut = prompts["trunk"][row], prompts["cut"][row]
        whole = prompts["input_ids"][trunk][prompts["attention_mask"][trunk].bool()]
        assert torch.equal(separate["input_ids"][row][separate["attention_mask"][row].bool()], whole[:cut])
    part = some_prompts(prompts, slice(2, 4))
    assert len(part["input_ids"]) == len(prompts["trunk"][2:4].unique())
    again = separate_prompts(part)
    for row in range(2):
        seen = separate["input_ids"][2 + row][separate["attention_mask"][2 + row].bool()]
        assert torch.equal(again["input_ids"][row][again["attention_mask"][row].bool()], seen)


@pytest.mark.parametrize("ragged", [False, True])
@pytest.mark.parametrize(
    ("kind", "attention"), [*itertools.product(["llama", "gpt_neox"], ["sdpa", "eager"]), ("qwen3", "sdpa")]
)
def test_scores_and_gradients_equal_separate_rows(kind, attention, ragged):
    model, policy = world(kind, attention, ragged, heads=True)
    prompts, targets = windows(policy.catalog)
    drawn = torch.randint(policy.catalog.tree.num_leaves, (7, 3), generator=torch.Generator().manual_seed(1))
    leaves = torch.cat([targets[:, None], drawn], 1)
    alone = policy.score(separate_prompts(prompts), leaves, vocabulary=True)
    expected = gradients(model, alone)
    shared = policy.score(prompts, leaves, vocabulary=True)
    assert_close(shared.log_probs, alone.log_probs)
    assert_close(shared.vocabulary_log_probs, alone.vocabulary_log_probs)
    assert_close(shared.log_flows, alone.log_flows)
    assert_close(shared.log_z, alone.log_z)
    assert_close(shared.child_log_probs.exp(), alone.child_log_probs.exp())
    assert torch.equal(shared.child_nodes, alone.child_nodes)
    actual = gradients(model, shared)
    torch.testing.assert_close(actual, expected, atol=1e-5 * expected.abs().max().item(), rtol=1e-4)


@pytest.mark.parametrize("reach", [None, 4])
def test_layers_with_windows_and_decoding_equal_separate_rows(reach):
    """`reach`: number of positions that every other layer sees."""
    model, policy = world()
    if reach is not None:
        config = MistralConfig(**{**model.config.to_dict(), "sliding_window": reach, "model_type": "mistral"})
        torch.manual_seed(0)
        policy = CausalTreePolicy(MistralForCausalLM(config).eval(), policy.catalog)
    prompts, _ = windows(policy.catalog)
    separate, noise = separate_prompts(prompts), StatelessNoise(0).at(3, torch.arange(7))
    leaves = torch.arange(14).view(7, 2)
    assert_close(policy.score(prompts, leaves).log_probs, policy.score(separate, leaves).log_probs)
    assert_close(policy.leaf_log_probs(prompts, chunk_size=16), policy.leaf_log_probs(separate))
    for actual, expected in zip(policy.sample(prompts, 5, noise), policy.sample(separate, 5, noise), strict=True):
        assert_close(actual, expected)
    for actual, expected in zip(policy.beam_search(prompts, 6), policy.beam_search(separate, 6), strict=True):
        assert_close(actual, expected)
    actual, expected = (policy.stochastic_beam_search(p, 4, noise) for p in (prompts, separate))
    assert_close(actual.leaves, expected.leaves)
    assert_close(actual.perturbed, expected.perturbed)


def test_the_logged_path_is_read_from_the_trunk():
    """Scoring the targets needs only the trunks; another leaf adds only the states that it does not share."""
    model, policy = world(heads=True)  # so that every state is needed
    read = []
    model.register_forward_pre_hook(lambda module, args, kwargs: read.append(kwargs["input_ids"]), with_kwargs=True)
    prompts, targets = windows(policy.catalog)
    policy.score(prompts, targets[:, None])
    assert read[-1].shape == prompts["input_ids"].shape
    tree = policy.catalog.tree
    siblings = [
        next(
            (o for o in range(40) if o != t and torch.equal(tree.walk(torch.tensor(o))[:2], tree.walk(t)[:2])), int(t)
        )
        for t in targets
    ]
    policy.score(prompts, torch.tensor(siblings)[:, None])
    count = torch.zeros(3, dtype=torch.long)
    for trunk, target, sibling in zip(prompts["trunk"], targets, siblings, strict=True):
        a, b = tree.walk(target)[1:-1], tree.walk(torch.tensor(sibling))[1:-1]
        count[trunk] += int(((a != b) & (b >= 0)).sum())
    assert count.max() > 0
    assert read[-1].shape[1] == prompts["input_ids"].shape[1] + int(count.max())


def test_one_token_ids():
    catalog = catalog_of(torch.arange(3, 12)[:, None])
    policy = CausalTreePolicy(tiny_model(catalog.tree.num_tokens), catalog)
    prompts, _ = windows(catalog)
    leaves = torch.arange(14).view(7, 2) % 9
    assert_close(policy.score(prompts, leaves).log_probs, policy.score(separate_prompts(prompts), leaves).log_probs)


def test_an_encoder_decoder_reads_windows_as_separate_prompts():
    catalog = catalog_of(random_paths(40))
    policy = Seq2SeqTreePolicy(tiny_seq2seq(catalog.tree.num_tokens), catalog)
    prompts, targets = windows(catalog, bos=2)
    assert_close(
        policy.score(prompts, targets[:, None]).log_probs,
        policy.score(separate_prompts(prompts), targets[:, None]).log_probs,
    )
    assert_close(policy.leaf_log_probs(prompts), policy.leaf_log_probs(separate_prompts(prompts)))
