"""The flat arrays, read with numpy alone, describe the prefix tree and its items."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch

from gflowtrl import ItemCatalog, PrefixTree, Recommender
from gflowtrl.export import export
from gflowtrl.export.arrays import catalog_arrays
from tests.export.shop import make_recommender
from tests.tiny import catalog_of, random_paths


PAGE = Path(__file__).parents[2] / "docs" / "export.md"


def leaves_by_walking(arrays: dict[str, np.ndarray]) -> dict[tuple[int, ...], int]:
    """Return the leaf of each path, found by a search from the root that reads the arrays only."""
    found, waiting = {}, [(0, ())]
    while waiting:
        node, path = waiting.pop()
        if arrays["node_leaf"][node] >= 0:
            found[path] = int(arrays["node_leaf"][node])
        for edge in range(arrays["child_offsets"][node], arrays["child_offsets"][node + 1]):
            waiting.append((arrays["child_nodes"][edge], (*path, int(arrays["child_tokens"][edge]))))
    return found


@pytest.mark.parametrize("ragged", [False, True])
@pytest.mark.parametrize("num_leaves", [1, 7, 150])
def test_the_arrays_hold_every_path_and_no_other(num_leaves, ragged):
    catalog = catalog_of(random_paths(num_leaves, ragged=ragged))
    tree, arrays = catalog.tree, catalog_arrays(catalog)
    expected = {tuple(t for t in path if t >= 0): leaf for leaf, path in enumerate(tree.paths.tolist())}
    assert leaves_by_walking(arrays) == expected
    assert all(array.dtype == np.int32 for array in arrays.values())
    for depth, (begin, end) in enumerate(zip(tree.level_start, tree.level_start[1:], strict=False)):
        if depth == tree.max_depth:
            break
        nodes = torch.arange(begin, end)
        tokens, children = tree.children(nodes, depth)
        offsets = arrays["child_offsets"]
        for node, row, below in zip(nodes.tolist(), tokens.tolist(), children.tolist(), strict=True):
            edges = slice(offsets[node], offsets[node + 1])
            assert arrays["child_tokens"][edges].tolist() == [token for token in row if token >= 0]
            assert arrays["child_nodes"][edges].tolist() == [child for child in below if child >= 0]


def test_items_that_share_an_id_are_at_one_leaf():
    paths = random_paths(5)
    tokens = paths[[0, 1, 2, 0, 3, 4, 1]]
    catalog = ItemCatalog(list("abcdefg"), [("<t>",) * 3] * 7, tokens)
    arrays = catalog_arrays(catalog)
    for leaf in range(5):
        rows = arrays["leaf_items"][slice(*arrays["leaf_item_offsets"][leaf : leaf + 2])]
        assert [catalog.items[row] for row in rows] == catalog.items_of(leaf)
    assert arrays["item_tokens"].tolist() == tokens.tolist()


@pytest.mark.skipif(not PAGE.exists(), reason="docs/export.md does not exist: an installed copy is tested")
def test_the_reader_of_the_page_reads_an_export(tmp_path):
    recommender = make_recommender()
    recommender.save_pretrained(tmp_path / "model")
    folder = export(tmp_path / "model", "csr", tmp_path / "csr")
    (code,) = (code for code in re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL) if "np.load" in code)
    assert re.findall(r"^(?:import|from) (\w+)", code, re.MULTILINE) == ["json", "pathlib", "numpy"]
    names: dict = {}
    exec(code, names)
    read = names["read_catalog"](folder)
    for item, tokens in zip(recommender.catalog.items, recommender.catalog.item_token_ids.tolist(), strict=True):
        path = [token for token in tokens if token >= 0]
        assert names["items_at"](read, path) == recommender.catalog.items_of(int(recommender.catalog.leaf_of([item])))
    tree: PrefixTree = recommender.catalog.tree
    root = sorted(set(tree.paths[:, 0].tolist()))
    assert names["children"](read, 0)[0].tolist() == root
    assert names["items_at"](read, root[:1]) == []


def test_the_header_has_what_prompts_need(tmp_path):
    make_recommender(temperature=0.7).save_pretrained(tmp_path / "model")
    folder = export(tmp_path / "model", "csr", tmp_path / "csr")
    header = json.loads((folder / "catalog.json").read_text())
    recommender = Recommender.from_pretrained(tmp_path / "model")
    prompt, batch = header["prompt"], recommender.encoder([["i010", "short"]])
    table, index = np.load(folder / "prompt_tokens.npy"), header["items"].index
    tokens = np.concatenate([table[index("i010")], table[index("short")]])
    assert [*prompt["head"], *tokens[tokens >= 0], *prompt["tail"]] == batch["input_ids"][0].tolist()
    assert prompt["max_history_items"] == 5 and header["temperature"] == 0.7
    assert header["end_token"] == recommender.tokenizer.eos_token_id
