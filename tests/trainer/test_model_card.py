"""Model cards: the model that training started from, and the optional sections."""

from dataclasses import replace

import pytest
from huggingface_hub import ModelCard
from peft import LoraConfig

from gflowtrl import APAOConfig, APAOTrainer
from gflowtrl.trainer.model_card import BaseModel, CardFacts, base_model, write_card
from tests.tiny import tiny_model

from .world import TOKENIZER, make_catalog, make_rows, make_trainer


FACTS = CardFacts(
    name="mine", architecture="LlamaForCausalLM", auto_class="AutoModelForCausalLM", trainer="GFlowNetTrainer",
    items=24, depth=3, example="it's", beams=10, methods=["balance"], settings={"losses": "1 x exact_flow | more"},
)  # fmt: skip
DATA = {"name": "Office: 2014", "users": 1234, "items": 24, "interactions": 5678, "synthetic": False}


def card_of(facts, folder) -> ModelCard:
    write_card(facts, folder)
    return ModelCard.load(folder / "README.md")


def test_a_base_model_is_known_from_its_card_the_cache_or_its_folder(tmp_path):
    folder = tmp_path / "bytes"
    folder.mkdir()
    assert base_model("") is None and base_model(None) is None
    assert base_model(str(folder)) == BaseModel("bytes", on_hub=False)
    (folder / "README.md").write_text("no front matter")
    assert base_model(str(folder)) == BaseModel("bytes", on_hub=False)
    (folder / "README.md").write_text("---\nlicense: other\nlicense_name: own\nlicense_link: LICENSE\n---\n")
    own = {"license": "other", "license_name": "own", "license_link": "LICENSE"}
    assert base_model(str(folder)) == BaseModel("bytes", on_hub=False, license=own)
    cached = tmp_path / "models--some--model" / "snapshots" / "abc"
    cached.mkdir(parents=True)
    assert base_model(str(cached)) == BaseModel("some/model", on_hub=True)
    assert base_model("nobody/never-downloaded") == BaseModel("nobody/never-downloaded", on_hub=True)


def test_a_model_that_continues_a_gflowtrl_model_has_the_same_base(tmp_path):
    base = {"name": "some/model", "on_hub": True, "license": {"license": "apache-2.0"}}
    card = card_of(replace(FACTS, base=base), tmp_path)
    assert card.data.base_model == "some/model" and card.data.license == "apache-2.0"
    assert "Training started from `some/model` (license: apache-2.0)." in card.text
    assert base_model(str(tmp_path)) == BaseModel("some/model", True, {"license": "apache-2.0"})
    card_of(FACTS, tmp_path)
    assert base_model(str(tmp_path)) is None  # trained from random weights


def test_data_results_and_special_characters(tmp_path):
    results = [{"split": "test", "users": 1234, "metrics": {"recall@5": 0.1 + 0.2, "ndcg@5": 0.0}}]
    data = DATA | {"license": "CC BY 4.0", "source": None}
    card = card_of(replace(FACTS, data=data, results=results), tmp_path)
    for line in ("| license | CC BY 4.0 |", "| source | not stated |", "| users | 1,234 |", "| recall@5 | 0.3000 |",
                 "| metric | test, 1,234 users |", "| losses | 1 x exact_flow \\| more |", '[["it\'s"]]'):  # fmt: skip
        assert line in card.text
    assert {r.metric_name: r.metric_value for r in card.data.eval_results} == results[0]["metrics"]
    assert {(r.dataset_name, r.dataset_type) for r in card.data.eval_results} == {("Office: 2014", "office-2014")}
    assert "Not evaluated yet." in card_of(FACTS, tmp_path).text


def test_apao_is_cited_if_it_is_used(tmp_path):
    options = {"train_dataset": make_rows(), "catalog": make_catalog(), "processing_class": TOKENIZER}
    args = APAOConfig(str(tmp_path), use_cpu=True)
    APAOTrainer(tiny_model(len(TOKENIZER)), args, **options).save_model()
    card = ModelCard.load(tmp_path / "README.md")
    assert "2603.02730" in card.text and "2506.16114" not in card.text and "apao" in card.data.tags
    make_trainer(tmp_path, loss_type="sft").save_model()
    card = ModelCard.load(tmp_path / "README.md")
    assert "## Papers" not in card.text and not {"apao", "gflownet"} & set(card.data.tags)


def test_the_card_of_adapters_does_not_load_the_weights_alone(tmp_path):
    lora = LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    make_trainer(tmp_path, loss_type="sft", peft_config=lora).save_model()
    text = (tmp_path / "README.md").read_text()
    assert (tmp_path / "adapter_config.json").is_file()
    assert "AutoModelForCausalLM" not in text and "Recommender.from_pretrained" in text
    assert "A LlamaForCausalLM that" in text  # not PEFT's wrapper


def test_a_card_that_cannot_be_written_keeps_the_old_one(tmp_path, monkeypatch):
    card_of(FACTS, tmp_path)
    before = (tmp_path / "README.md").read_text()
    monkeypatch.setattr("gflowtrl.files.os.replace", lambda *names: (_ for _ in ()).throw(OSError("full")))
    with pytest.raises(OSError, match="full"):
        write_card(replace(FACTS, name="other"), tmp_path)
    assert (tmp_path / "README.md").read_text() == before and [f.name for f in tmp_path.iterdir()] == ["README.md"]
