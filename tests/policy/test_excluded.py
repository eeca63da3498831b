"""Beam search without excluded leaves, against brute force over all leaves."""

from contextlib import nullcontext

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gflowtrl.policy import CausalTreePolicy, Seq2SeqTreePolicy, StatelessNoise
from tests.tiny import FIRST_TOKEN, catalog_of, ragged_prompts, random_paths, tiny_model, tiny_seq2seq


VOCAB, BATCH = 30, 3
MODELS = {"causal": tiny_model(VOCAB), "seq2seq": tiny_seq2seq(VOCAB, "bart")}
POLICIES = {"causal": CausalTreePolicy, "seq2seq": Seq2SeqTreePolicy}


@st.composite
def trees(draw):
    """Paths of one to three tokens; some trees have a single leaf, or ids of different lengths."""
    depth, codes = draw(st.integers(1, 3)), draw(st.integers(2, 4))
    size = draw(st.integers(1, codes**depth))
    ragged = depth > 1 and draw(st.booleans())
    return random_paths(size, depth, codes, draw(st.integers(0, 99)), ragged)


def expected_lists(exact, excluded, allowed):
    """Rank the leaves of each row that may be returned."""
    lists = []
    for row, left_out in zip(exact, excluded, strict=True):
        every = range(len(row)) if allowed is None else sorted(set(allowed))
        lists.append(sorted(set(every) - set(left_out), key=lambda leaf: -row[leaf]))
    return lists


def as_tensor(rows):
    width = max(map(len, rows))
    return torch.tensor([row + [-1] * (width - len(row)) for row in rows], dtype=torch.long).view(len(rows), width)


@pytest.mark.parametrize("kind", MODELS)
@given(paths=trees(), data=st.data())
@settings(max_examples=40, deadline=None)
def test_a_wide_beam_ranks_all_leaves_that_are_not_excluded(kind, paths, data):
    policy = POLICIES[kind](MODELS[kind], catalog_of(paths))
    size = policy.catalog.tree.num_leaves
    leaf = st.integers(0, size - 1)
    excluded = data.draw(st.lists(st.lists(leaf, max_size=2 * size), min_size=BATCH, max_size=BATCH))
    allowed = data.draw(st.none() | st.lists(leaf, min_size=1))
    mask = None if allowed is None else policy.catalog.tree.path_mask(torch.tensor(allowed))
    prompts = ragged_prompts(BATCH, VOCAB)
    exact = policy.leaf_log_probs(prompts)
    leaves, log_probs = policy.beam_search(prompts, size + 2, mask, as_tensor(excluded))
    for b, wanted in enumerate(expected_lists(exact.tolist(), excluded, allowed)):
        found = leaves[b, : len(wanted)]
        assert sorted(found.tolist()) == sorted(wanted)
        torch.testing.assert_close(log_probs[b, : len(wanted)], exact[b, wanted], rtol=0, atol=2e-5)
        torch.testing.assert_close(exact[b, found], log_probs[b, : len(wanted)], rtol=0, atol=2e-5)
        assert (leaves[b, len(wanted) :] == -1).all() and (log_probs[b, len(wanted) :] == -torch.inf).all()


def test_a_narrow_beam_returns_full_lists_of_other_leaves():
    """Even if the whole unmasked beam is excluded, and the more beams, the closer to the exact list."""
    policy = CausalTreePolicy(MODELS["causal"], catalog_of(random_paths(60, 3, 4)))
    prompts, width = ragged_prompts(BATCH, VOCAB), 5
    first = policy.beam_search(prompts, width)[0]
    leaves, log_probs = policy.beam_search(prompts, width, excluded=first)
    assert (leaves >= 0).all() and (log_probs[:, :-1] >= log_probs[:, 1:]).all()
    assert not (leaves[:, :, None] == first[:, None]).any()
    exact = policy.leaf_log_probs(prompts)
    torch.testing.assert_close(exact.gather(1, leaves), log_probs, rtol=0, atol=2e-5)


def test_nothing_excluded_changes_nothing():
    policy = CausalTreePolicy(MODELS["causal"], catalog_of(random_paths(60, 3, 4)))
    prompts = ragged_prompts(BATCH, VOCAB)
    plain = policy.beam_search(prompts, 7)
    for none in (torch.empty(BATCH, 0, dtype=torch.long), torch.full((BATCH, 3), -1)):
        for one, other in zip(policy.beam_search(prompts, 7, excluded=none), plain, strict=True):
            assert torch.equal(one, other)


@pytest.mark.parametrize("kind", MODELS)
def test_searches_share_one_computation_of_the_prompts(kind, monkeypatch):
    policy = POLICIES[kind](MODELS[kind], catalog_of(random_paths(60, 3, 4)))
    prompts, others = ragged_prompts(BATCH, VOCAB), ragged_prompts(BATCH, VOCAB, seed=1)
    noise = StatelessNoise(3).at(0, torch.arange(BATCH))
    made, decoder = [], policy._decoder
    monkeypatch.setattr(policy, "_decoder", lambda given, flows: made.append(given) or decoder(given, flows))

    def run(context):
        with context:
            first = policy.beam_search(prompts, 4)
            return *first, *policy.beam_search(prompts, 4, excluded=first[0]), *policy.sample(prompts, 3, noise)

    separate, shared = run(nullcontext()), run(policy.computed_once(prompts))
    assert [given is prompts for given in made] == [True] * 4
    for one, other in zip(separate, shared, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)
    with policy.computed_once(prompts):
        torch.testing.assert_close(policy.leaf_log_probs(others), policy.leaf_log_probs(dict(others)), rtol=0, atol=0)
    assert len(made) == 7


def test_excluded_leaves_need_a_row_per_prompt():
    policy = CausalTreePolicy(MODELS["causal"], catalog_of(torch.tensor([[FIRST_TOKEN]])))
    prompts = ragged_prompts(BATCH, VOCAB)
    with pytest.raises(ValueError, match=r"excluded has shape \(2, 1\), but there are 3 prompts"):
        policy.beam_search(prompts, 2, excluded=torch.zeros(2, 1, dtype=torch.long))
