"""Data, tokenizer, catalog and model of a run."""

import pytest
import torch

from gflowtrl.data import SyntheticShop, build_tokenizer, write_folder
from gflowtrl.pipeline.models import build_model
from gflowtrl.pipeline.run_data import prepare
from gflowtrl.policy import CausalTreePolicy
from gflowtrl.policy.temperature import set_temperature, temperature_of
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
