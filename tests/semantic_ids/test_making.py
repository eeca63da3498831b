"""Semantic ids by named options are those of the functions that the options name."""

import argparse
from dataclasses import fields

import numpy as np
import pytest
import torch

from gflowtrl.cli import tokenize
from gflowtrl.data import leave_one_out
from gflowtrl.semantic_ids import (
    RQVAE,
    ItemTokenizer,
    ResidualKMeans,
    SemanticIdOptions,
    TfidfEmbedder,
    combine_vectors,
    cooccurrence_vectors,
    item_texts,
    load_vectors,
    make_item_tokenizer,
)


@pytest.fixture(scope="module")
def sequences(catalog):
    return leave_one_out(catalog).train_sequences


def ids_of(catalog, sequences, **options):
    return make_item_tokenizer(SemanticIdOptions(**options), catalog, sequences)[0].semantic_ids


SMALL = {"levels": 2, "codes": 16}


@pytest.mark.parametrize("collisions", ["reassign", "level", "keep"])
@pytest.mark.parametrize("balanced", [False, True])
def test_ids_of_texts(catalog, balanced, collisions):
    own = ItemTokenizer(ResidualKMeans(2, 16, balanced, 3), TfidfEmbedder(seed=3), collisions, ["title"]).fit(catalog)
    name = "balanced" if balanced else "kmeans"
    options = {**SMALL, "quantizer": name, "collisions": collisions, "features": ["title"], "seed": 3}
    assert ids_of(catalog, None, **options) == own.semantic_ids  # None: interactions are not read


@pytest.mark.parametrize("weight", [0.3, 1.0])
def test_ids_of_interactions_and_of_both(catalog, sequences, weight):
    vectors = cooccurrence_vectors(sequences, catalog.items)
    if weight < 1:
        texts = item_texts(catalog)
        vectors = combine_vectors(TfidfEmbedder().fit(texts).embed(texts), vectors, weight)
    own = ItemTokenizer(ResidualKMeans(2, 16)).fit(vectors, catalog.items)
    assert ids_of(catalog, sequences, **SMALL, collaborative=weight) == own.semantic_ids


def test_ids_of_a_file_of_vectors(catalog, tmp_path):
    file = tmp_path / "vectors.npy"
    np.save(file, torch.randn(len(catalog.items), 5, generator=torch.Generator().manual_seed(0)).numpy())
    own = ItemTokenizer(ResidualKMeans(2, 16)).fit(load_vectors(file, catalog.items), catalog.items)
    assert ids_of(catalog, None, **SMALL, vectors=str(file)) == own.semantic_ids


def test_the_quantizer_of_rqvae_has_the_options():
    quantizer = SemanticIdOptions("rqvae", levels=2, seed=5).make_quantizer(100)
    assert isinstance(quantizer, RQVAE) and quantizer.config == RQVAE(2, 16, seed=5).config


def test_too_few_ids_are_an_error_before_the_quantizer_is_fitted(catalog, monkeypatch):
    monkeypatch.setattr(ResidualKMeans, "fit_encode", lambda *_: pytest.fail("the quantizer is fitted"))
    with pytest.raises(ValueError, match="cannot have unique ids with 1 levels of 8 codes, which give 8 ids"):
        ids_of(catalog, None, levels=1, codes=8)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"quantizer": "k-means"}, "quantizer is 'k-means'; choose 'kmeans' or"),
        ({"levels": 26}, "levels is 26"),
        ({"codes": 1}, "codes is 1; it must be a whole number of at least 2 or None"),
        ({"seed": -1}, "seed is -1"),
        ({"collaborative": float("nan")}, "collaborative is nan"),
        ({"collaborative": 1, "features": ["title"]}, "features is set, but collaborative is 1"),
        ({"collaborative": 1, "embedder": "some-model"}, "embedder is set, but collaborative is 1"),
        ({"collaborative": 1.0, "vectors": "a.npy"}, "vectors is set, but collaborative is 1"),
        ({"vectors": "a.npy", "features": ["title"]}, "features is set, but vectors are used"),
        ({"vectors": "a.npy", "embedder": "some-model"}, "embedder is set, but vectors are used"),
        ({"features": []}, "features is empty"),
    ],
)
def test_options_out_of_range_or_without_effect_are_refused(options, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        SemanticIdOptions(**options)


def test_the_command_has_the_same_options_and_defaults(monkeypatch):
    seen: list[argparse.Namespace] = []
    monkeypatch.setattr(tokenize, "_tokenize", seen.append)
    tokenize.main(["--data_dir", "x"])
    for entry in fields(SemanticIdOptions):
        assert getattr(seen[0], entry.name) == entry.default, entry.name
