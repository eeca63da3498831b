"""Data, tokenizer, catalog and model of a run."""

import time
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from threading import Barrier, Thread, current_thread

import numpy as np
import pytest
import torch

from gflowtrl.catalog import ItemCatalog
from gflowtrl.data import SyntheticShop, build_tokenizer, write_folder
from gflowtrl.pipeline import Recipe, run
from gflowtrl.pipeline import run_data as run_data_module
from gflowtrl.pipeline.models import build_model
from gflowtrl.pipeline.run_data import prepare
from gflowtrl.policy import CausalTreePolicy
from gflowtrl.policy.temperature import set_temperature, temperature_of
from gflowtrl.semantic_ids import ItemTokenizer, ResidualKMeans, make_item_tokenizer
from tests.tiny import tiny_model

from .micro import micro_recipe, micro_settings


def test_a_local_checkpoint_gets_the_item_tokens(tmp_path):
    build_tokenizer({0: ("<foreign>",)}).save_pretrained(tmp_path / "checkpoint")
    checkpoint = tiny_model(vocab_size=4)
    set_temperature(checkpoint, 0.5)  # as MSL leaves it; SFT is of the logits as they are
    checkpoint.save_pretrained(tmp_path / "checkpoint")
    recipe = micro_recipe(tmp_path, model={"model_name_or_path": "checkpoint"}, folder=str(tmp_path))
    run_data = prepare(recipe)
    model = build_model(run_data)
    assert temperature_of(model) == 1.0
    assert model.get_input_embeddings().num_embeddings == len(run_data.tokenizer) > 4
    policy = CausalTreePolicy(model.eval(), run_data.catalog)
    log_probs = policy.leaf_log_probs(run_data.encoder(run_data.splits.test["history"][:3]))
    torch.testing.assert_close(log_probs.exp().sum(1), torch.ones(3))


def test_the_fingerprint_follows_the_content_and_not_the_place(tmp_path):
    settings = micro_settings(tmp_path)["data"]["shop"]
    prints = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        write_folder(SyntheticShop(**settings, seed=seed).generate()[0], tmp_path / name)
        prints.append(prepare(micro_recipe(tmp_path, data={}, data_dir=str(tmp_path / name))).fingerprint)
    assert prints[0] == prints[1] != prints[2]


def test_data_without_semantic_ids_is_refused(tmp_path):
    data = SyntheticShop(**micro_settings(tmp_path)["data"]["shop"]).generate()[0]
    write_folder(data, tmp_path / "data")
    (tmp_path / "data" / "semantic_ids.json").unlink()
    with pytest.raises(ValueError, match="holds no semantic_ids.json"):
        prepare(micro_recipe(tmp_path, data={}, data_dir=str(tmp_path / "data")))


def test_no_row_or_teacher_input_refers_to_the_truth(tmp_path):
    run_data = prepare(micro_recipe(tmp_path))
    allowed = {"row_id", "user", "history", "target", "session_items", "session_levels"}
    for split in (run_data.splits.train, run_data.splits.validation, run_data.splits.test):
        assert set(split.column_names) == allowed


# ------------------------------------------------------------------------------------ semantic ids made by the run
IDS = {"levels": 2, "codes": 8}


def bare_folder(path, change=lambda data: data):
    """Write the micro shop without semantic ids, and return its data."""
    shop = SyntheticShop(**micro_settings(path)["data"]["shop"]).generate()[0]
    data = change(replace(shop, semantic_ids=None, events=None))
    write_folder(data, path)
    return data


def prepared(root, folder, **options):
    settings = {"data": {"semantic_ids": {**IDS, **options}}, "data_dir": str(folder), "folder": str(root)}
    return prepare(micro_recipe(root / "out", **settings))


def test_a_folder_without_ids_gets_those_of_its_texts(tmp_path):
    data = bare_folder(tmp_path / "data")
    ids = ItemTokenizer(ResidualKMeans(2, 8)).fit(data).semantic_ids
    run_data = prepared(tmp_path, tmp_path / "data")
    assert run_data.interactions.semantic_ids == ids
    assert run_data.catalog.tree.num_leaves == len(data.items)
    write_folder(replace(data, semantic_ids=ids), tmp_path / "with_ids")
    read = prepare(micro_recipe(tmp_path / "out", data={}, data_dir=str(tmp_path / "with_ids")))
    assert read.fingerprint == run_data.fingerprint and read.item_tokenizer is None
    other = prepared(tmp_path, tmp_path / "with_ids", codes=4, levels=3)  # the ids of the folder are not used
    assert other.interactions.semantic_ids != ids and other.fingerprint != run_data.fingerprint


def test_held_out_items_do_not_change_the_ids(tmp_path):
    def held_out(data):
        return replace(
            data, sequences=[[*s[:-2], *data.items[user % 20 :][:2]] for user, s in enumerate(data.sequences)]
        )

    def trained_on(data):
        return replace(
            data, sequences=[[*data.items[user % 20 :][:2], *s[2:]] for user, s in enumerate(data.sequences)]
        )

    ids = []
    for number, change in enumerate([lambda data: data, held_out, trained_on]):
        bare_folder(tmp_path / str(number), change)
        ids.append(prepared(tmp_path, tmp_path / str(number), collaborative=1.0).interactions.semantic_ids)
    assert ids[0] == ids[1] != ids[2]


