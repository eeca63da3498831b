import torch
from transformers import AutoModelForCausalLM

from gflowtrl.policy import CausalTreePolicy, attach_flow_heads, has_flow_heads
from gflowtrl.policy.heads import load_heads, split_heads
from tests.tiny import catalog_of, ragged_prompts, random_paths, tiny_model


def test_log_z_depends_on_the_prompt_only_and_leaves_scores_alone():
    catalog, prompts = catalog_of(random_paths(30)), ragged_prompts(3, 30)
    leaves = torch.tensor([[0, 1], [2, 3], [4, 5]])
    plain = CausalTreePolicy(tiny_model(30), catalog).score(prompts, leaves)
    assert plain.log_z is None
    model = attach_flow_heads(tiny_model(30))
    assert has_flow_heads(model) and attach_flow_heads(model) is model
    policy = CausalTreePolicy(model, catalog)
    scores = policy.score(prompts, leaves)
    assert scores.log_z.tolist() == [0.0, 0.0, 0.0]
    torch.testing.assert_close(scores.log_probs, plain.log_probs)
    torch.nn.init.normal_(model.flow_heads.outer.weight)
    first, second = policy.score(prompts, leaves).log_z, policy.score(prompts, leaves.flip(1) + 3).log_z
    torch.testing.assert_close(first, second)
    assert first.unique().numel() == 3
    alone = {name: value[1:2] for name, value in prompts.items()}
    torch.testing.assert_close(policy.score(alone, leaves[1:2]).log_z, first[1:2])
    first.sum().backward()
    assert model.flow_heads.inner.weight.grad.abs().sum() > 0


def test_heads_stay_out_of_the_checkpoint(tmp_path):
    model = attach_flow_heads(tiny_model(30))
    own, heads = split_heads(model.state_dict())
    model.save_pretrained(tmp_path, state_dict=own)
    again, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["unexpected_keys"] and not info["missing_keys"]
    assert type(again).__name__ == "LlamaForCausalLM" and not has_flow_heads(again)
    torch.nn.init.ones_(heads["flow_heads.outer.weight"])
    load_heads(attach_flow_heads(again), heads)
    assert (again.flow_heads.outer.weight == 1).all()
