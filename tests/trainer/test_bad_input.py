"""Invalid input gives an error that names the problem, before training if possible."""

import math
from types import SimpleNamespace

import pandas as pd
import pytest
import torch
from datasets import Dataset, IterableDataset
from transformers import T5Config, T5ForConditionalGeneration, TrainerCallback

from gflowtrl import GFlowNetConfig, GFlowNetTrainer
from gflowtrl.data import PromptEncoder
from gflowtrl.rewards import CollaborativeReward, GroundTruthReward
from tests.tiny import tiny_model

from .world import ITEMS, TOKENIZER, make_catalog, make_rows, make_trainer, teacher


def t5() -> T5ForConditionalGeneration:
    return T5ForConditionalGeneration(T5Config(vocab_size=9, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2))


def rows(**changes) -> Dataset:
    """Three valid rows. A change replaces a column; None removes it."""
    columns = {"row_id": [1, 2, 3], "history": [["i010"], ["short"], ["twin"]], "target": ["i222", "i001", "i002"]}
    return Dataset.from_dict({name: values for name, values in (columns | changes).items() if values is not None})


def stream(values: list) -> IterableDataset:
    """A stream that holds the values as they are."""
    return IterableDataset.from_generator(lambda: iter(values))


GOOD = {"row_id": 1, "history": ["i010"], "target": "i222"}


def no_items(items, **_):
    return [1.0] * len(items)


