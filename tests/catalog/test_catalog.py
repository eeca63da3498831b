"""Tests of the item catalog."""

import logging

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gflowtrl.catalog import ItemCatalog
from gflowtrl.data import build_tokenizer


IDS = {"hat": ("<a_1>", "<b_2>"), "shoe": ("<a_0>", "<b_2>"), "cap": ("<a_1>", "<b_2>"), "coat": ("<a_1>", "<b_0>")}


@pytest.fixture
def catalog():
    return ItemCatalog.from_semantic_ids(IDS, build_tokenizer(IDS))


def test_colliding_items_share_a_leaf_and_are_logged(caplog):
    with caplog.at_level(logging.INFO):
        catalog = ItemCatalog.from_semantic_ids(IDS, build_tokenizer(IDS))
    assert "2 of 4 items share" in caplog.text
    assert len(catalog) == 4 and catalog.tree.num_leaves == 3
    hat, shoe, cap, coat = catalog.leaf_of(["hat", "shoe", "cap", "coat"]).tolist()
    assert hat == cap and len({hat, shoe, coat}) == 3
    assert catalog.items_of(hat) == ["hat", "cap"] and catalog.items_of(shoe) == ["shoe"]
    assert catalog.leaf_sizes[hat] == 2
    assert catalog.leaf_text(hat) == "<a_1> <b_2>"


def test_fold_items(catalog):
    values = torch.tensor([[1.0, 2.0, 4.0, 8.0]])
    hat, shoe, coat = catalog.leaf_of(["hat", "shoe", "coat"]).tolist()
    assert catalog.fold_items(values)[0, [hat, shoe, coat]].tolist() == [5.0, 2.0, 8.0]
    assert catalog.fold_items(values, "max")[0, [hat, shoe, coat]].tolist() == [4.0, 2.0, 8.0]
    with pytest.raises(ValueError, match="'sum' or 'max'"):
        catalog.fold_items(values, "mean")


@given(st.lists(st.integers(0, 5), min_size=1, max_size=12), st.data())
@settings(max_examples=100, deadline=None)
def test_expand_leaves_agrees_with_a_loop(codes, data):
    catalog = ItemCatalog(list(range(len(codes))), [(f"t{c}",) for c in codes], torch.tensor(codes)[:, None])
    leaves = data.draw(st.lists(st.permutations(range(-1, catalog.tree.num_leaves)), min_size=1, max_size=4))
    k = data.draw(st.integers(1, 15))
    for ranked, got in zip(leaves, catalog.expand_leaves(torch.tensor(leaves), k).tolist(), strict=True):
        expected = [item for leaf in ranked if leaf >= 0 for item in catalog.items_of(leaf)][:k]
        assert got == expected + [-1] * (k - len(expected))


def test_save_and_load(catalog, tmp_path):
    catalog.save_pretrained(tmp_path)
    again = ItemCatalog.from_pretrained(tmp_path)
    assert again.items == catalog.items and again.semantic_ids == catalog.semantic_ids
    assert torch.equal(again.item_token_ids, catalog.item_token_ids)
    assert torch.equal(again.item_leaf, catalog.item_leaf)
    assert [p.name for p in tmp_path.iterdir()] == ["catalog.json"]


def test_unknown_items_are_removed_and_reported_with_their_rows(catalog):
    known, unknown = catalog.known_items(iter([["hat", "sock", "cap", "hat"], [], [7, "sock"]]))
    assert known == [["hat", "cap", "hat"], [], []]
    assert unknown == [(0, "sock"), (2, 7), (2, "sock")]


def test_errors_name_the_bad_input(catalog, tmp_path):
    tokenizer = build_tokenizer(IDS)
    with pytest.raises(ValueError, match="'sock' is not in the catalog"):
        catalog.leaf_of(["hat", "sock"])
    with pytest.raises(ValueError, match="<a_77>.*'sock'"):
        ItemCatalog.from_semantic_ids({"sock": ("<a_77>", "<b_0>")}, tokenizer)
    with pytest.raises(ValueError, match="'sock' has an empty semantic id"):
        ItemCatalog.from_semantic_ids({"sock": ()}, tokenizer)
    with pytest.raises(ValueError, match="give a list of its tokens"):
        ItemCatalog.from_semantic_ids({"sock": "<a_1><b_0>"}, tokenizer)
    with pytest.raises(ValueError, match="is a prefix of"):
        ItemCatalog.from_semantic_ids({"x": ("<a_1>",), "y": ("<a_1>", "<b_0>")}, tokenizer)
    with pytest.raises(ValueError, match="'x' is given twice"):
        ItemCatalog(["x", "x"], [("a",), ("b",)], torch.tensor([[1], [2]]))
    with pytest.raises(FileNotFoundError, match="catalog.json is missing"):
        ItemCatalog.from_pretrained(tmp_path)
