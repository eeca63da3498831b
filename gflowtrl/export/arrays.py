"""The catalog of a recommender as flat arrays that any program can read: one `.npy` file each, and `catalog.json`.

The layout is described in docs/export.md, and the readers in `standalone/` follow it. Arrays are 32-bit integers.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from gflowtrl.catalog import ItemCatalog
from gflowtrl.data import PromptEncoder
from gflowtrl.files import write_text


if TYPE_CHECKING:
    from gflowtrl.recommender import Recommender


FORMAT, VERSION = "gflowtrl catalog", 1
CATALOG_FOLDER = "catalog"  # of the arrays, in exports that hold a model, too


def catalog_arrays(catalog: ItemCatalog) -> dict[str, np.ndarray]:
    """Return the prefix tree and the items at its leaves in compressed sparse rows (CSR).

    Returns:
        `child_offsets` `(M + 1,)`, `child_tokens` and `child_nodes` `(M - 1,)`: the children of node s are the entries
        `child_offsets[s]` to `child_offsets[s + 1] - 1`, sorted by token; `node_leaf` `(M,)`, the leaf that ends at
        each node or -1; `leaf_item_offsets` `(N + 1,)` and `leaf_items` `(items,)`: the items of each leaf in the same
        way; `item_tokens` `(history items, L)`, padded with -1 on the right. Retired items have no leaf.
    """
    tree = catalog.tree
    leaf_items = catalog.item_leaf.argsort(stable=True)
    ends = {"child_offsets": tree.num_children, "leaf_item_offsets": catalog.leaf_sizes}
    node_leaf = np.full(tree.num_nodes, -1)
    node_leaf[tree.leaf_nodes().cpu().numpy()] = np.arange(tree.num_leaves)
    return {
        **{name: np.append(0, sizes.cpu().numpy().cumsum()).astype(np.int32) for name, sizes in ends.items()},
        "child_tokens": tree.node_token[1:].int().cpu().numpy(),
        # Nodes are numbered level by level, and within a level in the order of their parents.
        "child_nodes": np.arange(1, tree.num_nodes, dtype=np.int32),
        "node_leaf": node_leaf.astype(np.int32),
        "leaf_items": leaf_items.int().cpu().numpy(),
        "item_tokens": catalog.history_token_ids.int().numpy(),
    }


def catalog_header(encoder: PromptEncoder, temperature: float, end_token: int | None) -> dict[str, Any]:
    """Return the content of `catalog.json`."""
    tree = encoder.catalog.tree
    return {
        "format": FORMAT,
        "version": VERSION,
        "num_nodes": tree.num_nodes,
        "num_leaves": tree.num_leaves,
        "num_items": len(encoder.catalog),
        "max_depth": tree.max_depth,
        "max_children": max(tree.max_children),
        "temperature": temperature,
        "end_token": end_token,
        "prompt": {
            "head": encoder.head,
            "tail": encoder.tail,
            "padding": encoder.padding,
            "max_history_items": encoder.max_history_items,
        },
        "items": encoder.catalog.history_items,
    }


def write(recommender: Recommender, folder: Path) -> None:
    """Write the catalog of a recommender as flat arrays into an existing folder.

    Args:
        recommender: its catalog, its prompts and its temperature are written.
        folder: gets `catalog.json` and the arrays of `catalog_arrays`, as `NAME.npy`, and `prompt_tokens.npy`
            `(history items, W)`, the tokens of each item in a prompt, padded with -1 on the right.
    """
    encoder = recommender.encoder
    arrays = catalog_arrays(recommender.catalog) | {"prompt_tokens": encoder.table.int().cpu().numpy()}
    for name, array in arrays.items():
        np.save(folder / f"{name}.npy", array, allow_pickle=False)
    header = catalog_header(encoder, recommender.policy.temperature, recommender.tokenizer.eos_token_id)
    write_text(folder / "catalog.json", json.dumps(header))
