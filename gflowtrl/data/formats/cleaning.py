"""Raw item metadata made plain: text without entities, categories as one text, a price as a number."""

import html
import re
from collections.abc import Iterator, Mapping
from decimal import Decimal
from typing import Any

from gflowtrl.checks import is_finite


_TAG = re.compile(r"</?[a-zA-Z][^<>]*>")
_DASHES = r"\-\u2010-\u2015\u2212"
_SIGNS = rf"[^\w.,({_DASHES}]*"  # of a currency, but none that makes another number of what follows
# Commas are thousands, as in English. What follows must not go on the number: "12,99" is no 12, nor is "12 000".
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
    """The features of one item as they are kept: nothing empty, every value one that JSON can hold.

    `title` and every other text lose HTML entities and repeated spaces. `categories`, nested or not, become one text
    in which each category stands once. `description` becomes one text without tags, cut after the last word that
    fits. `price` becomes a float, the lower end where a range is given, and is left out where none can be read.
    `item` is called `item_name`: in the folder format `item` is the id.
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
    """Text without HTML entities (dumps escape some twice), with single spaces, and of whole characters."""
    text = str(text).encode("utf-8", "replace").decode()  # JSON can hold half characters, files cannot
    while (plain := html.unescape(text)) != text:
        text = plain
    return " ".join(text.split())


def parse_price(value: Any) -> float | None:
    """A price as a float: `"$1,299.00"`, `"$5 - $9"` (5.0), `12.5`.

    `None` where there is no plain number that is at least 0, or it could be read in two ways (`"12,99"`, `"1 299"`).
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
    kept = text[: characters + 1]  # one more, so that a word which ends just there stays
    return kept.rsplit(" ", 1)[0] if " " in kept else text[:characters]
