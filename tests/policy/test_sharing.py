"""Rows on a shared prompt are scored exactly as rows by themselves."""

import pytest
import torch

from gflowtrl.data import prompt_members
from gflowtrl.policy import CausalTreePolicy, attach_flow_heads
from tests.tiny import catalog_of, random_paths, tiny_model


HISTORIES = [[5], [4, 6, 7], [5, 8], [4], [5, 8, 9, 5], [4, 6], [7, 7], [5, 8, 9]]  # three people's rows, mixed


def left_padded(histories):
    width = max(map(len, histories)) + 1
    mask = torch.tensor([[0] * (width - len(h) - 1) + [1] * (len(h) + 1) for h in histories])
    return {
        "input_ids": torch.tensor([[0] * (width - len(h) - 1) + [1, *h] for h in histories]),
        "attention_mask": mask,
    }


def gradients(model, policy, prompts, leaves):
    model.zero_grad()
    scores = policy.score(prompts, leaves)
    # Every state counts with a weight of its own, so that none can stand for another.
    weights = torch.linspace(0.5, 1.5, scores.log_probs.numel()).view_as(scores.log_probs)
    total = (scores.log_probs * weights).sum() + (scores.log_flows * weights.flip(1)).sum()
    (total + scores.log_z.square().sum()).backward()
    return scores, torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


@pytest.mark.parametrize("max_size", [None, 2])
@pytest.mark.parametrize("ragged", [False, True])
@pytest.mark.parametrize(("kind", "attention"), [("llama", "sdpa"), ("llama", "eager"), ("qwen3", "sdpa")])
def test_scores_and_gradients_equal_separate_rows(kind, attention, ragged, max_size):
    paths = random_paths(40, ragged=ragged)
    catalog = catalog_of(paths)
    model = attach_flow_heads(tiny_model(catalog.tree.num_tokens, kind, attention))
    torch.nn.init.normal_(model.flow_heads.outer.weight)
    policy = CausalTreePolicy(model, catalog)
    prompts = left_padded(HISTORIES)
    generator = torch.Generator().manual_seed(0)
    leaves = torch.randint(0, catalog.tree.num_leaves, (len(HISTORIES), 3), generator=generator)
    alone, expected = gradients(model, policy, prompts, leaves)
    members = prompt_members(HISTORIES, max_size=max_size)
    assert len(members) < len(HISTORIES)
    shared, actual = gradients(model, policy, {**prompts, "members": members}, leaves)
    torch.testing.assert_close(shared.log_probs, alone.log_probs, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(shared.log_flows, alone.log_flows, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(shared.log_z, alone.log_z, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(shared.child_log_probs.exp(), alone.child_log_probs.exp(), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(actual, expected, atol=1e-5 * expected.abs().max().item(), rtol=1e-4)


def test_one_token_ids():
    catalog = catalog_of(torch.arange(3, 12)[:, None])
    policy = CausalTreePolicy(tiny_model(catalog.tree.num_tokens), catalog)
    prompts, leaves = left_padded(HISTORIES), torch.arange(16).view(8, 2) % 9
    shared = policy.score({**prompts, "members": prompt_members(HISTORIES)}, leaves)
    torch.testing.assert_close(shared.log_probs, policy.score(prompts, leaves).log_probs, atol=1e-5, rtol=1e-5)


def test_shared_rows_are_fewer_tokens():
    """The model reads one row for each group, not one for each prompt."""
    catalog = catalog_of(random_paths(40))
    model = tiny_model(catalog.tree.num_tokens)
    read = []
    model.register_forward_pre_hook(lambda module, args, kwargs: read.append(kwargs["input_ids"]), with_kwargs=True)
    policy = CausalTreePolicy(model, catalog)
    last_state = catalog.tree.walk(torch.arange(40))[:, 2]
    several = int((~catalog.tree.settled(last_state)).nonzero()[0])  # an id whose last token is a choice
    prompts, leaves = left_padded(HISTORIES), torch.full((8, 1), several)
    policy.score({**prompts, "members": prompt_members(HISTORIES)}, leaves)
    assert len(read[0]) == 3 and read[0].shape[1] == 5 + 4 * (1 + 2)
