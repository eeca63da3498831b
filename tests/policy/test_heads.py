"""Tests of the flow heads."""

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

from gflowtrl.policy import CausalTreePolicy, Seq2SeqTreePolicy, attach_flow_heads, has_flow_heads
from gflowtrl.policy.causal import CausalDecoder
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


def guided_by_hand(policy, prompts, num_beams, weight):
    """Beam search by definition, with the log-probabilities and flows of every leaf's path from `score`."""
    tree = policy.catalog.tree
    everything = torch.arange(tree.num_leaves).expand(len(prompts["input_ids"]), -1)
    with torch.no_grad():
        scores = policy.score(prompts, everything)
    paths = [tuple(path[path >= 0].tolist()) for path in tree.paths]
    lists = []
    for row in range(len(everything)):
        log_pi, log_f = {(): 0.0}, {}
        for leaf, path in enumerate(paths):
            for depth in range(len(path)):
                log_f[path[:depth]] = float(scores.log_flows[row, leaf, depth])
                log_pi[path[: depth + 1]] = log_pi[path[:depth]] + float(scores.log_probs[row, leaf, depth])
        beams = {(): 0.0}
        for _ in range(tree.max_depth):
            ranked = {}
            for state, rank in beams.items():
                below = [path for path in paths if path[: len(state)] == state]
                if len(below) == 1:  # nothing is left to choose
                    ranked[state] = rank
                    continue
                start = (1 - weight) * log_pi[state] + weight * (log_f[state] - log_f[()])
                children = {path[: len(state) + 1] for path in below}
                ranked |= {child: start + log_pi[child] - log_pi[state] for child in children}
            beams = dict(sorted(ranked.items(), key=lambda item: -item[1])[:num_beams])
        lists.append([next(i for i, path in enumerate(paths) if path[: len(state)] == state) for state in beams])
    return torch.tensor(lists)


def of_seq2seq():
    model = attach_flow_heads(tiny_seq2seq(30))
    torch.nn.init.normal_(model.flow_heads.outer.weight)
    return Seq2SeqTreePolicy(model, catalog_of(random_paths(30)))


@pytest.mark.parametrize("make", [with_flows, of_seq2seq])
@pytest.mark.parametrize("weight", [0.3, 1.0])
def test_guided_beam_search_equals_its_definition(make, weight):
    policy, prompts = make(), ragged_prompts(3, 30)
    leaves, log_probs = policy.beam_search(prompts, 6, flow_weight=weight)
    assert torch.equal(leaves, guided_by_hand(policy, prompts, 6, weight))
    assert not torch.equal(leaves, policy.beam_search(prompts, 6)[0])
    exact = policy.leaf_log_probs(prompts).gather(1, leaves)
    torch.testing.assert_close(log_probs, exact, rtol=0, atol=1e-5)  # the policy's, without the flows
    trunks = {**prompts, "trunk": torch.arange(3), "cut": prompts["attention_mask"].sum(1)}
    assert torch.equal(policy.beam_search(trunks, 6, flow_weight=weight)[0], leaves)
    with policy.computed_once(prompts):
        assert torch.equal(policy.beam_search(prompts, 6, flow_weight=weight)[0], leaves)


def test_guided_beam_search_leaves_out_what_is_excluded():
    policy, prompts = with_flows(), ragged_prompts(3, 30)
    everything = torch.arange(policy.catalog.tree.num_leaves).expand(3, -1).clone()
    everything[1:, 5:] = -1  # the first prompt may return nothing
    leaves, log_probs = policy.beam_search(prompts, 8, excluded=everything, flow_weight=0.5)
    assert (leaves[0] == -1).all() and (log_probs[0] == -torch.inf).all()
    assert (leaves[1:] >= 5).all() and log_probs[1:].isfinite().all()


def test_true_flows_change_nothing(monkeypatch):
    """At pi = R / Z, log F(s) - log Z is log pi(s): the search with any weight is the plain one."""
    policy, prompts = with_flows(), ragged_prompts(3, 30)
    tree = policy.catalog.tree
    flows = tree.log_flows(policy.leaf_log_probs(prompts) + 2.5)
    plain = policy.beam_search(prompts, 6)
    extend = CausalDecoder.extend

    def with_true_flows(self, tokens, parents):
        logits = extend(self, tokens, parents)
        self.flows = flows.gather(1, policy.states)
        return logits

    monkeypatch.setattr(CausalDecoder, "extend", with_true_flows)
    tokens_of = tree.tokens_of

    def remember_states(nodes):
        policy.states = nodes.clamp(min=0)
        return tokens_of(nodes)

    monkeypatch.setattr(tree, "tokens_of", remember_states)
    read = CausalDecoder._read

    def read_true(self, given):
        logits = read(self, given)
        self.flows = flows[:, :1]
        return logits

    monkeypatch.setattr(CausalDecoder, "_read", read_true)
    leaves, log_probs = policy.beam_search(prompts, 6, flow_weight=0.7)
    assert torch.equal(leaves, plain[0])
    torch.testing.assert_close(log_probs, plain[1])


def test_a_weight_of_flows_needs_a_head():
    policy = CausalTreePolicy(tiny_model(30), catalog_of(random_paths(30)))
    with pytest.raises(ValueError, match="flow_weight needs a model with a flow head"):
        policy.beam_search(ragged_prompts(3, 30), 4, flow_weight=0.5)
    with pytest.raises(ValueError, match="flow_weight is 2"):
        with_flows().beam_search(ragged_prompts(3, 30), 4, flow_weight=2)


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
