"""What a recipe gets wrong is said before the teacher is fitted, by the name of the option."""

import re
import shlex
import sys

import pytest
import yaml

from gflowtrl.cli.train import main
from gflowtrl.teachers import SASRec
from tests.tiny import tiny_model

from .micro import micro_settings


#: option and value -> what the message says
CASES = [
    ("--seed -1", "seed is -1; it must be a whole number from 0 to 4294967295"),
    ("--seed 4294967296", "seed is 4294967296"),
    ("--gflownet.data_seed -1", "gflownet.data_seed is -1"),
    ("--sft.learning_rate -1", "sft.learning_rate is -1; it must be a finite number of at least 0"),
    ("--gflownet.learning_rate -1e-3", "gflownet.learning_rate is -0.001"),
    ("--control.learning_rate -1", "control.learning_rate is -1"),
    ("--gflownet.log_z_learning_rate 0", "gflownet.log_z_learning_rate is 0"),
    ("--sft.per_device_train_batch_size 0", "sft.per_device_train_batch_size is 0"),
    ("--gflownet.per_device_train_batch_size -8", "gflownet.per_device_train_batch_size is -8"),
    ("--gflownet.per_device_eval_batch_size 0", "gflownet.per_device_eval_batch_size is 0"),
    ("--sft.gradient_accumulation_steps 0", "sft.gradient_accumulation_steps is 0"),
    ("--gflownet.gradient_accumulation_steps -1", "gflownet.gradient_accumulation_steps is -1"),
    ("--sft.num_train_epochs 0", "sft.num_train_epochs is 0"),
    ("--gflownet.num_train_epochs -2", "gflownet.num_train_epochs is -2"),
    ("--sft.weight_decay -0.1", "sft.weight_decay is -0.1"),
    ("--sft.adam_beta1 1.0", "sft.adam_beta1 is 1.0"),
    ("--sft.warmup_steps -1", "sft: Got warmup_steps = -1"),
    ("--sft.dataloader_num_workers -1", "sft.dataloader_num_workers is -1"),
    ("--sft.optim adam", "sft.optim is 'adam'; choose 'adamw_torch' or"),
    ("--sft.optim galore_adamw", "sft.optim 'galore_adamw' and its options cannot be used"),
    ("--gflownet.eval_strategy epochs", "gflownet.eval_strategy is 'epochs'; choose 'no' or 'steps' or 'epoch'"),
    ("--sft.early_stopping_patience 0", "sft.early_stopping_patience is 0; it must be a whole number of at least 1"),
    (
        "--early_stopping_patience 2 --eval_strategy steps --save_strategy steps --eval_steps 5 --save_steps 5",
        "gflownet.early_stopping_patience counts epochs, but eval_strategy is 'steps'",
    ),
    ("--sft.eval_delay 3", "sft.eval_delay is 3, but the training takes 2 epochs, so it would never be evaluated"),
    ("--control.eval_delay 2.5", "control.eval_delay is 2.5, but the training takes 2 epochs"),
    ("--gflownet.eval_delay 30 --gflownet.max_steps 20", "gflownet.eval_delay is 30, but the training takes"),
    ("--sft.lr_scheduler_type cosin", "sft.lr_scheduler_type is 'cosin'; choose 'linear' or"),
    ("--gflownet.lr_scheduler_type cosine_with_min_lr", "gflownet.lr_scheduler_type 'cosine_with_min_lr' cannot be"),
    ("--control.lr_scheduler_kwargs {a: 1}", "control.lr_scheduler_type 'linear' cannot be used with"),
    (
        "--sft.metric_for_best_model eval_ngcd@5",
        "sft.metric_for_best_model is 'eval_ngcd@5', which evaluate() does not report",
    ),
    ("--gflownet.metric_for_best_model eval_ndcg@10", "gflownet.metric_for_best_model is 'eval_ndcg@10', which"),
    ("--model.hidden_size 18 --model.num_attention_heads 4", "model.hidden_size is 18, not a multiple of"),
    ("--model {model_type: gpt2, n_embd: 18, n_head: 4}", "model.n_embd is 18, not a multiple of model.n_head"),
    ("--model.hidden_size 6", "The section model (model_type llama) makes a model that cannot be used"),
    ("--model.num_key_value_heads 3", "model.num_key_value_heads is 3, which does not divide"),
    ("--model.num_hidden_layers 0", "model.num_hidden_layers is 0"),
    ("--model.hidden_size -16", "model.hidden_size is -16"),
    ("--model.hidden_act none", "The section model (model_type llama) makes a model that cannot be used: KeyError"),
    ("--model.attention_dropout 1.0", "model.attention_dropout is 1.0; it must be a number in [0, 1)"),
    ("--model.attention_dropout -0.1", "model.attention_dropout is -0.1"),
    ("--model.max_position_embeddings 8", "A prompt of 6 items takes up to"),
    ("--model {model_type: mamba}", "cannot score several items after one prompt"),
    ("--peft {target_modules: [q_prj]}", "The section peft does not fit the model"),
    ("--peft {r: 0, target_modules: [q_proj]}", "peft.r is 0"),
    ("--peft {lora_dropout: 1.5, target_modules: [q_proj]}", "peft.lora_dropout is 1.5"),
    ("--teacher.regularization 0", "teacher.regularization is 0; it must be a finite number above 0"),
    ("--teacher {type: sasrec, dropout: 1.0}", "teacher.dropout is 1.0"),
    ("--teacher {type: sasrec, epochs: 0}", "teacher.epochs is 0"),
    ("--teacher {type: sasrec, batch_size: 0}", "teacher.batch_size is 0"),
    ("--teacher {type: sasrec, learning_rate: -1}", "teacher.learning_rate is -1"),
    ("--teacher {type: sasrec, seed: -1}", "teacher.seed is -1"),
    (
        "--teacher {type: sasrec, heads: 3}",
        "teacher.width is 64; it must be divisible by the number of heads, which is 3",
    ),
    ("--teacher {type: mixture, parts: [{type: ease, weight: 0}]}", "teacher.parts.0.weight is 0"),
    ("--teacher {type: ease, folds: 1}", "teacher.folds is 1"),
    ("--teacher {type: mixture, folds: 3, parts: [{type: ease}]}", "teacher.folds is set, but its parts are fitted"),
    ("--teacher {type: mixture, normalization: max, parts: [{type: ease}]}", "teacher.normalization is 'max'"),
    ("--rewards.1.teacher {type: sasrec, layers: 0}", "rewards.1.teacher.layers is 0"),
    ("--rewards.0.weight 0 --rewards.1.weight 0", "the weights must be finite and not all zero"),
    ("--rewards.0.weight -1", "reward_weights is [-1.0, 0.7]; with reward_transform='power' the weights must be >= 0"),
    ("--gflownet.epsilon 2", "gflownet.epsilon is 2"),
    ("--gflownet.max_exact_elements 0", "gflownet.max_exact_elements is 0"),
    ("--data.max_history_items 0", "data.max_history_items is 0"),
    ("--data.k_core -1", "data.k_core is -1"),
    ("--data.semantic_ids.quantizer kmean", "data.semantic_ids.quantizer is 'kmean'; choose 'kmeans' or 'balanced'"),
    ("--data.semantic_ids.levels 0", "data.semantic_ids.levels is 0; it must be a whole number from 1 to 25"),
    ("--data.semantic_ids.levels 2.5", "data.semantic_ids.levels must be a whole number"),
    (
        "--data.semantic_ids.collaborative 1.5",
        "data.semantic_ids.collaborative is 1.5; it must be a number from 0 to 1",
    ),
    ("--data.semantic_ids {collisions: drop}", "data.semantic_ids.collisions is 'drop'; choose 'reassign' or"),
    (
        "--data.semantic_ids kmeans",
        "data.semantic_ids must be null or fields with values, such as {quantizer: kmeans}",
    ),
    ("--data.augmentation {copies: 0}", "data.augmentation.copies is 0; it must be a whole number of at least 1"),
    ("--data.augmentation {drop: 0, shift: 0}", "data.augmentation.drop and shift are both 0"),
    ("--data.augmentation 3", "data.augmentation must be null or fields with values, such as {copies: 3}"),
    ("--data.semantic_ids {vectors: absent.npy}", "There is no file of item vectors at absent.npy"),
    ("--data.semantic_ids {features: [shape]}", "no item has any of the features shape"),
    (
        "--data.semantic_ids {levels: 2, codes: 4}",
        "data.semantic_ids: 30 items cannot have unique ids with 2 levels of",
    ),
    ("--data.semantic_ids {codes: 64}", "30 vectors cannot be grouped into 64 codes"),
    ("--data.shop.n_users 0", "Raise n_users"),
    ("--control.num_generations 4", "control.num_generations cannot be set"),
    ("--control.ref_weight 0.5", "control.ref_weight cannot be set"),
    ("--sft.truncation_mode keep_end", "sft.truncation_mode cannot be set: it follows from the rows"),
    ("--sft.resume_from_checkpoint x", "sft.resume_from_checkpoint cannot be set"),
    ("--gflownet.do_train true", "gflownet.do_train cannot be set"),
]


