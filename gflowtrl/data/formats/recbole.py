"""Atomic files of RecBole: `X.inter` and `X.item`, tab-separated, with `name:type` in the header."""

from typing import Any

from .format import Format, Header, Parsed, Request
from .source import Source


# Feature names in RecBole's conversions of other data sets -> names in the folder format.
_NAMES = {
    "movie_title": "title",
    "book_title": "title",
    "item_name": "title",
    "app_name": "title",
    "name": "title",
    "class": "categories",
    "genre": "categories",
    "genres": "categories",
}
#: Names of the item column: Steam has `product_id` in the interactions and `id` in the items, LastFM `artist_id`.
_ITEM = ("item_id", "product_id", "artist_id", "id")


def _interactions(source: Source, request: Request) -> Parsed:
    rating = "rating" if request.rated else None
    header = Header(source, "\t", filter(None, ("user_id", rating)), typed=True, quoted=False)
    item = _item_column(source, header)
    time = "timestamp" if "timestamp" in header.types else None  # optional in RecBole; None: the order of the file
    return header.interactions(source, "\t", ("user_id", item, time, rating), quoted=False)


def _items(source: Source, request: Request) -> Parsed:
    header = Header(source, "\t", (), typed=True, quoted=False)
    parse = header.items(_item_column(source, header))
    names = {name: _NAMES[name] for name in header.names if name in _NAMES and _NAMES[name] not in header.names}

    def item(fields: list[str]) -> tuple[str, dict[str, Any]]:
        key, row = parse(fields)
        return key, {names.get(name, name): _value(text, name, header.types[name]) for name, text in row.items()}

    return Parsed(source.csv_rows("\t", quoted=False), item)


def _item_column(source: Source, header: Header) -> str:
    found = next((name for name in _ITEM if name in header.names), None)
    if found is None:
        raise source.format_error_at(1, f"the header lacks item_id; it has {', '.join(header.names)}")
    return found


def _value(text: str, name: str, kind: str) -> Any:
    if kind == "float":
        return float(text) if text else None
    if kind == "float_seq":
        return [float(part) for part in text.split()]
    # Other sequences are texts split into words. In these two, each word is a category.
    return text.split() if kind == "token_seq" and name in ("class", "genre") else text


RECBOLE = Format(
    interactions=_interactions,
    expected="a tab-separated .inter file with the header user_id:token item_id:token [rating:float timestamp:float]",
    items=_items,
    expected_items="a tab-separated .item file with a typed header such as item_id:token title:token_seq",
    files=("*.inter", "*.inter.gz"),
    item_files=("*.item", "*.item.gz"),
)
