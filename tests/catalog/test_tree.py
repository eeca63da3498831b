"""Tests of the prefix tree against dictionaries and loops."""

import math
import resource
import time

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gflowtrl.catalog import PrefixTree


@st.composite
def prefix_free_paths(draw):
    """Random ids of 1 to 4 tokens, none of which is a prefix of another."""
    depth = draw(st.integers(1, 4))
    raw = draw(st.lists(st.lists(st.integers(0, 4), min_size=1, max_size=depth), min_size=1, max_size=25))
    chosen: list[tuple[int, ...]] = []
    for path in map(tuple, raw):
        if not any(path[: len(c)] == c or c[: len(path)] == path for c in chosen):
            chosen.append(path)
    return chosen


def padded(paths):
    length = max(map(len, paths))
    return torch.tensor([list(p) + [-1] * (length - len(p)) for p in paths])


def prefixes(paths):
    return {p[:d] for p in paths for d in range(len(p) + 1)}


def node_prefix(tree, node):
    tokens = []
    while node != 0:
        tokens.append(int(tree.node_token[node]))
        node = int(tree.parent[node])
    return tuple(reversed(tokens))


@given(prefix_free_paths())
@settings(max_examples=150, deadline=None)
def test_tree_holds_exactly_the_prefixes_of_its_paths(paths):
    tree = PrefixTree(padded(paths))
    assert [node_prefix(tree, n) for n in range(tree.num_nodes)] == sorted(prefixes(paths), key=lambda p: (len(p), p))
    ordered = sorted(paths)
    assert [tuple(t for t in row if t >= 0) for row in tree.paths.tolist()] == ordered
    assert [ordered[i] for i in tree.leaf_of_row.tolist()] == paths
    assert tree.leaf_lengths.tolist() == [len(p) for p in ordered]
    assert [node_prefix(tree, n) for n in tree.leaf_nodes().tolist()] == ordered


@given(prefix_free_paths())
@settings(max_examples=100, deadline=None)
def test_queries_agree_with_a_dictionary(paths):
    tree = PrefixTree(padded(paths))
    number = {node_prefix(tree, n): n for n in range(tree.num_nodes)}
    nodes = torch.arange(-1, tree.num_nodes)[:, None].expand(-1, 7)
    tokens = torch.arange(-1, 6).expand(len(nodes), -1)
    expected = [
        [number.get(node_prefix(tree, n) + (t,), -1) if n >= 0 and t >= 0 else -1 for n, t in zip(a, b, strict=True)]
        for a, b in zip(nodes.tolist(), tokens.tolist(), strict=True)
    ]
    assert tree.step(nodes, tokens).tolist() == expected
    allowed = tree.allowed_tokens(nodes[:, 0], 9)
    assert allowed.shape == (len(nodes), 9)
    assert (allowed[:, :5] == (torch.tensor(expected)[:, 1:6] >= 0)).all() and not allowed[:, 5:].any()
    for depth in range(tree.max_depth):
        level = torch.arange(tree.level_start[depth], tree.level_start[depth + 1])
        child_tokens, child_nodes = tree.children(level, depth)
        for i, n in enumerate(level.tolist()):
            here = sorted((p[-1], c) for p, c in number.items() if p and p[:-1] == node_prefix(tree, n))
            size = len(here)
            assert child_tokens[i].tolist() == [t for t, _ in here] + [-1] * (child_tokens.shape[1] - size)
            assert child_nodes[i].tolist() == [c for _, c in here] + [-1] * (child_tokens.shape[1] - size)
    for leaf, path in enumerate(sorted(paths)):
        walked = [number[path[:d]] for d in range(len(path) + 1)]
        assert tree.walk(torch.tensor(leaf)).tolist() == walked + [-1] * (tree.max_depth + 1 - len(walked))
        assert int(tree.leaf_at(torch.tensor(walked[-1]))) == leaf
        assert (tree.leaf_at(torch.tensor(walked[:-1])) == -1).all()


@given(prefix_free_paths(), st.integers(0, 1000), st.sampled_from([1.0, 30.0, 1000.0]))
@settings(max_examples=60, deadline=None)
def test_log_flows_are_sums_of_rewards_below(paths, seed, scale):
    tree = PrefixTree(padded(paths))
    log_rewards = torch.randn(2, tree.num_leaves, generator=torch.Generator().manual_seed(seed)).double() * scale
    flows = tree.log_flows(log_rewards)
    ordered = sorted(paths)
    for node in range(tree.num_nodes):
        prefix = node_prefix(tree, node)
        below = [i for i, p in enumerate(ordered) if p[: len(prefix)] == prefix]
        torch.testing.assert_close(flows[:, node], log_rewards[:, below].logsumexp(1), rtol=1e-12, atol=1e-9)


