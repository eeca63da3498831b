"""Raw item metadata made plain: text without entities, categories as one text, a price as a number."""

import html
import math
import re
from collections.abc import Iterator, Mapping
from typing import Any


_TAG = re.compile(r"</?[a-zA-Z][^<>]*>")
# A currency or "from" may stand before. What follows must not go on the number: "12,99" is no 12.
_PRICE = re.compile(r"\W*(?:from\s+)?[a-z]{0,3}\W*((?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?)(?![\d,]|\.\d)", re.IGNORECASE)


def clean_features(row: Mapping[str, Any], max_description_characters: int | None) -> dict[str, Any]:
    """The features of one item as they are kept: nothing empty, every value one that JSON can hold.

    `title` and every other text lose HTML entities and repeated spaces. `categories`, nested or not, become one text
    in which each category stands once. `description` becomes one text without tags, cut after the last word that
    fits. `price` becomes a float, the lower end where a range is given, and is left out where none can be read.
    """
    features = {}
    for name, value in row.items():
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
    """A price as a float, `None` where there is no plain number: `"$1,299.00"`, `"$5 - $9"` (5.0), `12.5`."""
    if isinstance(value, str):
        match = _PRICE.match(value)
        return float(match[1].replace(",", "")) if match else None
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return float(value)


def _plain(value: Any) -> Any:
    if value is None or isinstance(value, bool | int):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
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
