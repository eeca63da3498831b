"""Checks of single options, with uniform error messages of limited length. Every package may use them."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import fields, is_dataclass
from numbers import Integral, Real
from typing import Any, NamedTuple


MOST_CHARACTERS = 1200  # of a message
MOST_OF_A_WORD = 240  # characters of one value or path within a message
_LONG_WORD = re.compile(rf"\S{{{MOST_OF_A_WORD + 1},}}")


class Bound(NamedTuple):
    """A range of numbers: its description in errors, and its test. `check_number` excludes NaN, infinity and True."""

    meaning: str
    holds: Callable[[Any], bool]


def at_least(least: int) -> Bound:
    """Return the bound of all whole numbers from `least` on."""
    return Bound(
        f"a whole number of at least {least}", lambda value: isinstance(value, Integral) and int(value) >= least
    )


COUNT = at_least(1)
POSITIVE = Bound("a finite number above 0", lambda value: value > 0)
NOT_NEGATIVE = Bound("a finite number of at least 0", lambda value: value >= 0)
SHARE = Bound("a number in [0, 1]", lambda value: 0 <= value <= 1)
POSITIVE_SHARE = Bound("a number in (0, 1)", lambda value: 0 < value < 1)
FINITE = Bound("a finite number", lambda value: True)
SEED = Bound("a whole number from 0 to 4294967295", lambda value: isinstance(value, Integral) and 0 <= value < 2**32)
SHARE_BELOW_ONE = Bound("a number in [0, 1)", lambda value: 0 <= value < 1)


def one_line(text: str) -> str:
    """Return a message as one printable line of limited length.

    White space becomes single spaces and control characters `?`. Long words, such as ids and paths, and the whole
    message keep their beginning and end.
    """
    plain = "".join(sign if sign.isprintable() else "?" for sign in " ".join(text.split()))
    return shortened(_LONG_WORD.sub(lambda word: shortened(word[0], MOST_OF_A_WORD), plain), MOST_CHARACTERS)


def shortened(text: str, most: int) -> str:
    """Return text of at most `most` characters, without its middle if it is longer."""
    if len(text) <= most:
        return text
    kept = most - 5
    return f"{text[: kept - kept // 3]} ... {text[-(kept // 3) :]}"


def short_repr(value: object) -> str:
    """Return `repr(value)` without its middle if it is long, or the type of a value that has no text."""
    try:
        return shortened(re.sub(r"\s*\n\s*", " ", repr(value)), MOST_OF_A_WORD)
    except Exception:  # nested too deeply; a number of more than 4,300 digits; a class whose __repr__ fails
        return f"a {type(value).__name__} that cannot be shown"


def is_finite(value: Any) -> bool:
    """Return whether a number fits into a float: JSON allows integers of any length, and `1e400` for infinity."""
    try:
        return math.isfinite(value)
    except OverflowError:
        return False


def check_number(name: str, value: object, bound: Bound, optional: bool = False) -> None:
    """Check that an option is a finite number within its bound.

    Args:
        name: the option's name in the error.
        value: the option's value.
        bound: `COUNT`, `POSITIVE`, ...
        optional: also allow None.

    Raises:
        ValueError: names the option, its value and the bound.
    """
    if optional and value is None:
        return
    number = isinstance(value, Real) and not isinstance(value, bool) and is_finite(value)
    if not (number and bound.holds(value)):
        raise ValueError(f"{name} is {short_repr(value)}; it must be {bound.meaning}{' or None' if optional else ''}.")


def check_text(name: str, value: object, optional: bool = False) -> None:
    """Check that a value is a string without lone surrogates, which JSON and Python allow and UTF-8 cannot encode.

    Args:
        name: the value's name in the error.
        value: the value.
        optional: also allow None.

    Raises:
        ValueError: names the value and shows it.
    """
    if optional and value is None:
        return
    if not isinstance(value, str):
        raise ValueError(f"{name} must be text, but it is {short_repr(value)}. Correct it or leave it out.")
    if not value.isascii() and any("\ud800" <= character <= "\udfff" for character in value):
        raise ValueError(f"{name} holds half a character (half of a surrogate pair): {short_repr(value)}. Correct it.")


def check_titles(titles: Mapping[Any, object]) -> None:
    """Check that the titles of items are strings (`check_text`). The error names the item."""
    for item, title in titles.items():
        check_text(f"The title of item {short_repr(item)}", title)


def check_storable(value: object, where: str = "") -> None:
    """Check that JSON in UTF-8 can hold options: no NaN, no infinity, no half a character (`check_text`).

    Values inside dataclasses, mappings, lists and tuples are checked too.

    Args:
        value: an option, or a container of options.
        where: the value's name in the error. Default: only the names inside it are used.

    Raises:
        ValueError: names the first such value, for example as `rewards.0.weight`.
    """
    if isinstance(value, str):
        check_text(where, value)
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{where} is {value!r}; it must be a finite number.")
    if is_dataclass(value) and not isinstance(value, type):
        entries: Iterable[tuple[Any, Any]] = [(f.name, getattr(value, f.name)) for f in fields(value) if f.init]
    elif isinstance(value, Mapping):
        entries = value.items()
    else:
        entries = enumerate(value) if isinstance(value, list | tuple) else ()
    for name, inner in entries:
        check_storable(inner, f"{where}.{name}" if where else str(name))


def check_type(name: str, value: object, kinds: Any, meaning: str, optional: bool = False) -> None:
    """Check the type of an argument.

    Args:
        name: the argument's name in the error.
        value: the argument.
        kinds: the second argument of `isinstance`.
        meaning: the kinds in words: "an ItemCatalog".
        optional: also allow None.

    Raises:
        TypeError: names the argument, its type and the meaning.
    """
    if not isinstance(value, kinds) and not (optional and value is None):
        raise TypeError(f"{name} is of type {type(value).__name__}; it must be {meaning}.")


def check_choice(name: str, value: object, choices: Iterable[str]) -> None:
    """Check that an option is one of several words.

    Raises:
        ValueError: names the option, its value and the choices.
    """
    known = list(choices)
    if not isinstance(value, str) or value not in known:
        raise ValueError(f"{name} is {short_repr(value)}; choose {' or '.join(map(repr, known))}.")
