"""Tests of the item catalog."""

import logging

import numpy as np
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
    with pytest.raises(TypeError, match="give a list of its tokens"):
        ItemCatalog.from_semantic_ids({"sock": "<a_1><b_0>"}, tokenizer)
    for wrong in (5, None, {"<a_0>"}, ("<a_0>", 5), ("<a_0>", None)):
        with pytest.raises(TypeError, match="The semantic id of item 'sock' is .*; give a list of its tokens as text"):
            ItemCatalog.from_semantic_ids({"sock": wrong}, tokenizer)
    for wrong in (1.5, None, True, ("a",), b"a"):
        with pytest.raises(TypeError, match="is not an item; give integers or strings"):
            ItemCatalog.from_semantic_ids({wrong: next(iter(IDS.values()))}, tokenizer)
    with pytest.raises(ValueError, match="An item holds half a character"):
        ItemCatalog(["\ud83d"], [("a",)], torch.tensor([[1]]))
    with pytest.raises(TypeError, match="semantic_ids is of type list; it must be a dictionary"):
        ItemCatalog.from_semantic_ids(["sock"], tokenizer)
    with pytest.raises(TypeError, match="tokenizer is of type str; it must be a tokenizer"):
        ItemCatalog.from_semantic_ids(IDS, "gpt2")
    with pytest.raises(TypeError, match="item_token_ids is of type list; it must be a tensor"):
        ItemCatalog(["x"], [("a",)], [[1]])
    with pytest.raises(TypeError, match=r"\['hat'\] is not an item; items are integers or strings"):
        catalog.leaf_of(["hat", ["hat"]])
    with pytest.raises(TypeError, match="5 is not a list of items; each history"):
        catalog.known_items([["hat"], 5])
    with pytest.raises(ValueError, match=r"values has shape \(1, 99\); it must be \(B, \d+\)"):
        catalog.fold_items(torch.zeros(1, 99))
    for leaf in (-1, catalog.tree.num_leaves, None, 0.5):  # -1 gave the items of the last leaf
        for method in (catalog.items_of, catalog.leaf_text):
            with pytest.raises(ValueError, match=f"leaf is {leaf}; it must be a number from 0"):
                method(leaf)
    with pytest.raises(ValueError, match="id <a_1> of item 'x' is a prefix of <a_1> <b_0> of item 'y', so generation"):
        ItemCatalog.from_semantic_ids({"y": ("<a_1>", "<b_0>"), "x": ("<a_1>",)}, tokenizer)
    with pytest.raises(ValueError, match="'x' is given twice"):
        ItemCatalog(["x", "x"], [("a",), ("b",)], torch.tensor([[1], [2]]))
    with pytest.raises(FileNotFoundError, match="catalog.json is missing"):
        ItemCatalog.from_pretrained(tmp_path)


# -------------------------------------------------------------------------------------------------- added and retired
@st.composite
def changes(draw):
    """A catalog of equally long ids with collisions, some of its items, which retire, and others, which are added."""
    codes = st.tuples(st.integers(0, 2), st.integers(0, 2), st.integers(0, 2))
    ids = draw(st.dictionaries(st.integers(0, 30), codes, min_size=2, max_size=15))
    new = draw(st.dictionaries(st.integers(31, 50), codes, max_size=8))
    gone = draw(st.lists(st.sampled_from(sorted(ids)), unique=True, max_size=len(ids) - 1))
    return as_tokens(ids), as_tokens(new), gone


def as_tokens(ids):
    return {item: tuple(f"<{'abc'[level]}_{code}>" for level, code in enumerate(path)) for item, path in ids.items()}


EVERY_TOKEN = build_tokenizer({code: (f"<a_{code}>", f"<b_{code}>", f"<c_{code}>") for code in range(3)})


def assert_same(one: ItemCatalog, other: ItemCatalog) -> None:
    """Assert that two catalogs have the same items, ids, retired items and tree, whatever the order of the items."""
    assert sorted(one.items) == sorted(other.items) and sorted(one.retired) == sorted(other.retired)
    ids = [dict(zip(c.history_items, c.history_semantic_ids, strict=True)) for c in (one, other)]
    assert ids[0] == ids[1]
    assert torch.equal(one.tree.paths, other.tree.paths) and torch.equal(one.tree.path_nodes, other.tree.path_nodes)
    assert torch.equal(one.leaf_of(other.items), other.item_leaf)
    for catalog in (one, other):
        rows = catalog.history_index_of(catalog.history_items)
        assert rows.tolist() == list(range(len(catalog.history_items)))
        for leaf in range(catalog.tree.num_leaves):
            assert {int(catalog.leaf_of([item])) for item in catalog.items_of(leaf)} == {leaf}
    assert torch.equal(one.history_token_ids[one.history_index_of(other.history_items)], other.history_token_ids)


