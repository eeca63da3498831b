"""Items whose features meet a condition in SQL, for example `price < 20`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import duckdb
import pyarrow as pa

from gflowtrl.catalog import Item

from .database import Database


_POSITION = "gflowtrl_position"


def items_where(items: Sequence[Item], features: Mapping[Item, Mapping[str, Any]], condition: str) -> list[Item]:
    """Return the items that meet a condition, in the order of `items`.

    Args:
        items: the catalog.
        features: features of the items that have some, as in `InteractionData.item_features`.
        condition: a condition of SQL over the features, with the item itself as `item`. Missing features are NULL, so
            `price < 20` leaves out items without a price. Lists are lists: `list_contains(categories, 'Pens')`.
            Columns with values of several kinds are text: `try_cast(price AS DOUBLE) < 20`.

    Raises:
        ValueError: the condition is invalid (the message lists the columns), or no item meets it.
    """
    names = ["item", *dict.fromkeys(name for row in features.values() for name in row)]
    if len({name.lower() for name in names}) < len(names):  # SQL does not distinguish them
        raise ValueError(f"Features with equal names, apart from capitals, cannot be used: {', '.join(names)}.")
    columns = {"item": pa.array(items)}
    columns |= {name: _column(features.get(item, {}).get(name) for item in items) for name in names[1:]}
    table = pa.table({_POSITION: pa.array(range(len(items))), **columns})
    with Database() as database, database.view("items", table):
        # On lines of its own, so that a comment at its end does not reach the parenthesis.
        query = f"SELECT {_POSITION} FROM items WHERE (\n{condition}\n)"
        try:
            if len(database.connection.extract_statements(query)) != 1:
                raise ValueError("it must be one condition")
            found = {row[0] for row in database.connection.execute(query).fetchall()}
        except (duckdb.Error, ValueError) as error:
            reason = str(error).split("\n")[0]
            known = database.connection.execute("DESCRIBE items").fetchall()
            types = ", ".join(f"{name} ({kind})" for name, kind, *_ in known if name != _POSITION)
            raise ValueError(
                f"The condition {condition!r} is invalid: {reason}. The columns are {types}; text becomes a number by "
                f"try_cast(name AS DOUBLE)."
            ) from None
    if not found:
        raise ValueError(f"No item meets the condition {condition!r}, among {len(items)}. Check it.")
    return [item for position, item in enumerate(items) if position in found]


def _column(values: Iterable[Any]) -> pa.Array:
    """A column of numbers, booleans or lists of text if all values are such, else of text."""
    found = list(values)
    known = [value for value in found if value is not None]
    if all(isinstance(value, bool) for value in known):
        return pa.array(found, pa.bool_())
    if all(isinstance(value, int | float) and not isinstance(value, bool) for value in known):
        whole = all(isinstance(value, int) and abs(value) < 2**63 for value in known)
        return pa.array(found if whole else [None if value is None else float(value) for value in found])
    if all(isinstance(value, list) for value in known):
        return pa.array([None if value is None else list(map(str, value)) for value in found], pa.list_(pa.string()))
    return pa.array([None if value is None else str(value) for value in found], pa.string())
