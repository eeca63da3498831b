"""The item tokenizer: ids, new items, saving and loading."""

import json
import math
from dataclasses import replace

import pytest
import torch

from gflowtrl.catalog import ItemCatalog
from gflowtrl.data import build_tokenizer, read_folder, write_folder
from gflowtrl.semantic_ids import RQVAE, ItemTokenizer, ResidualKMeans, TfidfEmbedder

from .test_quantizers import small_rqvae


def make(collisions="reassign", quantizer=None, **options):
    return ItemTokenizer(ResidualKMeans(2, 8) if quantizer is None else quantizer, collisions=collisions, **options)


@pytest.mark.parametrize(("collisions", "length"), [("reassign", 2), ("level", 3)])
def test_a_catalog_of_unique_ids(collisions, length, catalog, tmp_path):
    tokenizer = ItemTokenizer(ResidualKMeans(2, 16), collisions=collisions).fit(catalog)
    ids = tokenizer.semantic_ids
    assert list(ids) == catalog.items and {len(tokens) for tokens in ids.values()} == {length}
    assert ids[7] == tuple(
        f"<{letter}_{code}>" for letter, code in zip("abc", tokenizer.codes[7].tolist(), strict=False)
    )
    tree = ItemCatalog.from_semantic_ids(ids, build_tokenizer(ids)).tree
    assert tree.num_leaves == 120 and tree.max_depth == length
    write_folder(replace(catalog, semantic_ids=ids), tmp_path)
    assert read_folder(tmp_path).semantic_ids == ids


def test_kept_collisions_are_merged_leaves(catalog):
    ids = make("keep").fit(catalog).semantic_ids
    assert ItemCatalog.from_semantic_ids(ids, build_tokenizer(ids)).tree.num_leaves == len(set(ids.values())) < 120


@pytest.mark.parametrize("collisions", ["reassign", "level", "keep"])
@pytest.mark.parametrize("kind", ["text", "vectors", "rqvae"])
def test_save_load_and_add(collisions, kind, catalog, vectors, tmp_path):
    first, later = list(range(50)), list(range(50, 60))
    quantizer = small_rqvae(num_codes=16) if kind == "rqvae" else ResidualKMeans(2, 16)
    tokenizer = make(collisions, quantizer)
    texts = [f"{feature['title']} no {item % 7}" for item, feature in catalog.item_features.items()]
    rows = texts if kind == "text" else vectors
    assert tokenizer.fit(rows[:50], first) is tokenizer
    before = tokenizer.semantic_ids
    tokenizer.save_pretrained(tmp_path)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["item_tokenizer.json", "item_tokenizer.safetensors"]

    loaded = ItemTokenizer.from_pretrained(tmp_path)
    assert loaded.semantic_ids == before and loaded.num_levels == tokenizer.num_levels
    added = tokenizer.add(rows[50:60], later)
    assert loaded.add(rows[50:60], later) == added and list(added) == later
    assert loaded.semantic_ids == {**before, **added}
    if collisions != "keep":
        assert len(set(loaded.semantic_ids.values())) == 60

    loaded.save_pretrained(tmp_path)  # over the earlier one
    again = ItemTokenizer.from_pretrained(tmp_path)
    assert again.semantic_ids == loaded.semantic_ids
    assert again.quantizer.decode(again.codes[:, :2]).equal(tokenizer.quantizer.decode(tokenizer.codes[:, :2]))


def test_new_items_of_a_catalog_are_added(catalog):
    smaller = replace(catalog, items=catalog.items[:100], users=[], sequences=[])
    tokenizer = ItemTokenizer(ResidualKMeans(2, 16)).fit(smaller)
    before = tokenizer.semantic_ids
    added = tokenizer.add(catalog)
    assert list(added) == catalog.items[100:] and tokenizer.semantic_ids == {**before, **added}
    assert tokenizer.add(catalog) == {}


