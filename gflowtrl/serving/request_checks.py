"""Request checks that need the catalog and the server's limits. What they refuse is answered with 422."""

from __future__ import annotations

from fastapi import HTTPException

from gflowtrl.catalog import Item, ItemCatalog
from gflowtrl.recommender import Recommender

from .limits import Limits
from .messages import ExplainRequest, RecommendRequest, repr_json


def check_recommend(body: RecommendRequest, limits: Limits, catalog: ItemCatalog) -> None:
    """Refuse a request above the limits, allowed items that are unknown, and a temperature that has no effect."""
    _check_at_most("k is", body.k, limits.max_k)
    _check_at_most("histories holds", len(body.histories), limits.max_histories, " per request; send several requests")
    for row, history in enumerate(body.histories):
        _check_at_most(f"histories[{row}] holds", len(history), limits.max_history_items, " items; send the latest")
    if body.strategy == "beam" and body.temperature != 1.0:
        text = f'temperature is {body.temperature}, but strategy "beam" does not sample; use strategy "sample".'
        raise HTTPException(422, text)
    for index, item in enumerate(body.allowed_items or ()):
        _check_known(f"allowed_items[{index}]", item, catalog)


def check_explain(body: ExplainRequest, limits: Limits, catalog: ItemCatalog) -> tuple[list[Item], list[str]]:
    """Return the history without items that are not in the catalog, and a warning about skipped items."""
    _check_at_most("history holds", len(body.history), limits.max_history_items, " items; send the latest")
    _check_known("item", body.item, catalog)
    known, warnings = _known_items("history", body.history, catalog)
    if not known:
        text = f"history is {repr_json(body.history)}, but none of its items is in {_the(catalog)}; send a known item."
        raise HTTPException(422, text)
    return known, warnings


def known_items(histories: list[list[Item]], recommender: Recommender) -> tuple[list[list[Item]], list[str]]:
    """Return the histories without items that are not in the catalog, and warnings about skipped items and about
    histories that are answered by popularity."""
    rows, warnings = [], []
    for row, history in enumerate(histories):
        known, warning = _known_items(f"histories[{row}]", history, recommender.catalog)
        rows.append(known)
        warnings += warning
        if not known:
            what = f"histories[{row}] {'holds no known item' if history else 'is empty'}"
            if recommender.item_counts is None:
                text = "this model has no counts of training interactions to rank items by popularity"
                raise HTTPException(422, f"{what}, and {text}; leave this history out.")
            warnings.append(f"{what}; its list has the most popular items of the training interactions.")
    return rows, warnings


def _check_at_most(what: str, number: int, limit: int, remedy: str = "") -> None:
    if number > limit:
        raise HTTPException(422, f"{what} {repr_json(number)}, but this server allows at most {limit}{remedy}.")


def _check_known(what: str, item: Item, catalog: ItemCatalog) -> None:
    if item not in catalog:
        raise HTTPException(422, f"{what} is {repr_json(item)}, which is not in {_the(catalog)}.")


def _known_items(name: str, history: list[Item], catalog: ItemCatalog) -> tuple[list[Item], list[str]]:
    """Return the known items, and a list with one warning if there are unknown ones."""
    (known,), unknown = catalog.readable_items([history])
    if not unknown:
        return known, []
    examples = ", ".join(repr_json(item) for _, item in unknown[:5]) + (", ..." if len(unknown) > 5 else "")
    return known, [f"{name}: items that are not in {_the(catalog)} were left out: {examples}."]


def _the(catalog: ItemCatalog) -> str:
    return f"the catalog of {len(catalog)} items (for example {repr_json(catalog.items[0])})"
