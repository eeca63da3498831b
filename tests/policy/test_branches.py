"""States that trajectories share stand in a row once; values and gradients do not notice."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from gflowtrl.policy import CausalTreePolicy, StatelessNoise
from gflowtrl.policy.branches import merge_branches, places, put
from tests.tiny import catalog_of, random_paths, tiny_model


trees = st.builds(
    random_paths, st.integers(2, 30), depth=st.integers(2, 4), codes=st.integers(3, 4), seed=st.integers(0, 99),
    ragged=st.booleans(),
)  # fmt: skip


@given(st.lists(st.lists(st.integers(-1, 6), min_size=5, max_size=5), min_size=1, max_size=4))
def test_places_are_ranks_among_the_distinct(rows):
    values = torch.tensor(rows)
    place = places(values)
    for row, found, back in zip(rows, place.tolist(), put(values, place, 8, empty=-9).tolist(), strict=True):
        ordered = sorted(set(row))
        assert found == [ordered.index(value) for value in row]
        assert back == ordered + [-9] * (8 - len(ordered))


@given(trees, st.integers(1, 6), st.integers(0, 99))
def test_every_trajectory_finds_its_states_and_no_prompt_has_one_twice(paths, count, seed):
    tree = catalog_of(paths).tree
    leaves = torch.randint(0, tree.num_leaves, (3, count), generator=torch.Generator().manual_seed(seed))
    nodes = tree.walk(leaves)
    branches = merge_branches(tree, nodes)
    assert branches.begin[-1] == branches.nodes.shape[1] == 1 + len(branches.steps)
    for row in range(3):
        own = branches.nodes[row]
        filled = own[own >= 0].tolist()
        assert len(filled) == len(set(filled)) == len(set(nodes[row, :, :-1].flatten().tolist()) - {-1})
        for k in range(count):
            slots, path = branches.slots[row, k], nodes[row, k, :-1]
            assert torch.equal(own[slots], path)
            fed = slots[1:] - 1  # the root is not fed
            for step in range(len(fed)):
                if path[1 + step] >= 0:
                    seen = branches.visible[row, fed[step]].nonzero().flatten()
                    assert seen.tolist() == fed[: step + 1].tolist()
                    assert branches.steps[fed[step]] == step
                    assert branches.tokens[row, fed[step]] == tree.node_token[path[1 + step]]


def test_many_trajectories_cost_no_more_than_the_tree_has_inner_nodes():
    """All leaves and each of them three times: the same states, in training and in decoding."""
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
    inner = tree.level_start[3] - 1
    assert read[0].shape == read[1].shape == (2, 2 + inner)
    torch.testing.assert_close(thrice.log_probs, once.log_probs.repeat(1, 3, 1))
    assert torch.allclose(once.trajectory_log_probs.logsumexp(1), torch.zeros(2), atol=1e-5)
    read.clear()
    policy.sample(prompts, 100, StatelessNoise(0).at(0, torch.arange(2)))
    assert [tokens.shape[1] for tokens in read] == [2, tree.level_start[2], tree.level_start[3]]
