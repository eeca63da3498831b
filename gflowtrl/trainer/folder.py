"""What the folder of a saved recommender says of its items, for the trainer that goes on from it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from gflowtrl.catalog import ItemCatalog
from gflowtrl.catalog.catalog import CATALOG_FILE
from gflowtrl.recommender import read_details


def folder_details(directory: str, catalog: ItemCatalog) -> dict[str, Any]:
    """`titles` and `item_counts` of a folder, those that it has; none where its catalogue lists other items.

    Raises:
        ValueError: the folder's files are of different numbers of items.
    """
    file = Path(directory, CATALOG_FILE)
    if not file.is_file() or json.loads(file.read_text(encoding="utf-8"))["items"] != catalog.items:
        return {}
    return read_details(Path(directory), catalog)