REWARDS = {"reward_funcs": [GroundTruthReward()]}
CONSTRUCTION = {
    "unknown item in a history": (
        {"train_dataset": rows(history=[["i010"], ["i011"], ["twin"]])}, "Row 2 contains item 'i011'.*not in the cat",
    ),
    "unknown target": ({"train_dataset": rows(target=["i222", "i001", "x"])}, "Row 3 contains item 'x'"),
    "unknown item in the evaluation": (
        {"eval_dataset": {"good": rows(), "bad": rows(target=["i222", "i001", "x"])}}, "Row 3 contains item 'x'",
    ),
    "empty history": ({"train_dataset": rows(history=[["i010"], [], ["twin"]])}, "Row 2 has an empty history"),
    "no rows": ({"train_dataset": make_rows().select([])}, "no rows"),
    "missing column": ({"train_dataset": rows(target=None)}, "no column target"),
    "repeated row id": ({"train_dataset": rows(row_id=[1, 2, 1])}, "Two rows have the row_id 1"),
    "row id of True": ({"train_dataset": rows(row_id=[True, False, True])}, "row_id True is not an integer"),
    "large row id": ({"train_dataset": [{**GOOD, "row_id": 2**70}]}, "train_dataset has a column .* several types"),
    "no history": ({"train_dataset": rows(history=[["i010"], None, ["twin"]])}, "Row 2 has the history None; it must"),
    "history of text": ({"train_dataset": rows(history=["i010", "short", "twin"])}, "Row 1 has the history 'i010'"),
    "nested history": ({"train_dataset": rows(history=[[["i010"]]] * 3)}, r"Row 1 contains item \['i010'\]"),
    "list as a target": ({"train_dataset": rows(target=[["i222"]] * 3)}, r"Row 1 contains item \['i222'\], which is"),
    "rows of several types": ({"train_dataset": [GOOD, {**GOOD, "row_id": "b"}]}, "train_dataset has a column .*ty"),
    "stream of lists": ({"train_dataset": stream([[1, 2]])}, "train_dataset has rows that are not dictionaries"),
    "columns of one name": (
        {"train_dataset": pd.DataFrame([[1, 1]], columns=["row_id", "row_id"])}, "Duplicate column names.*Give each",
    ),
    "rows with a transform": ({"train_dataset": rows().with_transform(lambda batch: batch)}, "apply it with map"),
    "row id of text": ({"train_dataset": rows(row_id=["a", "b", "c"])}, "row_id 'a' is not an integer"),
    "rows of another kind": ({"train_dataset": {"row_id": [1]}}, "train_dataset is of type dict; give"),
    "stream of unknown items": ({"train_dataset": rows(target=["x"] * 3).to_iterable_dataset()}, "contains item 'x'"),
    "stream without steps": ({"train_dataset": rows().to_iterable_dataset(), "max_steps": -1}, "max_steps"),
    "no language model": ({"model": t5().encoder}, "T5Stack has no output layer over tokens"),
    "encoder-decoder with few embeddings": ({"model": t5()}, "embeds only 9 tokens.*add_item_tokens"),
    "few embeddings": ({"model": tiny_model(9)}, "embeds only 9 tokens.*add_item_tokens"),
    "no reward": ({"reward_funcs": None}, r"\['vargrad'\] needs a reward"),
    "no rewards": ({"reward_funcs": []}, "needs a reward"),
    "reward weights": ({"reward_weights": [1, 2]}, "2 reward_weights were given for 1 rewards"),
    "no callable": ({"reward_funcs": [3]}, "reward_funcs contains 3; a reward must be callable"),
    "exact_flow without all rewards": (
        {"loss_type": "exact_flow", "reward_funcs": [GroundTruthReward(), no_items]}, "every leaf, but 'no_items'",
    ),
    "exact_flow with a reference on too large a table": (
        {"loss_type": "exact_flow", "max_exact_elements": 100, "ref_weight": 1.0},
        "8 prompts x 23 leaves = 184.*_elements is 100",
    ),
    "no leaf with a reward of its own": ({"exact_top_items": 0}, "exact_top_items is 0"),
    "no such sampler": ({"sampler": "greedy"}, "Unknown sampler 'greedy'"),
    "sampler without its teacher": ({"sampler": {"collaborative": 1}}, "needs a teacher"),
    "item counts of another catalog": ({"item_counts": torch.ones(3)}, r"shape \(3,\), but.* has 24 items"),
    "arguments for a model that exists": ({"model_init_kwargs": {"dtype": "float32"}}, "the model is already loaded"),
    "no catalog": ({"catalog": None}, "processing_class and catalog are needed"),
    "reference without weight": ({"ref_model": tiny_model(len(TOKENIZER))}, "ref_model was given, but ref_weight is"),
    "reference of another vocabulary": ({"ref_model": tiny_model(9), "ref_weight": 1.0}, "embeds only 9 tokens"),
    "title that is not text": ({"item_titles": {"i010": math.nan}}, "item 'i010' must be text, but it is nan"),
    "title with half a character": ({"item_titles": {"i010": "a\ud83d"}}, "title of item 'i010' holds half a char"),
    "encoder of another length": (
        {"prompt_encoder": PromptEncoder(make_catalog(), TOKENIZER, 6), "max_history_items": 2},
        "max_history_items is 2, but the prompt_encoder was created with 6",
    ),
    "no model but a number": ({"model": 5}, "The model is of type int; it must be a language model"),
    "no language model at all": ({"model": torch.nn.Linear(2, 2)}, "The model is of type Linear; it must"),
    "no reference but a number": ({"ref_model": 5, "ref_weight": 1.0}, "The model is of type int"),
    "catalog that is a dictionary": ({"catalog": {"i010": ["<a_0>"]}}, "catalog is of type dict; it must be an ItemC"),
    "tokenizer by name": ({"processing_class": "gpt2"}, "processing_class is of type str; it must be a tokenizer"),
    "adapters by name": ({"peft_config": "lora"}, "peft_config is of type str; it must be a configuration of PEFT"),
    "counts in a list": ({"item_counts": [1.0] * 24}, "item_counts is of type list; it must be a tensor"),
    "negative count": ({"item_counts": torch.arange(24) - 1}, f"item_counts has -1 for item '{ITEMS[0]}'"),
    "count that is NaN": ({"item_counts": torch.full((24,), math.nan)}, "item_counts has nan for item"),
    "titles in a list": ({"item_titles": ["a lamp"]}, "item_titles is of type list; it must be a dictionary"),
    "encoder that is a function": ({"prompt_encoder": len}, "prompt_encoder is of type builtin_function"),
    "callback that is not one": ({"callbacks": [print]}, "callbacks has <built-in function print>"),
    "one callback": ({"callbacks": TrainerCallback()}, "callbacks is of type TrainerCallback; it must be a list"),
    "one optimizer": ({"optimizers": (None,)}, "optimizers has 1 entries; it must be a pair"),
    "no pair of optimizers": ({"optimizers": None}, "optimizers is of type NoneType; it must be a pair"),
    "metrics that are not a function": ({"compute_metrics": 5}, "compute_metrics is of type int; it must be a func"),
    "no function for a model": ({"model": False, "model_init": "x"}, "model_init is of type str; it must"),
    "weight of no source": (
        {"trajectory_weighting": "source", "source_weights": {"ground_truth": 2, "teacher": 1}},
        "names 'teacher', but the sampler's sources are 'ground_truth', 'on_policy'",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CONSTRUCTION)
def test_errors_before_training(tmp_path, case):
    options, message = CONSTRUCTION[case]
    with pytest.raises((ValueError, TypeError), match=message):
        make_trainer(tmp_path, **(REWARDS | options))


def answers(values):
    """A plain reward that returns the given values in turn."""

    def my_reward(items, **_):
        return (values * len(items))[: len(items)] if isinstance(values, list) else values

    return my_reward


TRAINING = {
    "short list": ({"reward_funcs": lambda items, **_: [1.0]}, "'<lambda>' returned 1 values for 32 completions"),
    "NaN": ({"reward_funcs": answers([1.0, math.nan])}, r"'my_reward' returned nan for row 0 of the batch \(row_id 1"),
    "infinity": ({"reward_funcs": answers([1.0, math.inf])}, "'my_reward' returned inf for row 0"),
    "negative": ({"reward_funcs": answers([1.0, -2.0])}, "'my_reward' returned -2.0 for row 0.*transform='exp'"),
    "no list": ({"reward_funcs": answers(1.0)}, "'my_reward' returned float; it must return a list of 32"),
    "text": ({"reward_funcs": answers(["good"])}, "'my_reward' returned 'good'"),
    "no positive reward": ({"reward_funcs": answers([0.0])}, "The reward of row 0 .* is zero"),
    "wrong shape": (
        {"reward_funcs": SimpleNamespace(__name__="mine", score_items=lambda step: torch.ones(8, 3))},
        r"'mine' returned a tensor of shape \(8, 3\); it must return a tensor of shape \(8, 24\)",
    ),
    "not a leaf": (
        {"sampler": lambda step, policy, reward, k, noise: torch.tensor([[0, 1, 2, 23]] * 8)},
        "returned 23 as trajectory 3 of row 0, which is not a leaf",
    ),
    "no leaf": (
        {"sampler": lambda step, policy, reward, k, noise: torch.tensor([[0, 1, -1, 2]] * 8)},
        "returned -1 as trajectory 2",
    ),
    "too few trajectories": (
        {"sampler": lambda step, policy, reward, k, noise: torch.zeros(8, 3, dtype=torch.long)},
        r"leaves of shape \(8, 3\)",
    ),
    "sampling by unknown rewards": ({"reward_funcs": no_items, "sampler": "reward"}, "RewardSampler needs"),
    "teacher of another catalog": (
        {"reward_funcs": CollaborativeReward(lambda histories: torch.ones(len(histories), 5))},
        r"returned shape \(8, 5\); it must return .*\(8, 24\)",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", TRAINING)
def test_errors_in_the_first_step(tmp_path, case):
    options, message = TRAINING[case]
    trainer = make_trainer(tmp_path, **(REWARDS | options))
    with pytest.raises((ValueError, TypeError), match=message):
        trainer.train()
    assert trainer.state.global_step == 0


CONFIGURATION = [
    ({"num_generations": 0}, "num_generations is 0; it must be a whole number of at least 1"),
    ({"num_generations": 1}, "num_generations is 1.*'vargrad' needs at least 2"),
    ({"num_generations": 0, "loss_type": "sft"}, "num_generations is 0.*at least 1"),
    ({"loss_type": "sft,vargrad", "loss_weights": [1.0]}, "loss_weights has 1 entries, but loss_type has 2"),
    ({"loss_type": []}, "loss_type is empty"),
    ({"loss_type": "ppo"}, "no loss 'ppo'; the known losses are"),
    ({"loss_type": "sft,vargrad,sft"}, "names a loss twice; name it once, with the total weight"),
    ({"loss_reduction": "max"}, "loss_reduction is 'max'; choose 'mean' or 'sum'"),
    ({"reward_transform": "log"}, "reward_transform is 'log'"),
    ({"leaf_reduction": "mean"}, "leaf_reduction is 'mean'"),
    ({"temperature": 0.0}, "temperature is 0.0; it must be a finite number above 0"),
    ({"reward_beta": -1.0}, "reward_beta is -1.0"),
    ({"log_z_learning_rate": math.nan}, "log_z_learning_rate is nan"),
    ({"epsilon": 1.5}, "epsilon is 1.5"),
    ({"reward_floor": 1.0}, "reward_floor is 1.0"),
    ({"eval_ks": []}, "eval_ks"),
    ({"eval_num_beams": 10}, "eval_num_beams is 10, but eval_ks needs lists of 20"),
    ({"max_history_items": 0}, "max_history_items is 0"),
    ({"remove_unused_columns": True}, "remove_unused_columns"),
    ({"batch_eval_metrics": True}, "batch_eval_metrics is True"),
    ({"eval_do_concat_batches": False}, "eval_do_concat_batches is False"),
    ({"include_for_metrics": ["loss", "inputs"]}, "include_for_metrics contains 'inputs'"),
    ({"label_smoothing_factor": 0.1}, "label_smoothing_factor is 0.1, but labels are smoothed by loss_kwargs"),
    ({"loss_weights": [math.nan]}, r"loss_weights.0 is nan; it must be a finite"),
    ({"loss_weights": [math.inf]}, "loss_weights.0 is inf; it must be a finite"),
    ({"loss_weights": [0.0]}, "loss_weights is .*must not be 0"),
    ({"ref_weight": -1.0}, "ref_weight is -1.0"),
    ({"ref_weight": math.nan}, "ref_weight is nan"),
    ({"ref_weight": 1.0, "loss_type": "sft"}, "ref_weight is 1.0, but no loss of .'sft'. balances rewards"),
    ({"ref_weight": 1.0, "loss_type": "grpo"}, "ref_weight is 1.0, but no loss of .'grpo'. balances rewards"),
    ({"label_space": "vocabulary"}, "the losses .'vargrad'. always use the tree"),
    ({"trajectory_weighting": "reward", "loss_type": "sft"}, "trajectory_weighting is 'reward', but no loss"),
    ({"trajectory_weighting": "reward", "loss_type": "ipa"}, "trajectory_weighting is 'reward', but no loss"),
    ({"trajectory_weighting": "length"}, "trajectory_weighting is 'length'; choose"),
    ({"trajectory_weighting": "source"}, "is 'source' and source_weights is None"),
    ({"trajectory_weighting": "reward", "source_weights": {"a": 1.0}}, "is 'reward' and source_weights"),
    ({"trajectory_weighting": "source", "source_weights": {"a": 0}}, "The weight of source 'a' is 0"),
    ({"trajectory_weighting": "source", "source_weights": {"a": "high"}}, "The weight of source 'a' is 'high'"),
]


@pytest.mark.parametrize(("options", "message"), CONFIGURATION)
def test_a_bad_configuration_is_an_error(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        GFlowNetConfig(str(tmp_path), use_cpu=True, **options)


def test_a_folder_may_be_a_path(tmp_path):
    make_trainer(tmp_path, **REWARDS).save_model(str(tmp_path / "model"))
    assert make_trainer(tmp_path, **REWARDS, model=tmp_path / "model").processing_class is not None


def test_a_folder_without_a_catalog_is_an_error(tmp_path):
    tiny_model(len(TOKENIZER)).save_pretrained(tmp_path)
    TOKENIZER.save_pretrained(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"catalog\.json is missing"):
        GFlowNetTrainer(str(tmp_path), GroundTruthReward(), GFlowNetConfig(str(tmp_path / "out"), use_cpu=True))


def test_evaluate_without_rows_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="no evaluation rows"):
        make_trainer(tmp_path, **REWARDS).evaluate()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (rows(target=["i222", "i001", "x"]), "Row 3 contains item 'x'"),
        (rows(history=[["i010"], None, ["twin"]]), "Row 2 has the history None"),
        (rows(row_id=["a", "b", "c"]), "row_id 'a' is not an integer"),
        (rows(history=None), "no column history"),
        (rows().select([]), "has no rows"),
        ([GOOD, {"row_id": 2}], "Row 2 has the history None"),
    ],
)
def test_rows_of_evaluate_and_predict_are_checked(tmp_path, given, message):
    trainer = make_trainer(tmp_path, **REWARDS)
    for method in (trainer.evaluate, trainer.predict):
        with pytest.raises((ValueError, TypeError), match=message):
            method(given)


def test_names_of_evaluation_rows_and_rows_of_predict(tmp_path):
    trainer = make_trainer(tmp_path, **REWARDS, eval_dataset={"good": rows()})
    with pytest.raises(ValueError, match=r"'bad', which is not one of the trainer's, \['good'\]"):
        trainer.evaluate("bad")
    with pytest.raises(TypeError, match="predict takes one dataset of rows, not a NoneType"):
        trainer.predict(None)
    wanted = trainer.predict(rows(history=[["i010"], ["short", "i010"], ["twin"]])).label_ids.tolist()
    assert wanted == [ITEMS.index(item) for item in ("i222", "i001", "i002")]  # in the order of the rows


def test_later_rows_of_a_stream_are_checked(tmp_path):
    trainer = make_trainer(tmp_path, **REWARDS, train_dataset=stream([GOOD, {"row_id": 2}]))
    with pytest.raises(TypeError, match="Row 2 has the history None"):
        trainer.train()


def test_the_format_of_a_dataset_does_not_matter(tmp_path):
    plain, torch_rows = rows(), rows().with_format("torch", columns=["row_id"])
    found = [make_trainer(tmp_path, **REWARDS, train_dataset=each).evaluate(each) for each in (plain, torch_rows)]
    assert found[0]["eval_ndcg@5"] == found[1]["eval_ndcg@5"]


def test_valid_input_works(tmp_path):
    """The changes above cause the errors, not another part of these trainers."""
    make_trainer(tmp_path, **REWARDS, train_dataset=rows(), eval_dataset={"good": rows()})
    huber = {"vargrad": {"huber_delta": 1.0}}
    make_trainer(tmp_path, **REWARDS, loss_kwargs=huber, loss_type="sft,vargrad", loss_weights=[1.0, 0.0])
    trainer = make_trainer(tmp_path, **REWARDS, eval_dataset=rows(), include_for_metrics=["loss"])
    assert "eval_recall@5" in trainer.evaluate()
    make_trainer(tmp_path, CollaborativeReward(teacher), sampler="reward", catalog=make_catalog()).train()
    assert len(rows()) == 3 and "i011" not in ITEMS
