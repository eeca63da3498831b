"""Cleaning of raw item metadata: text without HTML entities, categories as one text, prices as numbers."""

import html
import re
from collections.abc import Iterator, Mapping
from decimal import Decimal
from typing import Any

from gflowtrl.checks import is_finite


_TAG = re.compile(r"</?[a-zA-Z][^<>]*>")
_DASHES = r"\-\u2010-\u2015\u2212"
_SIGNS = rf"[^\w.,({_DASHES}]*"  # currency signs, without signs that change the number after them
# Commas separate thousands, as in English. The text after a match must not continue the number ("12,99", "12 000").
_PRICE = re.compile(
    rf"""
    {_SIGNS} (?:from\s)? (?:[a-z]{{1,3}} (?:\.\s)?)? {_SIGNS}
    ((?:\d{{1,3}}(?:,\d{{3}})+ | \d+) (?:\.\d+)? | (?<!\w)\.\d+)
    (?! [\d_,] | \s?\.\d | ['’]\d | [^\w{_DASHES}]\d{{3}}(?!\d)  # more digits
      | e[+-]?\d | \s?[kmpcx](?![^\W\d_]) | \s?[%¢×]  # another unit: 2k, 99p, 2 x 5
      | -[a-z] | \s?/\W*\d | \sfor\b)  # a number of things: 10-pack, 2/$5, 2 for $5
    """,
    re.IGNORECASE | re.VERBOSE,
)


def clean_features(row: Mapping[str, Any], max_description_characters: int | None) -> dict[str, Any]:
    """Clean the features of one item: no empty values, and only values that JSON can represent.

    HTML entities and repeated spaces are removed from `title` and all other texts. `categories`, nested or not, become
    one text with each category once. `description` becomes one text without tags, cut after the last word that fits.
    `price` becomes a float (the lower end of a range) and is left out if it cannot be read. `item` is renamed to
    `item_name`, because `item` is the id in the folder format.
    """
    features = {}
    for name, value in row.items():
        if name == "item":
            name = "item_name"
            while name in row:
                name += "_"
        if name == "price":
            value = parse_price(value)
        elif name == "categories":
            value = ", ".join(dict.fromkeys(filter(None, map(clean_text, _leaves(value)))))
        elif name == "description":
            text = _TAG.sub(" ", clean_text(" ".join(map(str, _leaves(value)))))
            value = _cut(clean_text(text), max_description_characters)
        else:
            value = _plain(value)
            if name == "title" and value is not None:
                value = str(value)
        if value is not None and value != "" and value != []:
            features[name] = value
    return features


def clean_text(text: Any) -> str:
    """Remove HTML entities (some dumps escape them twice), repeated spaces and half characters from a text."""
    text = str(text).encode("utf-8", "replace").decode()  # JSON can contain half characters, files cannot
    while (plain := html.unescape(text)) != text:
        text = plain
    return " ".join(text.split())


def parse_price(value: Any) -> float | None:
    """Parse a price as a float: `"$1,299.00"`, `"$5 - $9"` (5.0), `12.5`.

    Return `None` if there is no plain number >= 0, or if the number is ambiguous (`"12,99"`, `"1 299"`).
    """
    if isinstance(value, str):
        match = _PRICE.match(clean_text(value))
        return float(match[1].replace(",", "")) if match else None
    if isinstance(value, bool) or not isinstance(value, int | float | Decimal):
        return None
    return float(value) if is_finite(value) and value >= 0 else None


def _plain(value: Any) -> Any:
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, int | float | Decimal):
        whole = isinstance(value, int)
        return (value if whole else float(value)) if is_finite(value) else None
    if isinstance(value, list | tuple):
        return [plain for plain in map(_plain, value) if plain is not None]
    if isinstance(value, dict):
        return {str(key): _plain(part) for key, part in value.items()} or None
    return clean_text(value)


def _leaves(value: Any) -> Iterator[Any]:
    if isinstance(value, list | tuple):
        for part in value:
            yield from _leaves(part)
    elif value is not None:
        yield value


def _cut(text: str, characters: int | None) -> str:
    if characters is None or len(text) <= characters:
        return text
    kept = text[: characters + 1]  # one more, so that a word that ends exactly at the limit is kept
    return kept.rsplit(" ", 1)[0] if " " in kept else text[:characters]
