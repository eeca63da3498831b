"""Search and edits of a history."""

import itertools

import pytest

from gflowtrl.demo.history import ItemSearch, label, moved, without
from tests.demo.world import ITEMS, TITLES, make_recommender


@pytest.fixture(scope="module")
def search() -> ItemSearch:
    return ItemSearch(make_recommender())


@pytest.mark.parametrize("query", ["lamp", "LAMP oil", "  oil ", "i01", "a", "lamp i0", "nowhere", ""])
def test_found_items_contain_every_word_in_the_title_or_the_name(search, query):
    found = search.find(query, limit=len(ITEMS))
    texts = {item: (TITLES.get(item, "").lower(), item.lower()) for item in ITEMS}
    expected = {
        item
        for item, both in texts.items()
        if all(any(word in text for text in both) for word in query.lower().split())
    }
    assert set(found.items) == expected and found.total == len(found.items) == len(expected)


def test_the_exact_name_comes_first_then_titles_that_begin_with_the_query_then_frequent_items(search):
    assert search.find("lamp").items == ["i222", "twin", "i010"]  # twin is the last item, so the most frequent one
    assert search.find("I010").items[0] == "i010"
    assert search.find("").items == ITEMS[::-1][:20]
    assert ItemSearch(make_recommender(item_counts=None)).find("", limit=3).items == ITEMS[:3]


def test_retired_items_are_not_found():
    before = make_recommender()
    gone = [ITEMS[0], ITEMS[-1]]
    found = ItemSearch(before.retire_items(gone)).find("", limit=len(ITEMS)).items
    assert found == [item for item in ITEMS[::-1] if item not in gone]  # the others by their own counts


def test_results_are_limited_and_all_matches_are_counted(search):
    found = search.find("i", limit=3)
    assert len(found.items) == 3 and found.total == sum(
        "i" in item or "i" in TITLES.get(item, "").lower() for item in ITEMS
    )


def test_labels_tell_items_with_the_same_title_apart():
    assert label("x", "Lamp") != label("y", "Lamp") and label(3, None) == "3"


def test_moving_reaches_every_order_and_stops_at_the_ends():
    orders = {("a", "b", "c")}
    for _ in range(3):
        orders |= {tuple(moved(order, place, by)) for order in orders for place in range(3) for by in (-1, 1)}
    assert orders == set(itertools.permutations("abc"))
    assert moved("abc", 0, -1) == moved("abc", 2, 1) == ["a", "b", "c"]


def test_one_of_two_equal_items_is_removed():
    assert without(["a", "b", "a"], 2) == ["a", "b"] and without(["a", "b", "a"], 0) == ["b", "a"]


@pytest.mark.parametrize("position", [-1, 2])
def test_a_position_that_does_not_exist_is_named(position):
    with pytest.raises(ValueError, match=f"The history has 2 items and no position {position + 1}. Select one"):
        without(["a", "b"], position)
