"""A file of items and their features, outside of a data folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from gflowtrl.catalog import Item

from .parquet import read_parquet_items
from .readers import check_features, check_one_type, json_rows


def read_items(file: str | Path) -> dict[Item, dict[str, Any]]:
    """Read items and their features from JSON lines `{"item": ..., "title": ...}` or from a parquet file.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it has no items, or a broken or repeated one; the message names the line.
    """
    file, found = Path(file), {}
    if not file.exists():
        raise FileNotFoundError(f"There is no file {file}. Check the path.")
    rows = read_parquet_items(file) if file.suffix == ".parquet" else json_rows(file, "item")
    for where, item, row in rows:
        if item in found:
            raise ValueError(f"{where}: item {item!r} is on an earlier row already. Merge the two rows.")
        found[item] = {name: value for name, value in row.items() if name != "item"}
        check_features(found[item], where)
    if not found:
        raise ValueError(f"{file} has no items. Write one line per item.")
    check_one_type(found, file)
    return found