@given(changes())
@settings(max_examples=150, deadline=None)
def test_a_changed_catalog_is_the_one_built_from_scratch(change):
    ids, new, gone = change
    before = ItemCatalog.from_semantic_ids(ids, EVERY_TOKEN)
    after = before.updated(new, gone, EVERY_TOKEN)
    assert_same(after, ItemCatalog.from_semantic_ids({**ids, **new}, EVERY_TOKEN, gone))
    assert after.version == 2 and before.items == list(ids) and not before.retired
    assert after.items == [*(item for item in ids if item not in gone), *new]
    assert set(map(tuple, after.tree.paths.tolist())) == {
        tuple(EVERY_TOKEN.convert_tokens_to_ids(list(tokens)))
        for item, tokens in {**ids, **new}.items()
        if item not in gone
    }


@given(changes())
@settings(max_examples=100, deadline=None)
def test_the_opposite_change_restores_the_catalog(change):
    ids, new, gone = change
    before = ItemCatalog.from_semantic_ids(ids, EVERY_TOKEN)
    retired = before.updated({}, gone, EVERY_TOKEN)
    assert_same(retired.updated({item: ids[item] for item in gone}, [], EVERY_TOKEN), before)
    again = before.updated(new, [], EVERY_TOKEN).updated({}, new, EVERY_TOKEN)
    assert torch.equal(again.tree.paths, before.tree.paths)
    assert again.items == before.items and sorted(again.retired) == sorted(new)


def test_a_changed_catalog_is_saved_with_its_retired_items(catalog, tmp_path):
    changed = catalog.updated({"sock": ("<a_0>", "<b_0>")}, ["hat", "shoe"], build_tokenizer(IDS))
    changed.save_pretrained(tmp_path)
    again = ItemCatalog.from_pretrained(tmp_path)
    assert_same(again, changed)
    assert again.items == ["cap", "coat", "sock"] and again.retired == ["hat", "shoe"] and again.version == 2
    assert again.items_of(int(again.leaf_of(["cap"]))) == ["cap"]  # it shared its leaf with the hat
    assert "hat" not in again and again.known_items([["hat", "cap"]]) == ([["cap"]], [(0, "hat")])
    assert again.readable_items([["hat", "cap", 7]]) == ([["hat", "cap"]], [(0, 7)])
    assert again.seen_items([["hat", "coat"]]).items.tolist() == again.index_of(["coat"]).tolist()


def test_wrong_changes_are_refused(catalog, tmp_path):
    tokenizer, sock = build_tokenizer(IDS), ("<a_0>", "<b_0>")
    with pytest.raises(ValueError, match="'hat' is in the catalog already"):
        catalog.updated({"hat": sock}, [], tokenizer)
    with pytest.raises(ValueError, match="'sock' is not in the catalog"):
        catalog.updated({}, ["sock"], tokenizer)
    with pytest.raises(ValueError, match="Every item is retired"):
        catalog.updated({}, IDS, tokenizer)
    with pytest.raises(ValueError, match="<c_1>.*'sock'"):
        catalog.updated({"sock": ("<a_0>", "<c_1>")}, [], tokenizer)
    with pytest.raises(ValueError, match="is a prefix of"):
        catalog.updated({"sock": ("<a_0>",)}, [], tokenizer)
    retired = catalog.updated({}, ["hat"], tokenizer)
    with pytest.raises(ValueError, match="'hat' had the semantic id <a_1> <b_2> before it was retired"):
        retired.updated({"hat": sock}, [], tokenizer)
    with pytest.raises(ValueError, match="'hat' is not in the catalog"):
        retired.updated({}, ["hat"], tokenizer)
    with pytest.raises(ValueError, match="Item 7 cannot be retired"):
        ItemCatalog(["x"], [("a",)], torch.tensor([[1]]), [7])
    retired.save_pretrained(tmp_path)
    file = tmp_path / "catalog.json"
    for old, new, message in (
        ('"version": 2', '"version": 0', "version is 0"),
        ('"retired": {"items": ["hat"]', '"retired": {"items": ["cap"]', "lists item 'cap' 2 times"),
        ('"retired": {"items": ["hat"]', '"retired": {"items": []', "two lists of the same length"),
    ):
        text = file.read_text()
        file.write_text(text.replace(old, new))
        with pytest.raises(ValueError, match=message):
            ItemCatalog.from_pretrained(tmp_path)
        file.write_text(text)


def test_integers_of_numpy_are_items_that_can_be_saved(tmp_path):
    catalog = ItemCatalog(list(np.arange(3)), [("a",), ("b",), ("c",)], torch.tensor([[1], [2], [3]]))
    catalog.save_pretrained(tmp_path)
    assert ItemCatalog.from_pretrained(tmp_path).items == [0, 1, 2] and 2 in catalog