def test_ids_are_made_once_and_again_when_an_input_changes(tmp_path, monkeypatch):
    data = bare_folder(tmp_path / "data")
    vectors = torch.randn(len(data.items), 4, generator=torch.Generator().manual_seed(0)).numpy()
    np.save(tmp_path / "v.npy", vectors)  # its path is relative to the recipe
    for options in ({}, {"vectors": "v.npy"}, {"collaborative": 0.5}):
        first = prepared(tmp_path, tmp_path / "data", **options)
        with monkeypatch.context() as patch:
            patch.setattr(run_data_module, "make_item_tokenizer", lambda *_: pytest.fail("the ids are made again"))
            again = prepared(tmp_path, tmp_path / "data", **options)
        assert again.fingerprint == first.fingerprint
        assert again.interactions.semantic_ids == first.interactions.semantic_ids
    made = set((tmp_path / "out").glob("semantic_ids-*"))
    np.save(tmp_path / "v.npy", -2 * vectors[::-1])
    prepared(tmp_path, tmp_path / "data", vectors="v.npy")
    prepared(tmp_path, tmp_path / "data", seed=1)
    bare_folder(
        tmp_path / "renamed",
        lambda data: replace(
            data, item_features={0: {"title": "a b"}, **{item: data.item_features[item] for item in data.items[1:]}}
        ),
    )
    prepared(tmp_path, tmp_path / "renamed")
    assert len(made) == 3 and len(set((tmp_path / "out").glob("semantic_ids-*"))) == 6


def test_alignment_vectors_are_an_input_of_the_ids_and_relative_to_the_recipe(tmp_path, monkeypatch):
    data, seen, make = bare_folder(tmp_path / "data"), [], run_data_module.make_item_tokenizer

    def recorded(options, *given):
        seen.append(np.load(options.alignment_vectors))
        return make(replace(options, quantizer="kmeans", alignment=0.0, alignment_vectors=None), *given)  # at once

    monkeypatch.setattr(run_data_module, "make_item_tokenizer", recorded)
    for scale in (1.0, 1.0, 2.0):
        vectors = np.full((len(data.items), 3), scale, dtype=np.float32)
        np.save(tmp_path / "v.npy", vectors)
        prepared(tmp_path, tmp_path / "data", quantizer="rqvae", alignment=0.1, alignment_vectors="v.npy")
    assert [float(vectors.mean()) for vectors in seen] == [1.0, 2.0]


class TwoProcesses:
    """A stand-in for accelerate's state in two threads, of which the first is the main process."""

    def __init__(self):
        self.barrier, self.threads = Barrier(2), []

    @property
    def is_main_process(self):
        return current_thread() is self.threads[0]

    @contextmanager
    def main_process_first(self):
        if not self.is_main_process:
            self.barrier.wait(60)
        yield
        if self.is_main_process:
            self.barrier.wait(60)


def test_the_first_process_makes_the_ids_and_the_other_loads_them(tmp_path, monkeypatch):
    bare_folder(tmp_path / "data")
    state, makers, found = TwoProcesses(), [], {}

    def slowly(*arguments):
        makers.append(current_thread())
        time.sleep(0.3)
        return make_item_tokenizer(*arguments)

    def work():
        found[current_thread()] = prepared(tmp_path, tmp_path / "data")

    monkeypatch.setattr(run_data_module, "PartialState", lambda **_: state)
    monkeypatch.setattr(run_data_module, "make_item_tokenizer", slowly)
    state.threads = [Thread(target=work), Thread(target=work)]
    for thread in reversed(state.threads):  # the other one is there first
        thread.start()
    for thread in state.threads:
        thread.join(120)
    first, second = (found[thread] for thread in state.threads)
    assert makers == state.threads[:1]
    assert first.fingerprint == second.fingerprint
    assert first.interactions.semantic_ids == second.interactions.semantic_ids


def test_damaged_ids_are_an_error_that_names_the_folder(tmp_path):
    bare_folder(tmp_path / "data")
    prepared(tmp_path, tmp_path / "data")
    (file,) = (tmp_path / "out").glob("semantic_ids-*/item_tokenizer.safetensors")
    file.write_bytes(file.read_bytes()[:-8])
    with pytest.raises(ValueError, match=rf"different saves.*remove {file.parent}\."):
        prepared(tmp_path, tmp_path / "data")


def test_the_item_tokenizer_is_saved_with_each_model_for_new_items(tmp_path):
    settings = micro_settings(tmp_path, stages=["sft"])
    settings["data"]["semantic_ids"] = IDS  # of the titles of the shop
    recipe = Recipe(**settings)
    results = run(recipe, quiet=True)
    folder = Path(results["methods"]["sft"]["model"])
    tokenizer = ItemTokenizer.from_pretrained(folder / "item_tokenizer")
    assert tokenizer.semantic_ids == prepare(recipe).interactions.semantic_ids
    catalog = ItemCatalog.from_pretrained(folder)
    assert catalog.leaf_of(tokenizer.items).unique().numel() == len(tokenizer.items)
    new = tokenizer.add(["a new title"], [1000])
    assert len(new[1000]) == 2 and new[1000] not in prepare(recipe).interactions.semantic_ids.values()
