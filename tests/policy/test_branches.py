"""Tests that states shared by trajectories are in a row once, without changing values and gradients."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gflowtrl.policy import CausalTreePolicy, StatelessNoise, attach_flow_heads
from gflowtrl.policy.branches import dense_rank, merge_branches, scatter_rows
from gflowtrl.policy.packing import lay_out
from gflowtrl.trunks import Trunks
from tests.tiny import catalog_of, random_paths, tiny_model


trees = st.builds(
    random_paths, st.integers(2, 30), depth=st.integers(2, 4), codes=st.integers(3, 4), seed=st.integers(0, 99),
    ragged=st.booleans(),
)  # fmt: skip


@given(st.lists(st.lists(st.integers(-1, 6), min_size=5, max_size=5), min_size=1, max_size=4))
def test_dense_ranks_and_scattering_by_them(rows):
    values = torch.tensor(rows)
    ranks = dense_rank(values)
    scattered = scatter_rows(values, ranks, 8, empty=-9)
    for row, rank, distinct in zip(rows, ranks.tolist(), scattered.tolist(), strict=True):
        ordered = sorted(set(row) - {-1})
        assert rank == [-1 if value < 0 else ordered.index(value) for value in row]
        assert distinct == ordered + [-9] * (8 - len(ordered))


@given(trees, st.integers(1, 6), st.integers(0, 99), st.booleans())
def test_every_trajectory_has_its_states_and_no_prompt_has_one_twice(paths, count, seed, undetermined_only):
    tree = catalog_of(paths).tree
    leaves = torch.randint(0, tree.num_leaves, (3, count), generator=torch.Generator().manual_seed(seed))
    states = tree.walk(leaves)[:, :, :-1]
    if undetermined_only:
        states = states.masked_fill(tree.is_determined(states), -1)
    branches = merge_branches(tree, states)
    wanted = {(row, node) for row in range(3) for node in [0, *states[row].flatten().tolist()] if node >= 0}
    found = list(zip(branches.prompts.tolist(), branches.nodes.tolist(), strict=True))
    assert len(found) == len(set(found)) and set(found) == wanted
    assert branches.prompts[:3].tolist() == [0, 1, 2] and branches.nodes[:3].tolist() == [0, 0, 0]
    assert branches.begin[0] == 0 and branches.begin[-1] == len(found)
    for row in range(3):
        for k in range(count):
            for depth, node in enumerate(states[row, k].tolist()):
                slot = int(branches.slots[row, k, depth])
                if node < 0 and depth:
                    assert slot == -1
                else:
                    assert found[slot] == (row, max(node, 0)) and branches.depths[slot] == depth
                    assert branches.begin[depth] <= slot < branches.begin[depth + 1]


@given(trees, st.integers(1, 4), st.integers(0, 99), st.booleans())
def test_rows_hold_every_state_after_its_prompt_at_its_position(paths, count, seed, aligned):
    """The trunks end in whole ids, and three prompts share two trunks."""
    tree = catalog_of(paths).tree
    generator = torch.Generator().manual_seed(seed)
    leaves = torch.randint(0, tree.num_leaves, (3, count), generator=generator)
    branches = merge_branches(tree, tree.walk(leaves)[:, :, :-1])
    logged = [t for t in tree.paths[leaves[2, 0]].tolist() if t >= 0]  # prompt 2's first trajectory
    rows = [[1, 5, 6], [1, 4, *logged]]
    width = max(map(len, rows))
    trunks = Trunks(
        torch.tensor([[0] * (width - len(row)) + row for row in rows]),
        torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows]),
        torch.tensor([0, 0, 1]), torch.tensor([2, 3, 2]), True,
    )  # fmt: skip
    layout = lay_out(tree, trunks, branches, aligned)
    kept = len(layout.keep)
    for state, index in enumerate(layout.flat_indices(kept=True).tolist()):
        prompt, depth = int(branches.prompts[state]), int(branches.depths[state])
        trunk, column = int(trunks.trunk[prompt]), int(layout.keep[index % kept])
        assert index // kept == trunk
        assert layout.flat_indices(kept=False)[state] == trunk * layout.input_ids.shape[1] + column
        assert layout.position_ids[trunk, column] == trunks.cut[prompt] + depth - 1
        seen = layout.visible[trunk, column].nonzero().flatten()
        seen = seen[layout.position_ids[trunk, seen].argsort(stable=True)]
        node, path = int(branches.nodes[state]), []
        while node > 0:
            path.insert(0, int(tree.node_token[node]))
            node = int(tree.parent[node])
        assert layout.input_ids[trunk, seen].tolist() == rows[trunk][: trunks.cut[prompt]] + path
        continuation = rows[trunk][trunks.cut[prompt] :][:depth]
        assert (column < width) == (path == continuation)


def test_many_trajectories_cost_no_more_than_the_tree_has_inner_nodes():
    """Every leaf once, and every leaf three times, need the same states, in training and in decoding."""
    catalog = catalog_of(random_paths(40, codes=4))
    tree = catalog.tree
    model = tiny_model(tree.num_tokens)
    read = []
    model.register_forward_pre_hook(lambda module, args, kwargs: read.append(kwargs["input_ids"]), with_kwargs=True)
    policy = CausalTreePolicy(model, catalog)
    prompts = {"input_ids": torch.tensor([[1, 5], [1, 6]]), "attention_mask": torch.ones(2, 2, dtype=torch.long)}
    every = torch.arange(40).expand(2, -1)
    once = policy.score(prompts, every)
    thrice = policy.score(prompts, every.repeat(1, 3))
    below_root = tree.num_branching[1:]
    assert 0 < sum(below_root) < tree.level_start[3] - 1  # some inner nodes lead to one leaf only
    assert read[0].shape == read[1].shape == (2, 2 + sum(below_root))
    torch.testing.assert_close(thrice.log_probs, once.log_probs.repeat(1, 3, 1))
    assert torch.allclose(once.trajectory_log_probs.logsumexp(1), torch.zeros(2), atol=1e-5)
    read.clear()
    policy.sample(prompts, 100, StatelessNoise(0).at(0, torch.arange(2)))
    assert all(tokens.shape[1] <= most for tokens, most in zip(read, [2, *below_root], strict=True))


@pytest.mark.parametrize("heads", [False, True])
def test_determined_states_are_not_computed(heads):
    """A tree with one long chain and a bush: the scores are those of a model that computes every state."""
    bush = torch.cartesian_prod(torch.arange(3, 6), torch.arange(6, 9), torch.arange(9, 12))
    chain = torch.tensor([[12, 13, 14]])
    catalog = catalog_of(torch.cat([bush, chain]))
    tree, model = catalog.tree, tiny_model(20)
    if heads:
        attach_flow_heads(model)
    policy = CausalTreePolicy(model, catalog)
    prompts = {"input_ids": torch.tensor([[1, 5]]), "attention_mask": torch.ones(1, 2, dtype=torch.long)}
    read = []
    model.register_forward_pre_hook(lambda module, args, kwargs: read.append(kwargs["input_ids"]), with_kwargs=True)
    last = torch.tensor([[tree.num_leaves - 1]])
    scores = policy.score(prompts, last)
    assert read[-1].shape[1] == (4 if heads else 2)
    assert scores.log_probs[0, 0, 1:].tolist() == [0, 0] and scores.log_probs[0, 0, 0] < 0
    nodes = tree.walk(last)
    assert torch.equal(scores.child_nodes[..., 0, 1:, 0], nodes[:, 0, 2:])
    assert (scores.child_nodes[..., 1:, 1:] == -1).all()
    assert scores.child_log_probs[0, 0, 1:].exp().sum(-1).tolist() == [1, 1]
    (scores.trajectory_log_probs.sum() + (scores.log_flows.sum() if heads else 0)).backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)
    read.clear()
    leaves, log_probs = policy.beam_search(prompts, 28)
    assert [tokens.shape[1] for tokens in read] == [2, 3, 9]
    torch.testing.assert_close(log_probs[0].exp().sum(), torch.tensor(1.0))
    assert sorted(leaves[0].tolist()) == list(range(28))
    torch.testing.assert_close(log_probs, policy.score(prompts, leaves).trajectory_log_probs)
