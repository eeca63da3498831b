"""Files of S3-Rec, used by many sequential recommendation repositories: `X.txt` and `X_item2attributes.json`."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..json_text import json_object
from .format import Format, Parsed, Request
from .source import Source


_ATTRIBUTES = "_item2attributes.json"


def _interactions(source: Source, request: Request) -> Parsed:
    return Parsed(_sequences(source), lambda pair: (*pair, 0.0, 0.0))


def _sequences(source: Source) -> Iterator[tuple[int, tuple[str, str]]]:
    for number, line in source.numbered_lines():
        if (tabs := line.count("\t")) > 1:
            source.reject(number, ValueError(f"{tabs + 1} columns separated by tabs, as in a table of interactions"))
            continue
        user, *items = line.split()
        if not items:
            source.reject(number, ValueError(f"user {user!r} has no items"))
        for item in items:
            yield number, (user, item)


def _items(source: Source, request: Request) -> Parsed:
    return Parsed(_described(source), lambda pair: (pair[0], {"attributes": _words(pair[1])}))


def _described(source: Source) -> Iterator[tuple[int, tuple[str, Any]]]:
    """Yield (number, (item, attributes)) for the entries of the file, which is one JSON object."""
    text = "".join(source.text_lines())
    if not text.strip():
        raise source.nothing()
    try:
        content = json_object(text)
    except ValueError as error:
        raise source.format_error_at(1, str(error)) from None
    for number, pair in enumerate(content.items(), 1):
        source.lines = number
        yield number, pair


def _words(attributes: Any) -> list[str]:
    """Convert attribute numbers to words, because item texts need distinct words."""
    if not isinstance(attributes, list):
        raise ValueError(f"expected a list of attributes, not {attributes!r}")
    return [f"attribute_{name}" if isinstance(name, int) else str(name) for name in attributes]


def _items_beside(path: Path) -> Path | None:
    return path.with_name(Path(path.name.removesuffix(".gz").removesuffix(".zst")).stem + _ATTRIBUTES)


S3REC = Format(
    _interactions,
    "one user per line, followed by the user's items, oldest first, separated by spaces",
    _items,
    'one JSON object {"item": [attribute, ...]}',
    has_ratings=False,
    items_beside=_items_beside,
)
