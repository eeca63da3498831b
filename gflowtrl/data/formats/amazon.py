"""Amazon reviews of 2014, 2018 and 2023 (`https://amazon-reviews-2023.github.io` and the two earlier releases)."""

import ast
from collections.abc import Callable, Sequence

from ..json_text import json_object
from .format import Columns, Format, Header, Parsed, Request, json_lines
from .headerless import headerless_interactions
from .source import Source


_ITEM_FIELDS = {
    "title": "title",
    "brand": "brand",
    "categories": "categories",
    "category": "categories",
    "description": "description",
    "price": "price",
}
_ITEM_FIELDS_2023 = {
    "title": "title",
    "store": "brand",
    "main_category": "main_category",
    "categories": "categories",
    "description": "description",
    "price": "price",
}


#: Columns of `ratings_X.csv` and `X.csv`, which contain ratings without reviews and have no header.
_RATINGS_2014 = "user", "item", "rating", "timestamp"
_RATINGS_2018 = "item", "user", "rating", "timestamp"


def _reviews(ratings: Sequence[str]) -> Callable[[Source, Request], Parsed]:
    def read(source: Source, request: Request) -> Parsed:
        # Lines that look like JSON are not read as a table, so that a broken line is reported as invalid JSON.
        if (head := source.peek()) and head[0] not in "{[" and head.count(",") == len(ratings) - 1:
            _check_order(source, ratings, head.split(","))
            return headerless_interactions(source, ratings, Columns("user", "item"), request.rated, option=None)
        return json_lines(source, request.names("reviewerID", "asin", "unixReviewTime", "overall"))

    return read


def _check_order(source: Source, ratings: Sequence[str], fields: list[str]) -> None:
    """Check that the columns are not those of the other release.

    Item ids have ten characters, user ids nearly always more.
    """
    user, item = (fields[ratings.index(name)].strip('" ') for name in ("user", "item"))
    if len(user) == 10 < len(item):
        release = "amazon-2018" if ratings == _RATINGS_2014 else "amazon-2014"
        raise source.format_error_at(1, f"users and items seem to be swapped. Read the file with format {release}")


def _reviews_2023(source: Source, request: Request) -> Parsed:
    names = request.names("user_id", "parent_asin", "timestamp", "rating")
    if source.peek().startswith("{"):
        return json_lines(source, names)
    return Header(source, ",", (*names[:3], "rating")).interactions(source, ",", names)


def _items(key: str, fields: dict[str, str]) -> Callable[[Source, Request], Parsed]:
    def parse(line: str) -> tuple:
        row = _literal(line) if line.startswith("{'") else json_object(line)
        return row[key], {name: row[field] for field, name in fields.items() if field in row}

    return lambda source, request: Parsed(source.numbered_lines(), parse)


def _literal(line: str) -> dict:
    """Parse a line of the 2014 metadata, a Python literal. `literal_eval` builds constants and runs no code."""
    row = ast.literal_eval(line)
    if not isinstance(row, dict):
        raise ValueError(f"expected a dictionary, not {type(row).__name__}")
    return row


def _amazon(ratings: Sequence[str]) -> Format:
    return Format(
        interactions=_reviews(ratings),
        expected="one JSON object per line with reviewerID, asin, unixReviewTime and overall, or CSV with no header: "
        + ",".join(ratings),
        items=_items("asin", _ITEM_FIELDS),
        expected_items="one JSON object (or Python literal) per line with asin, title and so on",
    )


AMAZON_2014, AMAZON_2018 = _amazon(_RATINGS_2014), _amazon(_RATINGS_2018)
AMAZON_2023 = Format(
    interactions=_reviews_2023,
    expected="CSV with the header user_id,parent_asin,rating,timestamp, or one JSON object per line with these fields",
    items=_items("parent_asin", _ITEM_FIELDS_2023),
    expected_items="one JSON object per line with parent_asin, title and so on",
)
