"""What is known about items, as one text each."""

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
    """One text an item, in the order of `items` (all items of `data` by default): its features, one a line.

    Features that an item lacks are left out. Lists of words or of lists are joined by commas; so are the entries of an
    object, `color red`, but those without a value. An item without any of the features gets an empty text, and the
    log counts these items.

    Raises:
        ValueError: if no item of the data has any of the features, or one of `items` is not in the data.
    """
    texts = {
        item: "\n".join(filter(None, (_as_text(data.item_features.get(item, {}).get(name)) for name in features)))
        for item in data.items
    }
    if not any(texts.values()):
        found = sorted({name for known in data.item_features.values() for name in known}) or ["none"]
        raise ValueError(
            f"{data.name}: no item has any of the features {', '.join(features)}; known are: {', '.join(found)}. "
            "Name them in features (--features), or make vectors of the interactions with cooccurrence_vectors "
            "(--collaborative 1)."
        )
    items = data.items if items is None else items
    unknown = next((item for item in items if item not in texts), None)
    if unknown is not None:
        raise ValueError(f"{data.name}: item {unknown!r} is not in the catalog.")
    wanted = [texts[item] for item in items]
    if "" in wanted:
        logger.warning("%s: %d of %d items have no text.", data.name, wanted.count(""), len(wanted))
    return wanted


def _as_text(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, Mapping):
        told = ((key, _as_text(entry)) for key, entry in value.items())
        return ", ".join(f"{key} {text}" for key, text in told if text)
    if isinstance(value, Iterable) and not isinstance(value, str):
        return ", ".join(filter(None, map(_as_text, value)))
    return str(value).strip()
