"""HTML of the page."""

import re

import pytest

from gflowtrl.demo.answers import Answer, Child, Level, Row
from gflowtrl.demo.drawing import draw_answer, draw_way, percent


BAD = "<script>alert('x')</script>"


def rows_of(html: str) -> list[list[str]]:
    """Return the cells of all lines of the tables, without tags."""
    lines = re.findall(r"<tr[^>]*>(.*?)</tr>", html)
    return [
        [re.sub(r"<[^>]*>", "", cell) for cell in re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", line)] for line in lines
    ]


def test_texts_are_escaped():
    way = draw_way([Level((BAD,), 1, [Child(BAD, 1, BAD, 1, 1.0, True)])], {BAD: BAD})
    answer = draw_answer(Answer([BAD], [Row(1, BAD, BAD, 0.5)], notes=(BAD,)))
    for html, count in ((way, 4), (answer, 3)):
        assert "<script" not in html and html.count("&lt;script&gt;") == count


def test_columns_of_teacher_and_target_are_shown_where_they_are_known():
    assert rows_of(draw_answer(Answer([1], [Row(1, 7, None, 0.25)]))) == [
        ["", "item", " ", "policy"], ["1.", "7", "", "25.0%"]
    ]  # fmt: skip
    full = draw_answer(Answer([1], [Row(1, 7, "Lamp", 0.25, 0.5, 1234, 0.125)]))
    assert rows_of(full) == [
        ["", "item", " ", "policy", "target", "teacher", "teacher&#x27;s rank"],
        ["1.", "Lamp [7]", "", "25.0%", "12.5%", "50.0%", "1,234"],
    ]
    assert re.findall(r"width:([\d.]+)%", full) == ["25.00", "12.50"]


def test_levels_say_what_is_shown_and_mark_what_is_taken():
    best = [Child(f"<a_{i}>", 3, i, i + 1, 0.3 - i / 10, False) for i in range(2)]
    last = Child("<a_8>", 1, 8, 9, 0.004, True)
    html = draw_way([Level((), 12, [*best, last]), Level(("<a_8>",), 3, [last]), Level(("<a_8>",), 1, [last])], {})
    heads = re.findall(r"<h4>(.*?)</h4>", html)
    assert heads == [
        "First token: 12 choices, the best 2 and the one that is taken",
        "After <code>&lt;a_8&gt;</code>: 3 choices, the best 0 and the one that is taken",
        "After <code>&lt;a_8&gt;</code>: 1 choice, the best 0 and the one that is taken",
    ]
    assert html.count('class="taken"') == 3
    assert rows_of(html)[3] == ["&lt;a_8&gt;", "", "0.400%", "9", "1", "8"]


@pytest.mark.parametrize(
    ("share", "text"),
    [(1.0, "100%"), (0.99951, "100%"), (0.999, "99.9%"), (0.25, "25.0%"), (0.0123, "1.23%"), (0.00123, "0.123%"),
     (1e-5, "0.001%"), (1e-6, "<0.001%"), (0.0, "0.000%")],
)  # fmt: skip
def test_percent_has_about_three_digits(share, text):
    assert percent(share) == text
