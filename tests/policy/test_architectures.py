"""Tests that every kind of causal model is either exact, including sliding windows, or raises an error."""

import pytest
import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedModel

from gflowtrl import ItemCatalog
from gflowtrl.data import PromptEncoder, build_tokenizer
from gflowtrl.policy import CausalTreePolicy, check_exact, make_policy
from tests import tiny


IDS = {9 * a + 3 * b + c: (f"<a_{a}>", f"<b_{b}>", f"<c_{c}>") for a in range(3) for b in range(3) for c in range(3)}
TOKENIZER = build_tokenizer(IDS)
WINDOW, HISTORY = 6, 8  # a prompt has 1 + 3 * 8 tokens
#: Sizes of the tiny models; each configuration gets those that it has.
SIZES = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64, "n_embd": 32, "n_layer": 2, "n_head": 4,
    "n_positions": 64, "rotary_dim": 4, "ffn_dim": 64, "dff": 64, "word_embed_proj_dim": 32,
    "moe_intermediate_size": 32, "num_local_experts": 2, "num_experts": 4, "num_experts_per_tok": 1,
    "sliding_window": WINDOW, "attention_chunk_size": WINDOW,
}  # fmt: skip
MIXED = {"layer_types": ["sliding_attention", "full_attention"] * 2}
QWEN = {"use_sliding_window": True, **MIXED}

#: Layers that see part of the prompt: one mask per kind of layer, or one mask with the window for all layers.
WINDOWED = {
    "gpt_oss": MIXED, "gemma2": MIXED, "gemma3_text": MIXED, "ministral": MIXED, "exaone4": MIXED, "qwen3": QWEN,
    "cohere2": MIXED, "olmo3": MIXED,
    "llama4_text": {"layer_types": ["chunked_attention", "full_attention"] * 2, "no_rope_layers": [1, 0] * 2,
                    "intermediate_size_mlp": 64},
    "modernbert-decoder": {"local_attention": WINDOW, **MIXED},
    "mistral": {}, "phi3": {}, "starcoder2": {}, "ministral3": {},
}  # fmt: skip
WHOLE = {
    "llama": {}, "gpt2": {}, "gpt_neox": {}, "gptj": {}, "codegen": {}, "opt": {}, "phi": {}, "falcon": {},
    "gpt_bigcode": {}, "gpt_neo": {"attention_types": [[["global"], 4]]},
    "stablelm": {}, "olmo": {}, "olmo2": {}, "granite": {}, "gemma": {}, "cohere": {}, "qwen2": {}, "smollm3": {},
    "mixtral": {}, "olmoe": {}, "qwen3_moe": {}, "biogpt": {}, "glm": {}, "helium": {}, "nemotron": {},
    "persimmon": {},
}  # fmt: skip
UNSUPPORTED = {
    "bert": ({}, "sees later tokens too"),
    "roberta": ({}, "sees later tokens too"),
    "gemma3_text": ({"use_bidirectional_attention": True}, "sees later tokens too"),
    "bloom": ({}, "takes no position_ids"),
    "mpt": ({}, "takes no position_ids"),
    "falcon": ({"alibi": True}, "ALiBi"),
    "mamba": ({}, "carries a state"),
    "jamba": ({}, "carries a state"),
    "minimax": ({"layer_types": ["linear_attention", "full_attention"] * 2}, "'linear_attention'"),
    "lfm2": ({"layer_types": ["conv", "full_attention"] * 2}, "convolutions"),
}
#: Not detected by the configuration, but at the first use.
FOUND_AT_FIRST_USE = {"rembert": "Short prompts differ too|4-D attention mask", "openai-gpt": "4-D attention mask"}


def build(kind: str, options: dict) -> PreTrainedModel:
    if kind not in CONFIG_MAPPING:
        pytest.skip(f"the installed version of transformers has no {kind}")
    default = CONFIG_MAPPING[kind]()
    known = {name: size for name, size in SIZES.items() if hasattr(default, name) and name not in options}
    if kind == "falcon":
        del known["head_dim"]
    special = {"vocab_size": len(TOKENIZER), "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    config = CONFIG_MAPPING[kind](**special, **known, **options)
    config.initializer_range = 0.3
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config).eval()