@pytest.mark.parametrize("value", [0.0, -500.0])
def test_log_flows_of_zero_rewards(value):
    tree = PrefixTree(torch.tensor([[0, 0], [0, 1], [1, 0]]))
    flows = tree.log_flows(torch.tensor([[-math.inf, -math.inf, value]]))
    assert flows.tolist() == [[value, -math.inf, value, -math.inf, -math.inf, value]]
    assert tree.log_flows(torch.full((1, 3), -math.inf)).tolist() == [[-math.inf] * 6]


@pytest.mark.parametrize("spread", [10.0, 79.0, 81.0, 300.0])
def test_log_flows_keep_tiny_subtrees_in_32_bits(spread):
    tree = PrefixTree(torch.tensor([[0, 0], [0, 1], [1, 0], [1, 1]]))
    flows = tree.log_flows(torch.tensor([[0.0, -1.0, -spread, -spread]]))
    assert float(flows[0, 2]) == pytest.approx(math.log(2) - spread, rel=1e-6)


@pytest.mark.parametrize(
    ("paths", "words"),
    [
        ([[1, 2], [1, 2]], ["occurs twice", "rows 0 and 1"]),
        ([[3, 4], [1, 2, 3], [1, 2]], ["prefix", "[1, 2]", "[1, 2, 3]", "rows 2 and 1"]),
        ([[1, -1, 2]], ["Row 0", "after padding"]),
        ([[1, 2], [-1, -1]], ["Row 1", "no first token"]),
        ([[1, -7]], ["-7"]),
        ([[1, 2**40]], ["1099511627776", "must be below 67108864"]),  # a table of all ids would take 8 TiB
    ],
)
def test_bad_paths_raise_an_error_that_names_them(paths, words):
    length = max(map(len, paths))
    with pytest.raises(ValueError) as error:
        PrefixTree(torch.tensor([p + [-1] * (length - len(p)) for p in paths]))
    for word in words:
        assert word in str(error.value)


def test_numbers_of_nodes_must_be_tensors_of_integers():
    tree = PrefixTree(torch.tensor([[0, 0], [0, 1], [1, 0]]))
    calls = [tree.walk, tree.tokens_of, tree.is_determined, tree.leaf_at, tree.path_mask, tree.unique_leaf]
    calls += [lambda nodes: tree.children(nodes, 0), lambda nodes: tree.step(nodes, torch.zeros(1, dtype=torch.long))]
    for call in calls:
        call(torch.zeros(1, dtype=torch.long))
        for wrong in (torch.zeros(1), torch.zeros(1, dtype=torch.uint8), torch.zeros(1) > 0, [0], None):
            with pytest.raises(TypeError, match="it must be a tensor of integers"):
                call(wrong)
    with pytest.raises(TypeError, match="leaf_log_rewards is of type list; it must be a tensor of floats"):
        tree.log_flows([[0.0] * 3])
    with pytest.raises(ValueError, match=r"leaf_log_rewards has shape \(3,\); the tree has 3 leaves"):
        tree.log_flows(torch.zeros(3))


def test_empty_and_float_tensors_raise():
    for wrong in ([[1, 2]], None):
        with pytest.raises(TypeError, match="it must be an integer tensor"):
            PrefixTree(wrong)
    with pytest.raises(ValueError, match="non-empty integer tensor"):
        PrefixTree(torch.ones(2, 3) > 0)
    with pytest.raises(ValueError, match="non-empty integer tensor"):
        PrefixTree(torch.zeros(0, 3, dtype=torch.long))
    with pytest.raises(ValueError, match="non-empty integer tensor"):
        PrefixTree(torch.zeros(2, 3))
    with pytest.raises(ValueError, match="Resize the model's embeddings"):
        PrefixTree(torch.tensor([[5]])).allowed_tokens(torch.tensor([0]), 5)


@given(prefix_free_paths())
@settings(deadline=None)
def test_compact_token_ids_index_the_sorted_tokens(paths):
    tree = PrefixTree(padded(paths))
    assert tree.tokens.tolist() == sorted({token for path in paths for token in path})
    assert torch.equal(tree.compact_token_ids(tree.tokens), torch.arange(len(tree.tokens)))


def test_a_million_items():
    paths = torch.unique(torch.randint(0, 256, (1_000_300, 4), generator=torch.Generator().manual_seed(0)), dim=0)
    paths = paths[torch.randperm(len(paths))] + 256 * torch.arange(4)
    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter()
    tree = PrefixTree(paths)
    seconds = time.perf_counter() - start
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024**2  # ru_maxrss is in KiB
    assert tree.num_leaves == len(paths) > 990_000
    assert seconds < 20 and grown < 1
    leaves = torch.randint(0, tree.num_leaves, (1000,))
    nodes = tree.walk(leaves)
    for depth in range(4):
        assert (tree.step(nodes[:, depth], tree.paths[leaves, depth].long()) == nodes[:, depth + 1]).all()