@pytest.mark.parametrize(("options", "message"), CASES, ids=[options for options, _ in CASES])
def test_it_ends_with_a_line_and_code_2_before_the_teacher(tmp_path, capsys, monkeypatch, options, message):
    monkeypatch.setattr(
        sys.modules["gflowtrl.pipeline.run"], "fit_teacher", lambda *_: pytest.fail("the teacher is fitted")
    )
    file = tmp_path / "micro.yaml"
    file.write_text(yaml.safe_dump(micro_settings(tmp_path / "out")))
    assert main(["--config", str(file), *shlex.split(re.sub(r"({.*})", r"'\1'", options))]) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and message in lines[0], lines


def test_a_model_that_is_loaded_is_looked_at_too(tmp_path, capsys):
    settings = micro_settings(tmp_path / "out")
    tokenizer_and_model(tmp_path / "model")
    file = tmp_path / "micro.yaml"
    file.write_text(yaml.safe_dump(settings | {"model": {"model_name_or_path": str(tmp_path / "model")}}))
    for options, message in (
        (["--model.atention_dropout", "0.1"], "Did you mean 'model.attention_dropout'"),
        (["--data.max_history_items", "200"], "A prompt of 200 items takes up to"),
        (["--peft", "{target_modules: [q_prj]}"], "The section peft does not fit the model"),
    ):
        assert main(["--config", str(file), *options]) == 2
        assert message in capsys.readouterr().err
    assert not list((tmp_path / "out").glob("teacher-*"))


def tokenizer_and_model(folder):
    from tests.data.words import byte_tokenizer

    tokenizer = byte_tokenizer()
    tokenizer.save_pretrained(folder)
    tiny_model(len(tokenizer)).save_pretrained(folder)


def test_a_teacher_refuses_by_itself():
    with pytest.raises(ValueError, match="dropout is 2"):
        SASRec([1, 2], dropout=2)
    with pytest.raises(ValueError, match="epochs is 0"):
        SASRec.fit([[1, 2]], [1, 2], epochs=0)
