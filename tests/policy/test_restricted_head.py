"""Tests that computing only the catalog's logits gives the same policy and the same gradients."""

import pytest
import torch
from peft import LoraConfig, get_peft_model

from gflowtrl.policy import StatelessNoise, make_policy
from gflowtrl.policy.restricted_head import only_rows, selectable_head
from tests.tiny import catalog_of, ragged_prompts, random_paths, tiny_model, tiny_seq2seq


VOCAB = 100  # of which the catalog uses 18
KINDS = [
    ("llama", False, None), ("llama", True, None), ("qwen3", False, None), ("t5", True, None), ("mt5", False, None),
    ("gpt_neox", True, None), ("llama", False, "all"), ("qwen3", True, "all"), ("llama", False, "some"),
    ("t5", True, "all"),
]  # fmt: skip


def build(kind, tied, trained=None):
    """Build a model. With `trained`, PEFT trains the rows of all or some of the catalog's tokens, and of others."""
    model = (tiny_seq2seq if kind.endswith("t5") else tiny_model)(VOCAB, kind)
    model.config.tie_word_embeddings = tied
    if tied:
        model.get_output_embeddings().weight = model.get_input_embeddings().weight
    if trained is None:
        return model
    tokens = [*range(98, 2, -1)] if trained == "all" else [50, 4, 3, 7]  # any order
    config = LoraConfig(
        r=2, target_modules=["q"] if kind == "t5" else ["q_proj"],
        trainable_token_indices=tokens if tied else {"embed_tokens": tokens, "lm_head": tokens},
    )  # fmt: skip
    model = get_peft_model(model, config)
    for name, parameter in model.named_parameters():
        if "trainable_tokens_delta" in name:
            torch.nn.init.normal_(parameter)
    return model.eval()


def restricted_and_full(model, catalog):
    """Return the usual policy, and one that computes the logits of all tokens."""
    chosen, whole = make_policy(model, catalog), make_policy(model, catalog)
    assert chosen._output is model.get_output_embeddings()
    whole._output = whole._head = None
    return chosen, whole


@pytest.mark.parametrize(("kind", "tied", "trained"), KINDS)
def test_scores_and_gradients_equal_those_of_all_logits(kind, tied, trained):
    catalog = catalog_of(random_paths(40, ragged=True))
    model, prompts = build(kind, tied, trained), ragged_prompts(3, VOCAB)
    leaves = torch.randint(catalog.tree.num_leaves, (3, 5), generator=torch.Generator().manual_seed(1))
    seen = []
    for policy in restricted_and_full(model, catalog):
        scores = policy.score(prompts, leaves)
        scores.trajectory_log_probs.sum().backward()
        seen.append((scores, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}))
        model.zero_grad()
    (chosen, gradients), (whole, expected) = seen
    torch.testing.assert_close(chosen.log_probs, whole.log_probs, rtol=0, atol=1e-6)
    torch.testing.assert_close(chosen.child_log_probs, whole.child_log_probs, rtol=0, atol=1e-6)
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize(("kind", "tied", "trained"), KINDS)
def test_decoding_equals_that_with_all_logits(kind, tied, trained):
    catalog = catalog_of(random_paths(40))
    prompts, noise = ragged_prompts(3, VOCAB), StatelessNoise(0).at(0, torch.arange(3))
    chosen, whole = restricted_and_full(build(kind, tied, trained), catalog)
    for run in (lambda p: p.sample(prompts, 6, noise), lambda p: p.beam_search(prompts, 7)):
        (leaves, log_probs), (expected, expected_log_probs) = run(chosen), run(whole)
        assert torch.equal(leaves, expected)
        torch.testing.assert_close(log_probs, expected_log_probs, rtol=0, atol=1e-6)
    torch.testing.assert_close(chosen.leaf_log_probs(prompts), whole.leaf_log_probs(prompts), rtol=0, atol=1e-5)


def test_disabled_adapters_give_the_base_models_rows():
    catalog, prompts = catalog_of(random_paths(40)), ragged_prompts(3, VOCAB)
    adapted, base = build("llama", False, "all"), build("llama", False)
    expected = make_policy(base, catalog).leaf_log_probs(prompts)
    policy = make_policy(adapted, catalog)
    assert not torch.allclose(policy.leaf_log_probs(prompts), expected)
    with adapted.disable_adapter():
        torch.testing.assert_close(policy.leaf_log_probs(prompts), expected)


def test_only_the_catalogs_rows_are_computed_and_the_model_is_restored():
    catalog, model = catalog_of(random_paths(40)), build("llama", False)
    policy, prompts = make_policy(model, catalog), ragged_prompts(2, VOCAB)
    widths = []
    model.get_output_embeddings().register_forward_hook(lambda _, __, output: widths.append(output.shape[-1]))
    policy.score(prompts, torch.zeros(2, 1, dtype=torch.long))
    policy.beam_search(prompts, 3)
    assert set(widths) == {len(catalog.tree.tokens)} == {18}
    assert model(**prompts).logits.shape[-1] == VOCAB
    assert type(model.get_output_embeddings()).__name__ == "Linear"


def test_all_rows_are_computed_if_they_cannot_be_selected():
    catalog = catalog_of(random_paths(40))
    few, bart = tiny_model(25), tiny_seq2seq(VOCAB, "bart")
    adapted = get_peft_model(tiny_model(VOCAB), LoraConfig(target_modules=["lm_head"], r=2))
    for model in (few, bart, adapted):
        policy = make_policy(model, catalog)
        assert policy._output is None
        assert policy.leaf_log_probs(ragged_prompts(2, 21)).logsumexp(1).abs().max() < 1e-5


def test_an_error_inside_restores_the_head():
    head = selectable_head(tiny_model(VOCAB))
    with pytest.raises(KeyError), only_rows(head, torch.arange(3)):
        raise KeyError
    assert head(torch.zeros(1, 32)).shape == (1, VOCAB)


def test_the_head_computes_states_with_a_choice_only():
    """Two prompts, one of them padded: the head computes as many states as have a choice."""
    catalog = catalog_of(random_paths(40))
    model, prompts = build("llama", False), ragged_prompts(2, VOCAB)
    read = []
    model.lm_head.register_forward_hook(lambda module, args, output: read.append(output.shape))
    leaves = torch.arange(6).view(2, 3)
    make_policy(model, catalog).score(prompts, leaves)
    tree, nodes = catalog.tree, catalog.tree.walk(leaves)[:, :, :-1]
    undetermined = {
        (row, int(node)) for row in range(2) for node in nodes[row].flatten() if not tree.is_determined(node)
    }
    assert read == [(len(undetermined), len(tree.tokens))]