def test_new_items_use_the_features_of_fit(catalog, tmp_path):
    smaller = replace(catalog, items=catalog.items[:100], users=[], sequences=[])
    tokenizer = ItemTokenizer(ResidualKMeans(2, 16), collisions="keep", features=["title"]).fit(smaller)
    tokenizer.save_pretrained(tmp_path)
    loaded = ItemTokenizer.from_pretrained(tmp_path)
    assert loaded.features == ["title"]
    changed = {item: {**row, "categories": "green ink"} for item, row in catalog.item_features.items()}
    added = loaded.add(replace(catalog, item_features=changed))
    assert added[110] == tokenizer.semantic_ids[30]  # the same title
    assert len(ItemTokenizer.from_pretrained(tmp_path).add(catalog)) == 20


def test_the_same_seed_gives_the_same_ids(catalog):
    with_seed = [ItemTokenizer(ResidualKMeans(2, 16, seed=seed)).fit(catalog).semantic_ids for seed in (0, 0, 1)]
    assert with_seed[0] == with_seed[1] != with_seed[2]


def test_bad_input_is_refused(catalog, vectors):
    with pytest.raises(ValueError, match="120 vectors cannot be grouped into 256 codes"):
        ItemTokenizer().fit(catalog)
    with pytest.raises(ValueError, match="199 items but 200 texts or vectors"):
        make().fit(vectors, list(range(199)))
    with pytest.raises(ValueError, match="Item 5 is given twice"):
        make().fit(vectors, [5, *range(199)])
    with pytest.raises(ValueError, match="need items"):
        make().fit(vectors)
    with pytest.raises(ValueError, match="1 item vectors are not finite"):
        make().fit(torch.cat([vectors, torch.full((1, 12), math.nan)]), list(range(201)))
    with pytest.raises(ValueError, match="200 items cannot have unique ids"):
        make().fit(vectors, list(range(200)))
    with pytest.raises(ValueError, match="Leave one of the two out"):
        make(embedder=TfidfEmbedder()).fit(vectors, list(range(200)))
    with pytest.raises(ValueError, match="collisions is 'drop'; choose 'reassign'"):
        make("drop")


def test_bad_new_items_are_refused(vectors):
    with pytest.raises(RuntimeError, match="Call fit"):
        make().add(vectors, list(range(200)))
    tokenizer = make().fit(vectors[:50], list(range(50)))
    codes = tokenizer.codes
    with pytest.raises(ValueError, match="Item 49 has a semantic id already"):
        tokenizer.add(vectors[:2], [49, 50])
    with pytest.raises(ValueError, match="Item 'A21' is of type str, but .* of type int, for example 0. Use one type"):
        tokenizer.add(vectors[:2], ["A21", "A22"])
    with pytest.raises(ValueError, match="cannot embed texts"):
        tokenizer.add(["red lamp"], [50])
    with pytest.raises(ValueError, match="11 columns; they must have 12"):
        tokenizer.add(vectors[:1, :11], [50])
    with pytest.raises(ValueError, match="70 items cannot have unique ids with 2 levels of 8 codes, which give 64"):
        tokenizer.add(vectors[:20], list(range(50, 70)))
    assert tokenizer.codes is codes and len(tokenizer.items) == 50


def test_an_interrupted_save_is_detected(vectors, tmp_path):
    with pytest.raises(RuntimeError, match="Call fit"):
        make().save_pretrained(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"item_tokenizer.json is missing"):
        ItemTokenizer.from_pretrained(tmp_path)
    make().fit(vectors[:30], list(range(30))).save_pretrained(tmp_path)
    old = (tmp_path / "item_tokenizer.json").read_text()
    assert json.loads(old)["quantizer"]["config"] == {"num_levels": 2, "num_codes": 8, "balanced": False, "seed": 0}
    make().fit(vectors[30:60], list(range(30))).save_pretrained(tmp_path)
    (tmp_path / "item_tokenizer.json").write_text(old)
    with pytest.raises(ValueError, match="different saves"):
        ItemTokenizer.from_pretrained(tmp_path)


def test_the_default_is_residual_k_means_with_three_levels():
    tokenizer = ItemTokenizer()
    assert (tokenizer.quantizer.num_levels, tokenizer.quantizer.num_codes, tokenizer.num_levels) == (3, 256, 3)
    assert ItemTokenizer(RQVAE(), collisions="level").num_levels == 4
