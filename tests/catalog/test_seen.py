"""Items that users have had before, against loops over sets."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gflowtrl.catalog import ItemCatalog, PrefixTree
from gflowtrl.catalog.tree import in_rows

from .test_tree import padded, prefix_free_paths


def flat_catalog(codes: list[int]) -> ItemCatalog:
    """Items that share a leaf where they have the same code."""
    return ItemCatalog([f"i{n}" for n in range(len(codes))], [(f"t{c}",) for c in codes], torch.tensor(codes)[:, None])


@given(st.lists(st.integers(0, 5), min_size=1, max_size=12), st.data())
@settings(max_examples=150, deadline=None)
def test_seen_items_agree_with_sets(codes, data):
    catalog = flat_catalog(codes)
    item = st.sampled_from(catalog.items)
    histories = data.draw(st.lists(st.lists(item, max_size=15), min_size=1, max_size=4))
    targets = data.draw(st.none() | st.lists(item, min_size=len(histories), max_size=len(histories)))
    among = data.draw(st.none() | st.lists(item, min_size=1, unique=True))
    seen, candidates = catalog.seen_items(histories, targets, among), set(among or catalog.items)
    removed = [set(history) & candidates for history in histories]
    if targets is not None:
        removed = [items - {target} for items, target in zip(removed, targets, strict=True)]
    every_leaf, every_item = range(catalog.tree.num_leaves), torch.arange(-1, len(catalog))
    members = [set(catalog.items_of(leaf)) & candidates for leaf in every_leaf]
    for row, items in enumerate(removed):
        whole = [leaf for leaf in every_leaf if members[leaf] and members[leaf] <= items]
        assert seen.leaves[row].tolist() == whole + [-1] * (seen.leaves.shape[1] - len(whole))
    shape = (len(histories), -1)
    assert seen.contains(every_item.expand(shape)).tolist() == [
        [False, *(name in items for name in catalog.items)] for items in removed
    ]
    assert seen.counts(torch.tensor([-1, *every_leaf]).expand(shape)).tolist() == [
        [0, *(len(members[leaf] & items) for leaf in every_leaf)] for items in removed
    ]
    assert seen.most == max(map(len, removed))
    pairs = [[row, catalog.items[i]] for row, i in zip(seen.rows.tolist(), seen.items.tolist(), strict=True)]
    assert pairs == [[row, name] for row, items in enumerate(removed) for name in catalog.items if name in items]


@given(st.lists(st.integers(0, 5), min_size=1, max_size=12), st.data())
@settings(max_examples=100, deadline=None)
def test_ranked_leaves_yield_only_unseen_items(codes, data):
    catalog, k = flat_catalog(codes), data.draw(st.integers(1, 15))
    leaves = data.draw(st.lists(st.permutations(range(-1, catalog.tree.num_leaves)), min_size=1, max_size=4))
    histories = [data.draw(st.lists(st.sampled_from(catalog.items))) for _ in leaves]
    found = catalog.expand_leaves(torch.tensor(leaves), k, catalog.seen_items(histories))
    for ranked, history, got in zip(leaves, histories, found.tolist(), strict=True):
        every = [item for leaf in ranked if leaf >= 0 for item in catalog.items_of(leaf)]
        expected = [catalog.items.index(item) for item in every if item not in history][:k]
        assert got == expected + [-1] * (k - len(expected))


@given(prefix_free_paths(), st.data())
@settings(max_examples=150, deadline=None)
def test_closed_nodes_lead_to_excluded_leaves_only(paths, data):
    tree = PrefixTree(padded(paths))
    leaf = st.integers(0, tree.num_leaves - 1)
    excluded = data.draw(st.lists(st.lists(leaf, max_size=8), min_size=1, max_size=3))
    allowed = data.draw(st.none() | st.lists(leaf, min_size=1))
    width = max(map(len, excluded))
    rows = torch.full((len(excluded), width), -1)
    for row, leaves in zip(rows, excluded, strict=True):
        row[: len(leaves)] = torch.tensor(leaves, dtype=torch.long)
    mask = None if allowed is None else tree.path_mask(torch.tensor(allowed))
    closed = tree.closed_nodes(rows, mask)
    assert (closed.diff(dim=1) >= 0).all()
    candidates = set(range(tree.num_leaves) if allowed is None else allowed)
    below = [{n for n, path in enumerate(tree.walk(torch.arange(tree.num_leaves))) if node in path}
             for node in range(tree.num_nodes)]  # fmt: skip
    for row, leaves in zip(closed, excluded, strict=True):
        reachable = [leaves_below & candidates for leaves_below in below]
        expected = {node for node, found in enumerate(reachable) if found and found <= set(leaves)}
        assert set(row.tolist()) - {tree.num_nodes} == expected
        nodes = torch.arange(-1, tree.num_nodes)
        assert in_rows(row[None], nodes[None, :, None]).flatten().tolist() == [n in expected for n in nodes.tolist()]


def test_bad_input_is_an_error():
    catalog = flat_catalog([0, 1])
    with pytest.raises(ValueError, match="1 histories and 2 targets"):
        catalog.seen_items([["i0"]], ["i0", "i1"])
    with pytest.raises(ValueError, match="'sock' is not in the catalog"):
        catalog.seen_items([["sock"]])
    assert catalog.seen_items([]).leaves.shape == (0, 1)
