"""What can only be said of a request with the catalog and the limits at hand."""

from __future__ import annotations

from collections.abc import Sequence

from fastapi import HTTPException

from gflowtrl.catalog import Item, ItemCatalog
from gflowtrl.recommender import Recommender

from .limits import Limits
from .messages import ExplainRequest, RecommendRequest, repr_json


def check_limits(asked: RecommendRequest, limits: Limits) -> None:
    """Refuses what is more than this server takes on, and a temperature for a strategy that has none."""
    _check_at_most("k is", asked.k, limits.max_k)
    _check_at_most("histories holds", len(asked.histories), limits.max_histories, " in a request; ask in several")
    for row, history in enumerate(asked.histories):
        _check_at_most(f"histories[{row}] holds", len(history), limits.max_history_items, " items; send the latest")
    if asked.strategy == "beam" and asked.temperature != 1.0:
        raise HTTPException(
            422, f'temperature is {asked.temperature}, but strategy "beam" draws nothing; use strategy "sample".'
        )


def check_allowed(items: Sequence[Item] | None, catalog: ItemCatalog) -> None:
    """Refuses `allowed_items` that cannot be recommended: what is meant by them is unclear."""
    for place, item in enumerate(items or ()):
        if item not in catalog:
            raise HTTPException(422, f"allowed_items[{place}] is {repr_json(item)}, which is not in {_the(catalog)}.")


def known_items(histories: list[list[Item]], recommender: Recommender) -> tuple[list[list[Item]], list[str]]:
    """Histories without items that are not in the catalog, and a sentence for each row that is answered otherwise
    than it was asked."""
    rows, warnings = [], []
    for row, history in enumerate(histories):
        known, warning = _split(f"histories[{row}]", history, recommender.catalog)
        rows.append(known)
        warnings += warning
        if not known:
            what = f"histories[{row}] {'holds no known item' if history else 'is empty'}"
            if recommender.item_counts is None:
                raise HTTPException(
                    422, f"{what}, and this model has no counts of training interactions to answer by; leave it out."
                )
            warnings.append(f"{what}; its list is of what was taken most often in training.")
    return rows, warnings


def known_to_explain(asked: ExplainRequest, limits: Limits, catalog: ItemCatalog) -> tuple[list[Item], list[str]]:
    """The history without items that are not in the catalog, and what was left out."""
    _check_at_most("history holds", len(asked.history), limits.max_history_items, " items; send the latest")
    if asked.item not in catalog:
        raise HTTPException(422, f"item is {repr_json(asked.item)}, which is not in {_the(catalog)}.")
    known, warnings = _split("history", asked.history, catalog)
    if not known:
        raise HTTPException(
            422, f"history is {repr_json(asked.history)}, of which nothing is in {_the(catalog)}; give one known item."
        )
    return known, warnings


def _check_at_most(what: str, number: int, limit: int, remedy: str = "") -> None:
    if number > limit:
        raise HTTPException(422, f"{what} {repr_json(number)}, but this server allows at most {limit}{remedy}.")


def _split(name: str, history: Sequence[Item], catalog: ItemCatalog) -> tuple[list[Item], list[str]]:
    """The known items, and a sentence about the unknown ones where there are any."""
    (known,), unknown = catalog.known_items([history])
    if not unknown:
        return known, []
    some = ", ".join(repr_json(item) for _, item in unknown[:5]) + (", ..." if len(unknown) > 5 else "")
    return known, [f"{name}: items that are not in {_the(catalog)} were left out: {some}."]


def _the(catalog: ItemCatalog) -> str:
    return f"the catalog of {len(catalog)} items (they look like {repr_json(catalog.items[0])})"
