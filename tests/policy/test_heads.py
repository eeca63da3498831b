"""Tests of the flow heads."""

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

from gflowtrl.policy import CausalTreePolicy, attach_flow_heads, has_flow_heads
from gflowtrl.policy.heads import load_heads, split_heads
from tests.tiny import catalog_of, ragged_prompts, random_paths, tiny_model, tiny_seq2seq


def test_log_flows_start_at_zero_and_scores_do_not_change():
    catalog, prompts = catalog_of(random_paths(30)), ragged_prompts(3, 30)
    leaves = torch.tensor([[0, 1], [2, 3], [4, 5]])
    plain = CausalTreePolicy(tiny_model(30), catalog).score(prompts, leaves)
    assert plain.log_z is None and plain.log_flows is None
    model = attach_flow_heads(tiny_model(30))
    assert has_flow_heads(model) and attach_flow_heads(model) is model
    scores = CausalTreePolicy(model, catalog).score(prompts, leaves)
    assert torch.equal(scores.log_z, torch.zeros(3)) and torch.equal(scores.log_flows, torch.zeros(3, 2, 3))
    torch.testing.assert_close(scores.log_probs, plain.log_probs)


def with_flows(ragged=False):
    model = attach_flow_heads(tiny_model(30))
    torch.nn.init.normal_(model.flow_heads.outer.weight)
    return CausalTreePolicy(model, catalog_of(random_paths(30, ragged=ragged)))


def test_log_z_is_the_flow_of_the_root_and_depends_on_the_prompt_only():
    policy, prompts = with_flows(), ragged_prompts(3, 30)
    leaves = torch.tensor([[0, 1], [2, 3], [4, 5]])
    first, second = policy.score(prompts, leaves), policy.score(prompts, leaves.flip(1) + 3)
    torch.testing.assert_close(first.log_z, second.log_z)
    torch.testing.assert_close(first.log_flows[..., 0], first.log_z[:, None].expand(-1, 2))
    assert first.log_z.unique().numel() == 3
    alone = {name: value[1:2] for name, value in prompts.items()}
    torch.testing.assert_close(policy.score(alone, leaves[1:2]).log_z, first.log_z[1:2])
    first.log_z.sum().backward()
    assert policy.model.flow_heads.inner.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("ragged", [False, True])
def test_log_flows_equal_those_of_separate_rows(ragged):
    policy, prompts = with_flows(ragged), ragged_prompts(3, 30)
    tree = policy.catalog.tree
    leaves = torch.arange(tree.num_leaves)[: 3 * 8].view(3, 8)
    scores = policy.score(prompts, leaves)
    assert not ragged or (scores.lengths < tree.max_depth).any()
    for b in range(3):
        prompt = prompts["input_ids"][b][prompts["attention_mask"][b].bool()]
        for k in range(8):
            length = int(scores.lengths[b, k])
            row = torch.cat([prompt, tree.paths[leaves[b, k]].long()[: length - 1]])[None]
            hidden = policy.model(input_ids=row, output_hidden_states=True).hidden_states[-1]
            alone = policy.model.flow_heads(hidden[0, len(prompt) - 1 :])
            torch.testing.assert_close(scores.log_flows[b, k, :length], alone, rtol=0, atol=1e-5)
            assert (scores.log_flows[b, k, length:] == 0).all()


@pytest.mark.parametrize(
    ("build", "loader"), [(tiny_model, AutoModelForCausalLM), (tiny_seq2seq, AutoModelForSeq2SeqLM)]
)
def test_heads_stay_out_of_the_checkpoint(tmp_path, build, loader):
    name = type(build(30)).__name__
    model = attach_flow_heads(build(30))
    weights, heads = split_heads(model.state_dict())
    model.save_pretrained(tmp_path, state_dict=weights)
    again, info = loader.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["unexpected_keys"] and not info["missing_keys"]
    assert type(again).__name__ == name and not has_flow_heads(again)
    torch.nn.init.ones_(heads["flow_heads.outer.weight"])
    load_heads(attach_flow_heads(again), heads)
    assert (again.flow_heads.outer.weight == 1).all()
    with pytest.raises(ValueError, match="The flow heads in the checkpoint are"):
        load_heads(build(30), heads)
