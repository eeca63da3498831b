"""What users of TRL's trainers expect of a constructor and its attributes."""

import inspect
import pickle
import random
import re
from fnmatch import fnmatch
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import torch
import trl
from accelerate.utils import compare_versions
from datasets import Dataset, DatasetDict, IterableDataset
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig, LlamaForSequenceClassification
from trl import SyncRefModelCallback

from gflowtrl import GFlowNetConfig, GFlowNetTrainer, Recommender
from gflowtrl.compat import TRLConfig
from gflowtrl.rewards import GroundTruthReward, RewardModel
from gflowtrl.rewards import reward_model as reward_module
from gflowtrl.trainer.row_sources import RowStream
from tests.tiny import tiny_model
from tests.trainer.world import ITEMS, TOKENIZER, losses, make_catalog, make_rows, make_trainer, weights


def polars_like(rows: Dataset):
    """Another table with Arrow's interface, as DataFrames of polars have it."""

    class Table:
        def __arrow_c_stream__(self, requested_schema=None):
            return pa.table(rows.to_dict()).__arrow_c_stream__(requested_schema)

    return Table()


# ---------------------------------------------------------------------------------------------------------------- rows
KINDS = {
    "list": Dataset.to_list,
    "pandas": lambda rows: pd.DataFrame(rows.to_list(), index=[f"r{i}" for i in range(len(rows))]),
    "arrow": polars_like,
}


@pytest.mark.parametrize("kind", KINDS)
def test_other_rows_train_the_same_model(tmp_path, kind):
    convert = KINDS[kind]
    trained = []
    for change in (lambda rows: rows, convert):
        trainer = make_trainer(
            tmp_path, GroundTruthReward(), train_dataset=change(make_rows()), eval_dataset=change(make_rows(seed=1))
        )
        trainer.train()
        assert trainer.evaluate()["eval_recall@5"] == trainer.evaluate(change(make_rows(seed=1)))["eval_recall@5"]
        trained.append((losses(trainer), trainer.evaluate()["eval_ndcg@10"]))
    assert trained[0] == trained[1]


def test_streams_keep_their_order_and_resume(tmp_path):
    """The stream equals a dataset that is read in its order, also after an interruption."""
    rows, options = make_rows(40), {"save_strategy": "steps", "save_steps": 2, "num_train_epochs": 1}
    whole = make_trainer(
        tmp_path / "a", GroundTruthReward(), train_dataset=rows, train_sampling_strategy="sequential", **options
    )
    whole.shares_prompts = False
    whole.train()
    streamed = make_trainer(
        tmp_path / "b", GroundTruthReward(), train_dataset=rows.to_iterable_dataset(num_shards=2), **options
    )
    streamed.train()
    np.testing.assert_allclose(losses(streamed), losses(whole), rtol=1e-5)
    resumed = make_trainer(tmp_path / "b", GroundTruthReward(), train_dataset=rows.to_iterable_dataset(), **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "b" / "checkpoint-2"))
    np.testing.assert_allclose(losses(resumed), losses(whole), rtol=1e-5)


