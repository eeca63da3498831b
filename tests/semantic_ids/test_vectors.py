"""Item texts, embedders and item vectors."""

import sys
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from gflowtrl.semantic_ids import (
    SentenceTransformerEmbedder,
    TfidfEmbedder,
    combine_vectors,
    cooccurrence_vectors,
    item_texts,
    load_vectors,
)


def test_texts_contain_the_features_and_empty_texts_are_counted(catalog, caplog):
    texts = item_texts(catalog)
    assert texts[:2] == ["red lamp\noffice, lamps", "blue desk\noffice, desks"]
    assert texts[119] == "" and "1 of 120 items have no text" in caplog.text
    assert item_texts(catalog, features=("title",), items=[8, 1]) == ["black lamp", "blue desk"]
    with pytest.raises(ValueError, match="any of the features color; available features: categories, title"):
        item_texts(catalog, features=("color",))
    with pytest.raises(ValueError, match="item 120 is not in the catalog"):
        item_texts(catalog, items=[120])
    with pytest.raises(ValueError, match="available features: none"):
        item_texts(replace(catalog, item_features={}))
    specs = {"color": "red", "size": {"width": 0, "depth": None}, "tags": ["a", "b"], "note": ""}
    texts = item_texts(replace(catalog, item_features={0: {"specs": specs}}), features=("specs",))
    assert texts[0] == "color red, size width 0, tags a, b"


def test_items_with_similar_texts_are_close(catalog):
    texts = item_texts(catalog)
    vectors = TfidfEmbedder(dim=8).fit(texts).embed(texts)
    assert vectors.shape == (120, 8) and vectors.dtype == torch.float32
    torch.testing.assert_close(vectors[:119].norm(dim=1), torch.ones(119))
    assert not vectors[119].any()
    cosines = vectors @ vectors.T
    assert cosines[0, 40] > 0.999 and cosines[0, 8] > cosines[0, 5]  # the same text; the same kind; the same color
    assert TfidfEmbedder(dim=256).fit(texts).embed(texts).shape[1] < 24  # fewer columns than words


def test_a_loaded_embedder_can_be_fitted_again(catalog):
    texts = item_texts(catalog)
    fitted = TfidfEmbedder(dim=8).fit(texts)
    loaded = TfidfEmbedder.from_state(fitted.config, fitted.state())
    assert loaded.embed(texts).equal(fitted.embed(texts))
    other = ["one two", "two three", "three one", "one two three"]
    assert loaded.fit(other).embed(other).equal(TfidfEmbedder(dim=8).fit(other).embed(other))
    kept = loaded.state()["idf"]
    with pytest.raises(ValueError, match="fewer than three words"):
        loaded.fit(["lamp"])
    assert loaded.state()["idf"].equal(kept)  # a fit that fails changes nothing


def test_tfidf_needs_words():
    with pytest.raises(RuntimeError, match="Call fit"):
        TfidfEmbedder().embed(["a lamp"])
    for texts in (["", "", ""], ["lamp", "desk", "chair"], ["lamp lamp", "lamp"]):
        with pytest.raises(ValueError, match="fewer than three words"):
            TfidfEmbedder().fit(texts)
    with pytest.raises(ValueError, match="dim is 0; it must be a whole number of at least 1"):
        TfidfEmbedder(dim=0)


def test_sentence_transformers_are_optional_and_load_folders(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "sentence_transformers", None)
    with pytest.raises(ImportError, match=r"pip install gflowtrl\[text\]"):
        SentenceTransformerEmbedder("all-MiniLM-L6-v2")
    with pytest.raises(FileNotFoundError, match="no sentence-transformers model"):
        SentenceTransformerEmbedder(tmp_path / "nowhere")

    class Model:
        def __init__(self, name, trust_remote_code):
            assert trust_remote_code is False
            self.name = name

        def encode(self, texts, convert_to_tensor, normalize_embeddings):
            assert convert_to_tensor and normalize_embeddings
            return torch.ones(len(texts), 4, dtype=torch.float16) / 2

    monkeypatch.setitem(sys.modules, "sentence_transformers", SimpleNamespace(SentenceTransformer=Model))
    embedder = SentenceTransformerEmbedder(tmp_path)
    assert embedder.model.name == str(tmp_path) and embedder.config == {"name_or_folder": str(tmp_path)}
    expected = torch.tensor([[0.5] * 4, [0.0] * 4])
    assert embedder.fit(["x"]).embed(["a lamp", ""]).equal(expected)