@pytest.fixture(scope="module")
def catalog():
    return ItemCatalog.from_semantic_ids(IDS, TOKENIZER)


@pytest.fixture
def encoder(catalog):
    return PromptEncoder(catalog, TOKENIZER, max_history_items=HISTORY)


@pytest.mark.parametrize("kind", [*WINDOWED, *WHOLE])
def test_exact(kind, catalog, encoder):
    policy = make_policy(build(kind, {**WHOLE, **WINDOWED}[kind]), catalog)
    prompts = encoder([list(range(HISTORY)), [26, 3]])
    leaves = torch.tensor([[0, 1, 13, 26]]).expand(2, -1)
    with torch.no_grad():
        expected = tiny.causal_log_probs(policy, prompts, leaves)
        torch.testing.assert_close(policy.score(prompts, leaves).log_probs, expected, rtol=0, atol=1e-4)
        decoded = policy.leaf_log_probs(prompts).gather(1, leaves)
    torch.testing.assert_close(decoded, expected.sum(-1), rtol=0, atol=2e-4)
    check_exact(policy, encoder)


@pytest.mark.parametrize("kind", WINDOWED)
def test_windows_are_shorter_than_the_prompt(kind, catalog, encoder, monkeypatch):
    """Without windows the policy differs, so the comparison detects a missing window in each of these models."""
    policy = make_policy(build(kind, WINDOWED[kind]), catalog)
    monkeypatch.setattr(policy, "_reaches", {})
    with pytest.raises(ValueError, match="Short prompts agree: a layer sees only part of a long prompt"):
        check_exact(policy, encoder)


@pytest.mark.parametrize("kind", ["gpt_oss", "llama4_text", "mistral"])
def test_gradients_beyond_the_window(kind, catalog, encoder):
    policy = make_policy(build(kind, WINDOWED[kind]), catalog)
    prompts, leaves = encoder([list(range(HISTORY)), [26, 3]]), torch.tensor([[0, 5, 13], [2, 2, 25]])
    weights = torch.randn(2, 3, 3, generator=torch.Generator().manual_seed(2))
    packed, expected = (
        tiny.gradients(policy.model, (log_probs * weights).sum())
        for log_probs in (policy.score(prompts, leaves).log_probs, tiny.causal_log_probs(policy, prompts, leaves))
    )
    tiny.assert_close_gradients(packed, expected, tolerance=1e-4)


@pytest.mark.parametrize("kind", UNSUPPORTED)
def test_errors_at_construction(kind, catalog):
    options, reason = UNSUPPORTED[kind]
    with pytest.raises(ValueError, match=reason) as error:
        CausalTreePolicy(build(kind, options), catalog)
    assert "Use a model whose layers are all causal attention" in str(error.value)


@pytest.mark.parametrize("kind", FOUND_AT_FIRST_USE)
def test_errors_at_the_first_use(kind, catalog, encoder):
    policy = make_policy(build(kind, {}), catalog)
    with pytest.raises(ValueError, match=FOUND_AT_FIRST_USE[kind]) as error:
        check_exact(policy, encoder)
    assert type(policy.model).__name__ in str(error.value)


#: Rotary positions, and dropout of embeddings (except StableLM and Falcon), of residuals and of attention.
DROPOUT = {
    "gpt_neox": {"hidden_dropout": 0.3, "attention_dropout": 0.3, "tie_word_embeddings": True},
    "phi": {"embd_pdrop": 0.3, "resid_pdrop": 0.3, "attention_dropout": 0.3},
    "gptj": {"embd_pdrop": 0.3, "resid_pdrop": 0.3, "attn_pdrop": 0.3},
    "stablelm": {"hidden_dropout": 0.3, "attention_dropout": 0.3},
    "falcon": {"hidden_dropout": 0.3, "attention_dropout": 0.3},
}


