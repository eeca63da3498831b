"""Checks of single options."""

import math

import numpy as np
import pytest

from gflowtrl import checks


@pytest.mark.parametrize(
    ("bound", "good", "bad"),
    [
        (checks.COUNT, [1, 7, np.int64(2)], [0, 1.0, 2.5, -1]),
        (checks.at_least(0), [0, 1], [-1, 0.5]),
        (checks.POSITIVE, [1, 1e-9, np.float32(0.5)], [0, -1e-9]),
        (checks.NOT_NEGATIVE, [0, 0.0, 3], [-1e-9]),
        (checks.SHARE, [0, 0.5, 1], [-1e-9, 1 + 1e-9]),
        (checks.SHARE_BELOW_ONE, [0, 0.999], [1, 1.0]),
        (checks.POSITIVE_SHARE, [1e-9, 0.999], [0, 1]),
    ],
)
def test_bounds(bound, good, bad):
    for value in good:
        checks.check_number("It", value, bound)
    for value in [*bad, math.nan, math.inf, -math.inf, True, "1", None, [1]]:
        with pytest.raises(ValueError) as error:
            checks.check_number("It", value, bound)
        assert str(error.value) == f"It is {value!r}; it must be {bound.meaning}."


def test_numbers_too_large_for_a_float_raise():
    assert checks.is_finite(10**300) and not checks.is_finite(10**400) and not checks.is_finite(math.nan)
    with pytest.raises(ValueError, match="it must be a finite number above 0"):
        checks.check_number("It", 10**400, checks.POSITIVE)


def test_texts():
    for text in ("", "lamp", "\U0001f600 é"):
        checks.check_text("It", text)
    checks.check_text("It", None, optional=True)
    for value in (None, math.nan, 7, ["a"], b"a"):
        with pytest.raises(ValueError, match="^It must be text, but it is"):
            checks.check_text("It", value)
    for half in ("\ud83d", "pen \udc00"):
        with pytest.raises(ValueError, match="^It holds half a character"):
            checks.check_text("It", half)
    with pytest.raises(ValueError, match="The title of item 3 must be text, but it is nan"):
        checks.check_titles({2: "lamp", 3: math.nan})


def test_types():
    checks.check_type("It", 5, int, "a number")
    checks.check_type("It", None, int | str, "a number", optional=True)
    for value in (None, "5"):
        with pytest.raises(TypeError, match=f"^It is of type {type(value).__name__}; it must be a number.$"):
            checks.check_type("It", value, int, "a number")


def test_every_value_has_a_short_text():
    class Silent:
        def __repr__(self):
            raise KeyError("no text")

    assert checks.short_repr(Silent()) == "a Silent that cannot be shown"
    assert checks.short_repr(np.zeros((2, 2))) == "array([[0., 0.], [0., 0.]])"


def test_choices():
    checks.check_choice("It", "a", ("a", "b"))
    with pytest.raises(ValueError, match="^It is 'c'; choose 'a' or 'b'.$"):
        checks.check_choice("It", "c", (word for word in "ab"))
