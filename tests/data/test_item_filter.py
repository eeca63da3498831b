"""Conditions on item features against the same conditions in Python."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gflowtrl.data.item_filter import items_where


ITEMS = ["a", "b", "c", "d"]
FEATURES = {
    "a": {"price": 5, "title": "Red pen", "categories": ["Pens"], "new": True, "mixed": 1},
    "b": {"price": 20.5, "title": "Blue pen", "categories": ["Pens", "Blue"], "new": False, "mixed": "x"},
    "d": {"title": "Stapler", "strange name": "yes", "mixed": [1]},
}


@pytest.mark.parametrize(
    ("condition", "expected"),
    [
        ("price < 20", ["a"]),
        ("price IS NULL", ["c", "d"]),
        ("title ILIKE '%pen%' AND NOT new", ["b"]),
        ("list_contains(categories, 'Pens')", ["a", "b"]),
        ("item IN ('c', 'd')", ["c", "d"]),
        ("\"strange name\" = 'yes' -- a comment", ["d"]),
        ("try_cast(mixed AS DOUBLE) = 1", ["a"]),
    ],
)
def test_conditions(condition, expected):
    assert items_where(ITEMS, FEATURES, condition) == expected


@given(
    st.dictionaries(st.integers(0, 30), st.one_of(st.none(), st.integers(-(2**80), 2**80), st.floats(-1e6, 1e6))),
    st.floats(-1e6, 1e6),
)
@settings(max_examples=60, deadline=None)
def test_numbers(prices, bound):
    features = {item: {"price": price} for item, price in prices.items() if price is not None}
    expected = [item for item in range(31) if item in features and features[item]["price"] < bound]
    if expected:
        assert items_where(range(31), features, f"price < {bound!r}") == expected
    else:
        with pytest.raises(ValueError, match="No item meets|is invalid"):
            items_where(range(31), features, f"price < {bound!r}")


@pytest.mark.parametrize(
    "condition",
    [
        "prize < 20",
        "price <",
        "true); DROP TABLE items; SELECT (1",
        "item IN (SELECT content FROM read_text('/etc/passwd'))",
        "(SELECT count(*) FROM FEATURES) > 0",
        "",
    ],
)
def test_what_is_no_condition_is_refused_in_one_line(condition):
    with pytest.raises(ValueError, match=r"is invalid.*The columns are item \(VARCHAR\), price \(DOUBLE\)") as error:
        items_where(ITEMS, FEATURES, condition)
    assert len(str(error.value).splitlines()) == 1 + condition.count("\n")


def test_names_that_sql_does_not_distinguish_are_refused():
    with pytest.raises(ValueError, match="apart from capitals, cannot be used: item, Brand, brand"):
        items_where(ITEMS, {"a": {"Brand": "X", "brand": "Y"}}, "brand = 'Y'")
    with pytest.raises(ValueError, match="apart from capitals"):
        items_where(ITEMS, {"a": {"Item": "X"}}, "item = 'a'")


def test_only_items_come_back():
    assert items_where(ITEMS, FEATURES, "false) UNION ALL SELECT 1 UNION ALL SELECT 1 UNION ALL (SELECT 99") == ["b"]


def test_no_item_is_an_error():
    with pytest.raises(ValueError, match="No item meets the condition 'price > 100', among 4"):
        items_where(ITEMS, FEATURES, "price > 100")