def test_a_stream_begins_again_and_resumes_there(tmp_path):
    """The second pass, which has begun in the middle of a batch, is skipped up to the same row."""
    stream = make_rows(20).to_iterable_dataset(num_shards=3).shuffle(seed=1, buffer_size=4)
    options = {"save_strategy": "steps", "save_steps": 4, "max_steps": 6, "train_sampling_strategy": "group_by_length"}
    whole = make_trainer(tmp_path, GroundTruthReward(), train_dataset=stream, **options)
    whole.train()
    assert whole.args.train_sampling_strategy == "group_by_length"  # the user's, for another trainer
    resumed = make_trainer(tmp_path, GroundTruthReward(), train_dataset=stream, **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    np.testing.assert_allclose(losses(resumed), losses(whole), rtol=1e-5)


def test_a_stream_with_numbers_of_numpy(tmp_path):
    def rows():
        for row in make_rows():
            yield row | {"row_id": np.int64(row["row_id"]), "history": np.array(row["history"])}

    stream = IterableDataset.from_generator(rows)
    make_trainer(tmp_path, GroundTruthReward(), train_dataset=stream).train()
    pickle.loads(pickle.dumps(RowStream(make_rows().to_iterable_dataset(), make_catalog())))


def test_rows_that_lack_a_column_do_not_take_it_from_others(tmp_path):
    rows, seen = make_rows().to_list(), []

    def cheap(completions, price, **columns):
        seen.extend(price)
        return [1.0] * len(completions)

    rows[1]["price"] = 3.0
    make_trainer(tmp_path, cheap, train_dataset=rows).train()
    assert {*seen} == {None, 3.0}


@pytest.mark.parametrize("rows", [[], IterableDataset.from_generator(lambda: iter(()))])
def test_no_rows_are_an_error(tmp_path, rows):
    with pytest.raises(ValueError, match="The dataset has no rows"):
        make_trainer(tmp_path, GroundTruthReward(), train_dataset=rows)


def test_a_stream_is_checked_as_it_is_read(tmp_path):
    rows = make_rows(40).to_list()
    rows[20]["target"] = "unknown"
    trainer = make_trainer(tmp_path, GroundTruthReward(), train_dataset=Dataset.from_list(rows).to_iterable_dataset())
    with pytest.raises(ValueError, match="Row 120 contains item 'unknown'"):
        trainer.train()


def test_streams_for_evaluation_and_several_datasets(tmp_path):
    rows = make_rows(seed=1)
    parts = DatasetDict({"first": rows, "second": rows})
    trainer = make_trainer(tmp_path, GroundTruthReward(), eval_dataset=parts)
    metrics = trainer.evaluate()
    assert metrics["eval_first_ndcg@5"] == metrics["eval_second_ndcg@5"]
    assert trainer.evaluate(rows.to_iterable_dataset())["eval_ndcg@5"] == metrics["eval_first_ndcg@5"]


def test_history_of_a_stream_is_not_counted(tmp_path, caplog):
    stream = make_rows().to_iterable_dataset()
    trainer = make_trainer(tmp_path, GroundTruthReward(), train_dataset=stream, exclude_history="auto")
    assert not trainer.rewards.exclude_history and "streamed rows cannot be counted" in caplog.text


# ------------------------------------------------------------------------------------------------------------- metrics
def test_compute_metrics_gets_the_ranked_items(tmp_path):
    rows, seen = make_rows(30, seed=1), {}

    def share_of_hits(prediction):
        seen.update(lists=prediction.predictions, targets=prediction.label_ids)
        hits = [
            target in items[:5] for items, target in zip(prediction.predictions, prediction.label_ids, strict=True)
        ]
        return {"hits": sum(hits) / len(hits), "lists": float(len(hits))}

    trainer = make_trainer(
        tmp_path, GroundTruthReward(), eval_dataset=rows, compute_metrics=share_of_hits, eval_num_beams=23,
        metric_for_best_model="hits", load_best_model_at_end=True, eval_strategy="steps", save_strategy="steps",
        save_steps=2, eval_steps=2,
    )  # fmt: skip
    metrics = trainer.evaluate()
    assert sorted(seen["targets"]) == sorted(rows["target"])
    assert all(sorted(items) == sorted(ITEMS) for items in seen["lists"])
    assert metrics["eval_hits"] == pytest.approx(metrics["eval_recall@5"], abs=2 / 30)  # twins share a position
    trainer.train()
    assert trainer.state.best_metric == max(
        log["eval_hits"] for log in trainer.state.log_history if "eval_hits" in log
    )


def test_compute_metrics_must_not_replace_a_metric(tmp_path):
    options = {"eval_dataset": make_rows(), "compute_metrics": lambda prediction: {"ndcg@5": 1.0}}
    trainer = make_trainer(tmp_path, GroundTruthReward(), **options)
    with pytest.raises(ValueError, match="compute_metrics returns ndcg@5, which exist"):
        trainer.evaluate()


# -------------------------------------------------------------------------------------------------------------- models
def test_a_loaded_model_finds_its_folder(tmp_path):
    first = make_trainer(
        tmp_path, GroundTruthReward(), item_titles={ITEMS[0]: "One"}, max_history_items=3, train_dataset=make_rows()
    )
    first.save_model(str(tmp_path / "saved"))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    second = GFlowNetTrainer(model, GroundTruthReward(), first.args, make_rows())
    assert second.processing_class.get_vocab() == TOKENIZER.get_vocab()
    second.save_model(str(tmp_path / "again"))
    again = Recommender.from_pretrained(tmp_path / "again")
    assert again.catalog.items == ITEMS and again.titles == {ITEMS[0]: "One"} and again.max_history_items == 3
    with pytest.raises(ValueError, match="processing_class and catalog are needed"):
        GFlowNetTrainer(tiny_model(len(TOKENIZER)), GroundTruthReward(), first.args, make_rows())


def test_quantization_config(tmp_path, monkeypatch):
    make_trainer(tmp_path, GroundTruthReward()).save_model(str(tmp_path / "saved"))
    config, got = BitsAndBytesConfig(load_in_8bit=True), {}

    def load(name, **kwargs):
        got.update(kwargs)
        return tiny_model(len(TOKENIZER))

    monkeypatch.setattr("gflowtrl.trainer.folder.load_backbone", load)
    make_trainer(tmp_path, GroundTruthReward(), model=str(tmp_path / "saved"), quantization_config=config)
    assert got == {"quantization_config": config}
    twice = {"quantization_config": config, "model_init_kwargs": {"quantization_config": config}}
    with pytest.raises(ValueError, match="quantization_config is given twice"):
        make_trainer(tmp_path, GroundTruthReward(), model=str(tmp_path / "saved"), **twice)
    with pytest.raises(ValueError, match="quantization_config was given, but the model is already loaded"):
        make_trainer(tmp_path, GroundTruthReward(), quantization_config=config)


def test_optimizer_class(tmp_path):
    options = {"optimizer_cls_and_kwargs": (torch.optim.SGD, {"lr": 0.5, "momentum": 0.3})}
    trainer = make_trainer(tmp_path, GroundTruthReward(), loss_type="trajectory_balance", **options)
    trainer.train()
    assert isinstance(trainer.optimizer.optimizer, torch.optim.SGD)
    groups = trainer.optimizer.param_groups
    assert {group["momentum"] for group in groups} == {0.3}
    assert {group["initial_lr"] for group in groups} == {0.5, 1e-2}  # the flow head's own
    model = tiny_model(len(TOKENIZER))
    options["optimizers"] = torch.optim.SGD(model.parameters(), lr=1.0), None
    with pytest.raises(RuntimeError, match="optimizer_cls_and_kwargs"):
        make_trainer(tmp_path, GroundTruthReward(), model=model, **options)


def test_model_card_with_names(tmp_path):
    trainer = make_trainer(tmp_path, GroundTruthReward())
    trainer.create_model_card(model_name="Shop", dataset_name="me/shop", tags=["shop", "trl"])
    card = (tmp_path / "README.md").read_text()
    assert "model_name: Shop" in card and "- shop" in card and card.count("- trl") == 1 and "- me/shop" in card
    trainer.create_model_card(tags="one")
    assert "- one" in (tmp_path / "README.md").read_text()


# ------------------------------------------------------------------------------------------------- rewards, references
def reward_model(seed=0, num_labels=1):
    torch.manual_seed(seed)
    special = {f"{kind}_token_id": getattr(TOKENIZER, f"{kind}_token_id") for kind in ("pad", "bos", "eos")}
    size = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = LlamaConfig(vocab_size=len(TOKENIZER), num_labels=num_labels, **size, **special)
    return LlamaForSequenceClassification(config)


EXP = {"reward_transform": "exp", "reward_beta": 1.0}


@pytest.mark.parametrize("way", ["module", "folder", "folder in a list"])
def test_a_classifier_is_a_reward(tmp_path, way):
    model = reward_model()
    model.save_pretrained(tmp_path / "judge")
    TOKENIZER.save_pretrained(tmp_path / "judge")
    given = {"module": model, "folder": str(tmp_path / "judge"), "folder in a list": [str(tmp_path / "judge")]}[way]
    tokenizers = {"reward_processing_classes": TOKENIZER} if way == "module" else {}
    trainer = make_trainer(tmp_path, given, **tokenizers, **EXP)
    (reward,) = trainer.reward_funcs
    assert isinstance(reward, RewardModel) and trainer.rewards.names == [
        "reward_model" if way == "module" else "judge"
    ]
    before = weights(trainer)
    trainer.train()
    assert any(not torch.equal(value, before[name]) for name, value in weights(trainer).items())
    assert not any(parameter.requires_grad for parameter in reward.model.parameters())


def test_a_classifier_reads_prompt_and_completion(tmp_path):
    """Padding and the rest of the batch change nothing, and the text is that of the tokens."""
    model, chance = reward_model(), random.Random(0)
    reward = RewardModel(model, TOKENIZER)
    words = [token for token in TOKENIZER.get_vocab() if token.startswith("<")]
    prompts = [" ".join(chance.choices(words, k=chance.randint(0, 6))) for _ in range(8)]
    completions = [" ".join(chance.choices(words, k=chance.randint(1, 3))) for _ in range(8)]
    together = reward(prompts=prompts, completions=completions, unknown=None)
    for prompt, completion, score in zip(prompts, completions, together, strict=True):
        ids = TOKENIZER(f"{prompt} {completion}", add_special_tokens=False, return_tensors="pt")["input_ids"]
        assert score == pytest.approx(model(ids).logits.item(), abs=1e-5)


def adapted_reward_model():
    model = reward_model()
    model.config.pad_token_id = None  # set by RewardModel, inside the adapters too
    return get_peft_model(model, LoraConfig(task_type="SEQ_CLS", init_lora_weights=False, target_modules=["q_proj"]))


@pytest.mark.parametrize("kind", ["adapters", "compiled", "compiled adapters"])
def test_a_wrapped_classifier_is_a_reward(tmp_path, kind):
    """Its score is that of the wrapped model: the adapters count."""
    model = reward_model() if kind == "compiled" else adapted_reward_model()
    given = torch.compile(model, backend="eager") if "compiled" in kind else model
    (reward,) = make_trainer(tmp_path, given, reward_processing_classes=TOKENIZER, **EXP).reward_funcs
    assert isinstance(reward, RewardModel)
    assert not any(parameter.requires_grad for parameter in model.parameters())
    scores = reward(prompts=["<a_1>", "<a_1> <b_2>"], completions=["<c_0>", "<c_1>"])
    for text, score in zip(["<a_1> <c_0>", "<a_1> <b_2> <c_1>"], scores, strict=True):
        ids = TOKENIZER(text, add_special_tokens=False, return_tensors="pt")["input_ids"]
        assert score == pytest.approx(model(input_ids=ids).logits.item(), abs=1e-5)


def test_arguments_for_loading_are_refused_before_a_classifier_is_loaded(tmp_path):
    """The policy is loaded already, so `model_init_kwargs` cannot be for it, and the folder need not exist."""
    with pytest.raises(ValueError, match="model_init_kwargs was given, but the model is already loaded"):
        make_trainer(tmp_path, "missing/folder/of/judge", model_init_kwargs={"dtype": "float32"})


def test_the_tokenizer_of_a_classifier_is_looked_for_where_the_classifier_is(tmp_path, monkeypatch):
    reward_model().save_pretrained(tmp_path)
    TOKENIZER.save_pretrained(tmp_path)
    found, load = [], reward_module.load_tokenizer
    monkeypatch.setattr(reward_module, "load_tokenizer", lambda name, **where: (found.append(where), load(name))[1])
    reward_module.resolve_rewards(str(tmp_path), None, {"revision": "v2", "dtype": "float32", "subfolder": ""})
    assert found == [{"revision": "v2"}]


@pytest.mark.parametrize(
    ("rewards", "options", "message"),
    [
        (reward_model(), {}, "needs its tokenizer; give reward_processing_classes"),
        (reward_model(num_labels=3), {"reward_processing_classes": TOKENIZER}, "3 labels, but a reward is one number"),
        (GroundTruthReward(), {"reward_processing_classes": TOKENIZER}, "is not a classifier"),
        (
            [GroundTruthReward()],
            {"reward_processing_classes": [None, TOKENIZER]},
            "2 entries, but there are 1 rewards",
        ),
        ("missing/folder/of/judge", {}, "missing/folder/of/judge"),
    ],
)
def test_wrong_reward_models(tmp_path, rewards, options, message):
    with pytest.raises((ValueError, OSError), match=message):
        make_trainer(tmp_path, rewards, **options)


def test_attributes_of_rewards_and_reference(tmp_path):
    truth, reference = GroundTruthReward(), tiny_model(len(TOKENIZER), seed=3)
    trainer = make_trainer(tmp_path, truth, ref_model=reference, ref_weight=1.0)
    assert trainer.reward_funcs == [truth] and trainer.ref_model is reference
    assert make_trainer(tmp_path, truth).ref_model is None
    adapted = make_trainer(tmp_path, truth, ref_weight=1.0, peft_config=LoraConfig(r=2))
    assert adapted.ref_model is None  # the model without its adapters


@pytest.mark.parametrize("by", ["configuration", "callback"])
def test_a_moving_reference(tmp_path, by):
    """The callback of TRL: after each two steps, a quarter of the policy and three quarters of the reference."""
    options = {
        "ref_weight": 1.0, "ref_model_sync_steps": 2, "ref_model_mixup_alpha": 0.25, "max_steps": 4,
        "save_strategy": "steps", "save_steps": 3, "sync_ref_model": by == "configuration",
    }  # fmt: skip

    def make():
        trainer = make_trainer(tmp_path, GroundTruthReward(), **options)
        if by == "callback":
            trainer.add_callback(SyncRefModelCallback(trainer.ref_model, trainer.accelerator))
        return trainer

    trainer = make()
    policy, expected = [], {name: value.clone() for name, value in trainer.ref_model.named_parameters()}
    end = trainer.callback_handler.on_step_end
    trainer.callback_handler.on_step_end = lambda *args: (policy.append(weights(trainer)), end(*args))[1]
    trainer.train()
    for step in (2, 4):
        expected = {name: 0.75 * value + 0.25 * policy[step - 1][name] for name, value in expected.items()}
    for name, value in trainer.ref_model.named_parameters():
        torch.testing.assert_close(value, expected[name])
    resumed = make()
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    for name, value in resumed.ref_model.named_parameters():
        torch.testing.assert_close(value, expected[name])
    (tmp_path / "checkpoint-3" / "reference.safetensors").unlink()
    with pytest.raises(ValueError, match=r"lacks reference\.safetensors"):
        make().train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "there is no reference model"),
        ({"ref_weight": 1.0, "peft_config": LoraConfig(r=2)}, "the model without its adapters"),
        ({"ref_weight": 1.0, "loss_type": "trajectory_balance"}, "flow heads"),
        ({"ref_weight": 1.0, "ref_model": tiny_model(len(TOKENIZER) + 1)}, "parameters of other shapes"),
        ({"ref_weight": 1.0, "ref_model_mixup_alpha": 1.5}, "ref_model_mixup_alpha is 1.5"),
        ({"ref_weight": 1.0, "ref_model_sync_steps": 0}, "ref_model_sync_steps is 0"),
    ],
)
def test_a_reference_that_cannot_move(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        make_trainer(tmp_path, GroundTruthReward(), sync_ref_model=True, **options)


def test_push_to_hub(tmp_path, monkeypatch):
    make_trainer(tmp_path, GroundTruthReward()).save_model(str(tmp_path / "saved"))
    calls = []

    class Api:
        def __init__(self, token):
            calls.append(token)

        def create_repo(self, repo_id, private, exist_ok):
            calls.append((repo_id, private, exist_ok))
            return type("Url", (), {"repo_id": repo_id})

        def upload_folder(self, folder_path, **options):
            calls.append((Recommender.from_pretrained(folder_path).catalog.items, options["create_pr"]))
            return "address"

    monkeypatch.setattr("gflowtrl.hub.HfApi", Api)
    recommender = Recommender.from_pretrained(tmp_path / "saved")
    assert recommender.push_to_hub("me/shop", private=True, token="t", create_pr=True) == "address"
    assert calls == ["t", ("me/shop", True, True), (ITEMS, True)]


def test_modules_that_are_no_classifiers_are_called(tmp_path):
    class Short(nn.Module):
        def forward(self, completions, **columns):
            return [1.0 / len(text.split()) for text in completions]

    trainer = make_trainer(tmp_path, Short(), catalog=make_catalog())
    trainer.train()
    assert len(losses(trainer)) == 4


# ---------------------------------------------------------------------------------------------- every argument of TRL
TRAINERS = {"SFTTrainer": "SFTConfig", "DPOTrainer": "DPOConfig", "GRPOTrainer": "GRPOConfig"}
PAGE = (Path(__file__).parents[2] / "docs" / "trl.md").read_text()
NAMED = re.findall(r"`([a-z0-9_*]+)`", PAGE)


def arguments_of_trl():
    names = {name for trainer in TRAINERS for name in inspect.signature(getattr(trl, trainer)).parameters}
    return sorted(names - inspect.signature(GFlowNetTrainer).parameters.keys())


@pytest.mark.parametrize("name", arguments_of_trl())
def test_an_argument_of_trl_is_refused_in_words(tmp_path, name):
    with pytest.raises(TypeError, match=f"GFlowNetTrainer has no argument '{name}': ") as error:
        make_trainer(tmp_path, GroundTruthReward(), **{name: None})
    assert "its documentation" not in str(error.value) and name in NAMED


@pytest.mark.skipif(compare_versions("trl", "<", "1.16"), reason="earlier versions have other fields")
@pytest.mark.parametrize("config", TRAINERS.values())
def test_every_field_of_trl_is_on_the_page(config):
    common = TRLConfig.__dataclass_fields__.keys() | GFlowNetConfig.__dataclass_fields__.keys()
    fields = [name for name in getattr(trl, config).__dataclass_fields__ if name not in common]
    missing = [name for name in fields if not any(fnmatch(name, pattern) for pattern in NAMED)]
    assert fields and not missing


def test_an_unknown_argument_is_named(tmp_path):
    with pytest.raises(TypeError, match="GFlowNetTrainer has no argument 'samplr': see the arguments"):
        make_trainer(tmp_path, GroundTruthReward(), samplr="on_policy")
