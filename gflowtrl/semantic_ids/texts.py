"""Item texts built from item features."""

import logging
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from gflowtrl.catalog import Item
from gflowtrl.data import InteractionData


logger = logging.getLogger(__name__)
FEATURES = ("title", "brand", "categories", "attributes", "description")


def item_texts(
    data: InteractionData, features: Sequence[str] = FEATURES, items: Sequence[Item] | None = None
) -> list[str]:
    """Return one text per item, in the order of `items` (default: all items of `data`), with one feature per line.

    Features that an item lacks are left out. Lists, also nested ones, are joined by commas; so are the entries of an
    object (`color red`), without entries that have no value. An item with none of the features gets an empty text, and
    the number of these items is logged.

    Raises:
        ValueError: if no item of the data has any of the features, or one of `items` is not in the data.
    """
    texts = {item: feature_text(data.item_features.get(item, {}), features) for item in data.items}
    if not any(texts.values()):
        available = sorted({name for row in data.item_features.values() for name in row}) or ["none"]
        raise ValueError(
            f"{data.name}: no item has any of the features {', '.join(features)}; available features: "
            f"{', '.join(available)}. Name these in features (--features), or compute vectors from the interactions "
            "with cooccurrence_vectors (--collaborative 1)."
        )
    try:
        selected = [texts[item] for item in (data.items if items is None else items)]
    except KeyError as error:
        raise ValueError(f"{data.name}: item {error.args[0]!r} is not in the catalog.") from None
    if "" in selected:
        logger.warning("%s: %d of %d items have no text.", data.name, selected.count(""), len(selected))
    return selected


def feature_text(row: Mapping[str, Any], features: Sequence[str]) -> str:
    """Return the text of one item, with one feature per line; empty without any of the features."""
    return "\n".join(filter(None, (_as_text(row.get(name)) for name in features)))


def _as_text(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, Mapping):
        entries = ((key, _as_text(entry)) for key, entry in value.items())
        return ", ".join(f"{key} {text}" for key, text in entries if text)
    if isinstance(value, Iterable) and not isinstance(value, str):
        return ", ".join(filter(None, map(_as_text, value)))
    return str(value).strip()