def test_loading_vectors(tmp_path):
    vectors = torch.randn(3, 2)
    np.save(tmp_path / "v.npy", vectors.double().numpy())
    save_file({"any": vectors}, tmp_path / "v.safetensors")
    for name in ("v.npy", "v.safetensors"):
        assert load_vectors(tmp_path / name, ["a", "b", "c"]).equal(vectors)
        with pytest.raises(ValueError, match="2 items but 3 rows"):
            load_vectors(tmp_path / name, ["a", "b"])
    save_file({"one": vectors, "two": vectors + 1}, tmp_path / "two.safetensors")
    with pytest.raises(ValueError, match=r"2 tensors \(one, two\)"):
        load_vectors(tmp_path / "two.safetensors", ["a", "b", "c"])
    np.save(tmp_path / "objects.npy", np.array([{}], dtype=object), allow_pickle=True)
    with pytest.raises(ValueError, match="allow_pickle=False"):
        load_vectors(tmp_path / "objects.npy", ["a"])
    with pytest.raises(ValueError, match=r"v\.npy: There are 2 items"):
        load_vectors(tmp_path / "v.npy", ["a", "b"])
    whole = (tmp_path / "v.npy").read_bytes()
    broken = {
        "empty.npy": b"", "short.npy": whole[:-5], "header.npy": whole.replace(b"(3, 2)", b"(3, {}"),
        "huge.npy": whole.replace(b"(3, 2)", b"(3, 9" + 30 * b"9"), "zip.npy": b"PK\x03\x04" + whole,
        "fake.safetensors": 99 * b"\xff", "empty.safetensors": b"",
        "short.safetensors": (tmp_path / "v.safetensors").read_bytes()[:-5],
    }  # fmt: skip
    for name, content in broken.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=rf"/{name} cannot be read as .*\. Repair or replace the file\."):
            load_vectors(tmp_path / name, ["a", "b", "c"])
    (tmp_path / "v.csv").write_text("")
    with pytest.raises(ValueError, match=r"neither .npy nor .safetensors"):
        load_vectors(tmp_path / "v.csv", [])
    with pytest.raises(FileNotFoundError):
        load_vectors(tmp_path / "none.npy", [])


def test_co_occurrence_vectors_factorize_the_ppmi():
    """With as many columns as the rank of the matrix, products of the vectors are cosines of rows of |PPMI|."""
    sequences = [[0, 1], [1, 0, 0], [2, 3], [3, 2], [0, 4], [2]]
    vectors = cooccurrence_vectors(sequences, [0, 1, 2, 3, 4, 5], dim=5).double()
    count = np.zeros((6, 6))
    for sequence in sequences:
        for one in set(sequence):
            for other in set(sequence) - {one}:
                count[one, other] += 1
    share = count.sum(1) / count.sum()
    with np.errstate(divide="ignore", invalid="ignore"):
        ppmi = np.nan_to_num(np.maximum(np.log(count / count.sum() / np.outer(share, share)), 0))
    u, s, _ = np.linalg.svd(ppmi)
    rows = u[:, :5] * np.sqrt(s[:5])
    rows[5] = 0  # item 5 has no interactions
    lengths = np.linalg.norm(rows, axis=1, keepdims=True)
    rows = rows / np.where(lengths > 1e-9, lengths, 1)
    np.testing.assert_allclose(vectors @ vectors.T, rows @ rows.T, atol=1e-5)
    assert not vectors[5].any()


def test_items_taken_together_have_similar_vectors(catalog, caplog):
    vectors = cooccurrence_vectors(catalog.sequences, catalog.items, dim=16)
    cosines = vectors @ vectors.T
    assert cosines[0, 8] > 0.9 and cosines[0, 1].abs() < 0.1  # each user takes items of one kind
    assert "8 of 120 items, the first is 112, occur with no other item" in caplog.text and not vectors[112:].any()
    assert vectors.equal(cooccurrence_vectors(catalog.sequences, catalog.items, dim=16))
    with pytest.raises(ValueError, match="Item 8 is not in the catalog of 2 items"):
        cooccurrence_vectors(catalog.sequences, [0, 1])
    with pytest.raises(ValueError, match="Item 1 is given twice"):
        cooccurrence_vectors([[1]], [1, 1])
    with pytest.raises(ValueError, match="need items that occur together"):
        cooccurrence_vectors([[0], [1]], [0, 1, 2])


def test_combined_distances_are_the_weighted_sum_of_both():
    one, other = torch.randn(5, 3), torch.randn(5, 7)
    both = combine_vectors(one, other, weight=0.3)

    def squared(vectors):
        return torch.cdist(vectors, vectors).square()

    unit = torch.nn.functional.normalize
    torch.testing.assert_close(squared(both), 0.7 * squared(unit(one)) + 0.3 * squared(unit(other)))
    with pytest.raises(ValueError, match=r"weight is 2; it must be a number in \[0, 1\]"):
        combine_vectors(one, other, weight=2)
    with pytest.raises(ValueError, match="5 items but 4 rows"):
        combine_vectors(one, other[:4])
