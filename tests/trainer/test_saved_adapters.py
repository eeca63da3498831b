"""Adapters on the token embeddings: the saved folder equals the trained model."""

import itertools

import pytest
import torch
from peft import LoraConfig
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from gflowtrl import Recommender
from gflowtrl.policy import make_policy
from gflowtrl.rewards import GroundTruthReward
from gflowtrl.trainer.adapters import add_adapters
from tests.tiny import tiny_seq2seq

from .world import TOKENIZER, make_catalog, make_trainer


VOCABULARY = 3 * len(TOKENIZER)  # so that the policy computes only some rows of the head
SIZES = {
    "llama": {"intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4, "hidden_size": 32},
    "gpt2": {"n_embd": 32, "n_layer": 1, "n_head": 4},
    "gptj": {"n_embd": 32, "n_layer": 1, "n_head": 4, "rotary_dim": 4},
    "codegen": {"n_embd": 32, "n_layer": 1, "n_head": 4, "rotary_dim": 4},
}
SIZES["phi"] = SIZES["llama"]
ATTENTION = {"gpt2": "c_attn", "codegen": "qkv_proj"}
TABLE = {"llama": "embed_tokens", "phi": "embed_tokens"}


def build(kind: str, tied: bool = False):
    torch.manual_seed(0)
    special = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "initializer_range": 0.3}
    config = CONFIG_MAPPING[kind](vocab_size=VOCABULARY, tie_word_embeddings=tied, **special, **SIZES[kind])
    model = AutoModelForCausalLM.from_config(config).eval()
    if getattr(model.get_output_embeddings(), "bias", None) is not None:
        torch.nn.init.normal_(model.get_output_embeddings().bias, std=1.5)
    return model


def lora(kind: str, targets=(), **options) -> LoraConfig:
    names = [ATTENTION.get(kind, "q_proj"), *({"table": TABLE.get(kind, "wte")}.get(name, name) for name in targets)]
    return LoraConfig(r=2, target_modules=names, task_type="CAUSAL_LM", **options)


def leaf_log_probs(model) -> torch.Tensor:
    catalog = make_catalog()
    tokens = torch.tensor([[1, *catalog.item_token_ids[catalog.index_of(["i010"])][0].tolist()]])
    prompts = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
    return make_policy(model.eval(), catalog).leaf_log_probs(prompts).detach()


WAYS = {
    "attention": {},
    "head": {"targets": ["lm_head"]},
    "table": {"targets": ["table"]},
    "both": {"targets": ["lm_head", "table"]},
    "copied head": {"modules_to_save": ["lm_head"]},
    "every bias": {"bias": "all"},
}


@pytest.mark.filterwarnings(
    "ignore:Model has `tie_word_embeddings=True`", "ignore:Model with `tie_word_embeddings=True`"
)
@pytest.mark.parametrize(
    ("kind", "tied", "way", "item_tokens"),
    [
        *itertools.product(["phi", "gptj", "codegen"], [False], ["attention", "every bias"], [True, False]),
        *itertools.product(["llama", "gpt2"], [True], ["attention"], [True, False]),
        *itertools.product(["llama", "gpt2"], [True], ["head", "table", "both", "copied head"], [True]),
        ("phi", True, "attention", True), ("phi", True, "both", True), ("gptj", False, "head", True),
        ("codegen", False, "copied head", True), ("llama", False, "both", True),
    ],
)  # fmt: skip
def test_new_adapters_change_nothing_and_the_folder_equals_the_trained_model(tmp_path, kind, tied, way, item_tokens):
    base = build(kind, tied)
    before = leaf_log_probs(base)
    base.save_pretrained(tmp_path / "base")
    trainer = make_trainer(
        tmp_path / "out", [GroundTruthReward()], str(tmp_path / "base"), peft_config=lora(kind, **WAYS[way]),
        train_item_tokens=item_tokens, max_steps=3, learning_rate=3e-2,
    )  # fmt: skip
    torch.testing.assert_close(leaf_log_probs(trainer.model), before)
    trainer.train()
    trainer.save_model()
    trained = leaf_log_probs(trainer.model)
    assert (trained - before).abs().max() > 0.05
    loaded = Recommender.from_pretrained(tmp_path / "out")
    torch.testing.assert_close(leaf_log_probs(loaded.model), trained, rtol=1e-4, atol=1e-4)
    loaded.save_pretrained(tmp_path / "whole")
    whole = Recommender.from_pretrained(tmp_path / "whole")
    torch.testing.assert_close(leaf_log_probs(whole.model), trained, rtol=1e-4, atol=1e-4)
    apart = tied and way != "attention"
    assert whole.model.config.tie_word_embeddings is (tied and not apart)


def test_a_pattern_that_names_the_head_is_used_unchanged():
    adapted = add_adapters(build("llama"), LoraConfig(r=2, target_modules=r".*(q_proj|lm_head)"), make_catalog())
    assert not [name for name, _ in adapted.named_parameters() if "tokens_delta" in name]
    every = add_adapters(
        build("llama"), LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM"), make_catalog()
    )
    assert len([name for name, _ in every.named_parameters() if "tokens_delta" in name]) == 2


@pytest.mark.parametrize("options", [{"target_modules": ["q", "lm_head"]}, {"modules_to_save": ["shared"]}])
def test_tied_embeddings_of_an_encoder_decoder_stay_tied(options):
    model = tiny_seq2seq(VOCABULARY, "t5")
    with pytest.raises(ValueError, match="change the tied embeddings of T5For.*target_modules, modules_to_save"):
        add_adapters(model, LoraConfig(**{"r": 2, "target_modules": ["q"], **options}), make_catalog())
