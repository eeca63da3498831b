"""The pipeline with an encoder-decoder: SFT by Seq2SeqTrainer, everything else unchanged."""

import pytest
import torch
from safetensors.torch import load_file
from transformers import T5ForConditionalGeneration

from gflowtrl import Recommender
from gflowtrl.data import TargetCollator
from gflowtrl.pipeline import run
from gflowtrl.pipeline.models import build_model
from gflowtrl.pipeline.run_data import prepare

from .micro import micro_recipe
from .test_run import METHODS, Interrupt


T5 = {
    "model_type": "t5", "d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_decoder_layers": 1, "num_heads": 2,
}  # fmt: skip


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    recipe = micro_recipe(tmp_path_factory.mktemp("t5"), model=T5)
    return recipe, run(recipe, quiet=True)


def test_all_stages_run_and_load(finished):
    recipe, results = finished
    assert list(results["methods"]) == METHODS
    assert results["methods"]["control"]["steps"] == results["methods"]["gflownet"]["steps"] > 0
    for method in METHODS[1:]:
        recommender = Recommender.from_pretrained(results["methods"][method]["model"])
        assert isinstance(recommender.model, T5ForConditionalGeneration)
    history = prepare(recipe).splits.test["history"][0]
    assert len(recommender.recommend([history], k=5)[0]) == 5


def test_sft_lowers_the_loss_it_is_about(finished):
    """The negative log-likelihood of ids over the whole vocabulary, against the untrained model."""
    recipe, results = finished
    run_data = prepare(recipe)
    batch = TargetCollator(run_data.encoder)(run_data.splits.train.to_list())
    torch.manual_seed(recipe.seed)
    before = build_model(run_data).eval()
    after = T5ForConditionalGeneration.from_pretrained(results["methods"]["sft"]["model"]).eval()
    with torch.no_grad():
        untrained, trained = (float(model(**batch).loss) for model in (before, after))
    assert trained < 0.8 * untrained


def test_an_interrupted_sft_ends_like_an_undisturbed_one(finished, tmp_path):
    recipe, results = finished
    steps = results["methods"]["sft"]["steps"]
    again = micro_recipe(tmp_path, model=T5, stages=["sft"])
    with pytest.raises(KeyboardInterrupt):
        run(again, callbacks=[Interrupt("sft", step=steps // 2 + 2)], quiet=True)
    resumed = run(again, quiet=True)
    first, second = (
        load_file(f"{value['methods']['sft']['model']}/model.safetensors") for value in (results, resumed)
    )
    assert all(torch.equal(first[name], second[name]) for name in first)