@pytest.mark.parametrize("kind", DROPOUT)
def test_dropout_acts_in_training_only(kind, catalog, encoder):
    """Decoding and the comparison at the first use are without dropout, in a model that is in training too."""
    policy = make_policy(build(kind, DROPOUT[kind]), catalog)
    prompts, leaves = encoder([list(range(HISTORY)), [26, 3]]), torch.tensor([[0, 1, 13, 26]]).expand(2, -1)
    with torch.no_grad():
        expected = tiny.causal_log_probs(policy, prompts, leaves)
        torch.testing.assert_close(policy.score(prompts, leaves).log_probs, expected, rtol=0, atol=1e-4)
        policy.model.train()
        check_exact(policy, encoder)
        decoded = policy.leaf_log_probs(prompts).gather(1, leaves)
        torch.testing.assert_close(decoded, expected.sum(-1), rtol=0, atol=2e-4)
        noisy = [policy.score(prompts, leaves).log_probs for _ in range(2)]
    assert all(module.training for module in policy.model.modules())
    assert not torch.allclose(noisy[0], noisy[1], atol=1e-2) and not torch.allclose(noisy[0], expected, atol=1e-2)


ROWS = {
    "gpt_neo": {"attention_types": [[["global", "local"], 2]], "window_size": 30},
    "llama4_text": {**WINDOWED["llama4_text"], "floor_scale": 31, "attn_scale": 0.5},
}


@pytest.mark.parametrize("kind", ROWS)
def test_models_that_count_columns_raise_beyond_their_limit(kind, catalog, encoder):
    policy = make_policy(build(kind, ROWS[kind]), catalog)
    prompts = encoder([list(range(HISTORY))])  # 25 tokens
    fits, too_many = torch.tensor([[0, 1]]), torch.arange(27)[None]
    with torch.no_grad():
        expected = tiny.causal_log_probs(policy, prompts, fits)
        torch.testing.assert_close(policy.score(prompts, fits).log_probs, expected, rtol=0, atol=1e-4)
    for use in (lambda: policy.score(prompts, too_many), lambda: policy.leaf_log_probs(prompts)):
        with pytest.raises(ValueError, match="exact for up to 30; a prompt and its branches take"):
            use()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["llama", "gpt_neox", "olmoe"])
def test_rounding_is_tolerated_and_a_missing_window_is_not(kind, dtype, catalog, encoder, monkeypatch):
    """In bfloat16 OLMoE sometimes chooses another expert, which changes single tokens a lot."""
    check_exact(make_policy(build(kind, {}).to(dtype), catalog), encoder)
    windowed = make_policy(build("mistral", {}).to(dtype), catalog)
    check_exact(windowed, encoder)
    monkeypatch.setattr(windowed, "_reaches", {})
    with pytest.raises(ValueError, match="Short prompts agree"):
        check_exact(windowed, encoder)


def counting_columns(model):
    """Make a model count the columns of a row and ignore the positions."""
    inner, forward = model.model, model.model.forward

    def counted(input_ids=None, position_ids=None, past_key_values=None, **kwargs):
        past = 0 if past_key_values is None else past_key_values.get_seq_length()
        columns = torch.arange(input_ids.shape[1])[None] + past
        return forward(input_ids=input_ids, position_ids=columns, past_key_values=past_key_values, **kwargs)

    inner.forward = counted
    return model


DENSE = tiny.random_paths(30)
#: Most first tokens determine the whole id, including those of the first and the last leaf.
SPARSE = torch.tensor(
    [[3, 10, 20], *[[a, b, c] for a in (4, 5) for b in (10, 11, 12) for c in (20, 21, 22)], [6, 12, 22]]
)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("paths", [DENSE, SPARSE, tiny.random_paths(30, depth=2)], ids=["dense", "sparse", "short"])
def test_counting_columns_is_detected_in_every_dtype(paths, dtype):
    """In such a model the first branch after a prompt is right, and so is the first token of every branch."""
    catalog = tiny.catalog_of(paths)
    encoder = PromptEncoder(catalog, build_tokenizer({"item": ("a",)}), max_history_items=5)
    check_exact(make_policy(tiny.tiny_model(40).to(dtype), catalog), encoder)
    with pytest.raises(ValueError, match="is not exact as a policy"):
        check_exact(make_policy(counting_columns(tiny.tiny_model(40).to(dtype)), catalog), encoder)
