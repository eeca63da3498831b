"""A checkpoint is a complete recommender that transformers loads without warnings."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from gflowtrl import GFlowNetConfig, GFlowNetTrainer, ItemCatalog, Recommender
from gflowtrl.data import PromptEncoder
from gflowtrl.rewards import CollaborativeReward, GroundTruthReward
from tests.tiny import tiny_model

from .world import ITEMS, SEMANTIC_IDS, TOKENIZER, make_catalog, make_rows, make_trainer, teacher


HISTORIES = [["i010"], ["short", "twin"], ["i222", "i001", "i100"]]


def trained(folder, loss_type: str = "sft,trajectory_balance", model=None, **options) -> GFlowNetTrainer:
    rewards = [GroundTruthReward(), CollaborativeReward(teacher)]
    trainer = make_trainer(folder, rewards, model, loss_type=loss_type, max_steps=2, **options)
    trainer.train()
    trainer.save_model()
    return trainer


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> GFlowNetTrainer:
    """Trained with a log Z head; `args.output_dir` is the checkpoint."""
    folder = tmp_path_factory.mktemp("saved")
    return trained(folder, eval_dataset=make_rows(6, 1, 500), eval_strategy="steps", eval_steps=1, max_history_items=2)


def test_transformers_loads_it_without_warnings(saved, warned):
    model, report = AutoModelForCausalLM.from_pretrained(saved.args.output_dir, output_loading_info=True)
    assert not any(report.values()), report
    assert not warned
    expected = saved.model.state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in model.state_dict().items())
    assert model.config.architectures == ["LlamaForCausalLM"]
    tokenizer = AutoTokenizer.from_pretrained(saved.args.output_dir)
    assert tokenizer.get_vocab() == TOKENIZER.get_vocab()
    text = " ".join(SEMANTIC_IDS["i112"])
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_tied_embeddings_stay_tied(tmp_path, warned):
    config = tiny_model(len(TOKENIZER)).config
    config.tie_word_embeddings = True
    trained(tmp_path, model=AutoModelForCausalLM.from_config(config))
    model, report = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values()), report
    assert not warned
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_heads_have_a_separate_file(saved):
    heads = load_file(f"{saved.args.output_dir}/flow_heads.safetensors")
    assert {name: value.shape for name, value in heads.items()} == {
        name: value.shape for name, value in saved.model.named_parameters() if "flow_heads" in name
    }
    assert all(torch.equal(value, saved.model.state_dict()[name]) for name, value in heads.items())
    assert heads["flow_heads.outer.weight"].abs().sum() > 0  # it is initialized to 0
    assert not [name for name in load_file(f"{saved.args.output_dir}/model.safetensors") if "flow_heads" in name]


def test_without_heads_there_is_no_file(tmp_path):
    trained(tmp_path, "vargrad")
    assert not (tmp_path / "flow_heads.safetensors").exists()


def test_the_loaded_recommender_gives_the_same_lists_without_pickle(saved, monkeypatch):
    before = Recommender(saved.model, TOKENIZER, saved._catalog, 2).recommend(HISTORIES, k=5)
    monkeypatch.setattr(torch, "load", lambda *a, **k: pytest.fail("something was unpickled"))
    loaded = Recommender.from_pretrained(saved.args.output_dir)
    assert loaded.recommend(HISTORIES, k=5) == before
    assert loaded.catalog.items == ITEMS
    assert loaded.encoder.max_history_items == 2


def test_the_next_trainer_starts_from_the_folder_alone(saved, tmp_path):
    args = GFlowNetConfig(str(tmp_path), loss_type="sft", use_cpu=True)
    trainer = GFlowNetTrainer(str(saved.args.output_dir), args=args, train_dataset=make_rows())
    assert torch.equal(trainer.model.lm_head.weight, saved.model.lm_head.weight)
    assert trainer._catalog.items == ITEMS and trainer.processing_class.get_vocab() == TOKENIZER.get_vocab()


@pytest.mark.parametrize(("asked", "expected"), [(None, 3), (1, 1)])
def test_the_next_trainer_uses_the_history_length_of_the_folder(tmp_path, asked, expected):
    Recommender(tiny_model(len(TOKENIZER)), TOKENIZER, make_catalog(), 3).save_pretrained(tmp_path / "first")
    args = GFlowNetConfig(str(tmp_path / "second"), loss_type="sft", use_cpu=True, max_history_items=asked)
    trainer = GFlowNetTrainer(str(tmp_path / "first"), args=args, train_dataset=make_rows())
    batch = next(iter(trainer.get_train_dataloader()))
    assert batch["prompts"]["input_ids"].shape[1] == len(trainer._encoder.head) + 3 * expected
    trainer.save_model()
    assert Recommender.from_pretrained(tmp_path / "second").encoder.max_history_items == expected


def test_without_a_folder_the_history_length_is_the_encoders_or_20(tmp_path):
    assert make_trainer(tmp_path, loss_type="sft")._encoder.max_history_items == 20
    assert make_trainer(tmp_path, loss_type="sft", max_history_items=7)._encoder.max_history_items == 7
    encoder = PromptEncoder(make_catalog(), TOKENIZER, 6)
    for asked in (None, 6):
        trainer = make_trainer(tmp_path, loss_type="sft", prompt_encoder=encoder, max_history_items=asked)
        assert trainer._encoder.max_history_items == 6


def test_titles_and_counts_of_the_folder_are_kept(tmp_path):
    counts = torch.arange(len(ITEMS))
    first = Recommender(
        tiny_model(len(TOKENIZER)), TOKENIZER, make_catalog(), titles={"i010": "Lamp"}, item_counts=counts
    )
    first.save_pretrained(tmp_path / "first")

    def saved_again(**options) -> Recommender:
        args = GFlowNetConfig(
            str(tmp_path / "second"), loss_type="sft", use_cpu=True, max_steps=1, save_strategy="no", disable_tqdm=True
        )
        trainer = GFlowNetTrainer(str(tmp_path / "first"), args=args, train_dataset=make_rows(), **options)
        trainer.save_model()
        return Recommender.from_pretrained(tmp_path / "second")

    for options in ({}, {"catalog": make_catalog()}):
        kept = saved_again(**options)
        assert kept.titles == {"i010": "Lamp"} and torch.equal(kept.item_counts, counts)
    given = saved_again(item_titles={"i111": "Chair"}, item_counts=counts + 1)
    assert given.titles == {"i111": "Chair"} and torch.equal(given.item_counts, counts + 1)
    # The folder has no titles or counts of other items.
    more = ItemCatalog.from_semantic_ids(SEMANTIC_IDS | {"new": SEMANTIC_IDS["short"]}, TOKENIZER)
    recommender = saved_again(catalog=more)
    assert not recommender.titles and recommender.item_counts.sum() == len(make_rows())


def test_the_model_card_is_correct(saved):
    card = Path(saved.args.output_dir, "README.md").read_text(encoding="utf-8")
    last = [log for log in saved.state.log_history if "eval_ndcg@10" in log][-1]
    for claim in (
        "LlamaForCausalLM that recommends one of 24 items", "`GFlowNetTrainer`", "| step | 2 |",
        "| prompts per step | 8 |", "| losses | 1 x sft, 1 x trajectory_balance |",
        "| rewards | 1 x ground_truth, 1 x collaborative |", "4 per prompt from ground_truth, on_policy",
        "| metric | validation at step 2 |", f"| ndcg@10 | {last['eval_ndcg@10']:.4f} |", "search of width 10",
        "AutoModelForCausalLM.from_pretrained", "arXiv 2506.16114",
    ):  # fmt: skip
        assert claim in card
    assert "2603.02730" not in card


def test_a_checkpoint_of_another_loss_with_other_heads_is_an_error(saved, tmp_path):
    trained(tmp_path / "first", save_strategy="steps", save_steps=2)
    headless = make_trainer(tmp_path / "second", loss_type="sft")
    with pytest.raises(ValueError, match="flow heads in the checkpoint"):
        headless.train(resume_from_checkpoint=str(tmp_path / "first" / "checkpoint-2"))


def test_all_files_are_readable_text_or_safetensors(saved):
    folder = Path(saved.args.output_dir)
    own = {"catalog.json", "recommender_config.json", "flow_heads.safetensors", "model.safetensors", "README.md"}
    assert own <= {path.name for path in folder.iterdir()}
    assert json.loads((folder / "recommender_config.json").read_text())["max_history_items"] == 2
    assert make_catalog().items == json.loads((folder / "catalog.json").read_text())["items"]
