"""A language model as the backbone: prompts in words, adapters, new tokens that begin near their titles."""

import json
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from peft import PeftModel
from safetensors.torch import load_file
from transformers import TrainerCallback

from gflowtrl import Recommender
from gflowtrl.pipeline import run
from gflowtrl.pipeline.models import build_model
from gflowtrl.pipeline.run_data import prepare
from gflowtrl.pipeline.training import prompt_fingerprint
from gflowtrl.policy import load_backbone, make_policy
from tests.data.words import CHAT, byte_tokenizer
from tests.tiny import tiny_model

from .micro import micro_recipe
from .test_run import METHODS, Interrupt


LORA = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]}
WORDS = {"template": "Bought: {history}", "item": "{title} {semantic_id}; ", "chat": True, "max_title_words": 2}


@pytest.fixture(scope="module")
def text_model(tmp_path_factory) -> Path:
    """The folder of a small causal model that knows bytes."""
    folder = tmp_path_factory.mktemp("text_model")
    tokenizer = byte_tokenizer(CHAT)
    tokenizer.save_pretrained(folder)
    model = tiny_model(len(tokenizer), hidden_size=64)  # a block of 4-bit weights
    model.config.max_position_embeddings = 1024
    model.save_pretrained(folder)
    (folder / "README.md").write_text("---\nlicense: apache-2.0\n---\n# A model of bytes\n")
    return folder


def recipe_of(folder, text_model, **changes):
    model = {"model_name_or_path": str(text_model), "new_tokens": "titles"}
    settings = {"model": model, "prompt": WORDS, "peft": LORA, "stages": ["teacher", "sft", "gflownet"]}
    return micro_recipe(folder, **(settings | changes))


@pytest.fixture(scope="module")
def finished(tmp_path_factory, text_model):
    recipe = recipe_of(tmp_path_factory.mktemp("language_model"), text_model, stages=METHODS)
    return recipe, run(recipe, quiet=True)


def test_every_stage_leaves_adapters_and_the_merged_model(finished):
    recipe, results = finished
    for method in METHODS[1:]:
        folder = Path(results["methods"][method]["model"])
        merged = load_backbone(folder).eval()
        sft = results["methods"]["sft"]["model"]
        before = build_model(prepare(recipe)) if method == "sft" else load_backbone(sft)
        adapted = PeftModel.from_pretrained(before, folder.parent / "adapters").eval()
        tokens = torch.tensor([[5, 9, 70, merged.config.vocab_size - 1, merged.config.vocab_size - 4]])
        torch.testing.assert_close(merged(tokens).logits, adapted(tokens).logits, rtol=1e-4, atol=1e-4)
        small = load_file(folder.parent / "adapters" / "adapter_model.safetensors")
        # The SFT's base had fewer tokens, so that PEFT keeps the whole embeddings of it.
        share = sum(value.numel() for value in small.values()) / sum(p.numel() for p in merged.parameters())
        assert method == "sft" or share < 0.1


def test_cards_name_the_model_it_began_from_and_its_license(finished, text_model):
    for method in METHODS[1:]:
        card = ModelCard.load(Path(finished[1]["methods"][method]["model"], "README.md"))
        assert f"Training started from `{text_model.name}` (license: apache-2.0)." in card.text
        assert card.data.license == "apache-2.0"
        assert card.data.base_model is None  # a folder is not a name on the Hub
        assert "LlamaForCausalLM that recommends" in card.text and "AutoTokenizer" in card.text


def test_recommendations_read_the_words(finished):
    recipe, results = finished
    run_data = prepare(recipe)
    recommender = Recommender.from_pretrained(results["methods"]["gflownet"]["model"])
    history = run_data.splits.test["history"][0]
    prompt = recommender.encoder([history])
    text = recommender.tokenizer.decode(prompt["input_ids"][0])
    titles = [" ".join(run_data.titles[item].split()[:2]) for item in history[-6:]]
    assert text.startswith("<user>Bought: ") and text.endswith("<end><assistant>")
    assert all(title in text for title in titles)
    assert len(recommender.recommend([history], k=5)[0]) == 5
    settings = json.loads(Path(results["methods"]["sft"]["model"], "recommender_config.json").read_text())
    assert settings["chat"] and settings["max_title_words"] == 2


def test_sft_learns_the_ids(finished):
    recipe, results = finished
    run_data = prepare(recipe)
    rows = run_data.splits.train
    prompts = run_data.encoder(rows["history"])
    leaves = run_data.catalog.leaf_of(rows["target"])[:, None]
    likelihoods = [
        make_policy(model.eval(), run_data.catalog).score(prompts, leaves).trajectory_log_probs.mean().item()
        for model in (build_model(run_data), load_backbone(results["methods"]["sft"]["model"]))
    ]
    assert likelihoods[1] > likelihoods[0] + 0.1


@pytest.mark.parametrize("stage", ["sft", "gflownet"])
def test_an_interrupted_run_ends_like_an_undisturbed_one(finished, text_model, tmp_path, stage):
    _, results = finished
    again = recipe_of(tmp_path, text_model)
    with pytest.raises(KeyboardInterrupt):
        run(again, quiet=True, callbacks=[Interrupt(stage, results["methods"][stage]["steps"] - 2)])
    resumed = run(again, quiet=True)
    for name, value in load_file(Path(results["methods"]["gflownet"]["model"], "model.safetensors")).items():
        other = load_file(Path(resumed["methods"]["gflownet"]["model"], "model.safetensors"))[name]
        assert torch.equal(value, other), name


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": {"hidden_size": 16}}, "a new model knows no words"),
        ({"prompt": {"tempate": "{history}"}}, "prompt.tempate"),
        ({"prompt": {"template": "no place"}}, "must contain {history} exactly once"),
        ({"peft": {"rank": 4}}, "peft.rank"),
    ],
)
def test_bad_recipes_are_named(text_model, tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        recipe_of(tmp_path, text_model, **changes)


def test_unknown_ways_to_begin_are_named(text_model, tmp_path):
    with pytest.raises(ValueError, match="choose 'random' or 'titles'"):
        recipe_of(tmp_path, text_model, model={"model_name_or_path": str(text_model), "new_tokens": "zero"})


def test_the_stage_follows_the_words(finished, tmp_path):
    recipe, _ = finished
    run_data = prepare(recipe)
    before = prompt_fingerprint(run_data)
    item = run_data.interactions.items[0]
    run_data.interactions.item_features[item]["title"] = "something else"
    assert prompt_fingerprint(run_data) != before
    assert prompt_fingerprint(prepare(micro_recipe(tmp_path))) == {}


@pytest.mark.parametrize(
    "bits", [{"load_in_4bit": True, "bnb_4bit_quant_type": "fp4"}, {"load_in_8bit": True}], ids=str
)
def test_adapters_on_quantized_weights(bits, text_model, tmp_path):
    """The model is held in few bits while it is trained, and kept whole."""
    model = {"model_name_or_path": str(text_model), "new_tokens": "titles"}
    recipe = recipe_of(tmp_path, text_model, model=model | bits)
    seen = []

    class Look(TrainerCallback):
        def on_train_begin(self, args, state, control, model=None, **kwargs):
            kind = type(model.get_base_model().model.layers[0].mlp.up_proj).__name__
            seen.append((kind, type(model.get_output_embeddings().original_module).__name__))

    results = run(recipe, quiet=True, callbacks=[Look()])
    assert seen == [("Linear4bit" if "load_in_4bit" in bits else "Linear8bitLt", "Linear")] * 2
    for method in ("sft", "gflownet"):
        folder = Path(results["methods"][method]["model"])
        assert not hasattr(load_backbone(folder).config, "quantization_config")
        assert all(value.dtype == torch.float32 for value in load_file(folder / "model.safetensors").values())
    before, after = (build_model(prepare(recipe), quantized=False), load_backbone(results["methods"]["sft"]["model"]))
    changed = {n for (n, a), b in zip(before.named_parameters(), after.parameters(), strict=True) if not a.equal(b)}
    assert {name.rpartition(".")[0].rpartition(".")[2] for name in changed} <= {
        "q_proj",
        "v_proj",
        "embed_tokens",
        "lm_head",
    }
    assert changed


@pytest.mark.parametrize("bits", [{}, {"load_in_4bit": True}], ids=str)
def test_adapters_on_the_untrained_model_are_merged_into_it(bits, text_model, tmp_path):
    """The base is the checkpoint with its new tokens, whole, and no SFT comes first."""
    model = {"model_name_or_path": str(text_model), "new_tokens": "titles"} | bits
    recipe = recipe_of(tmp_path, text_model, model=model, start="untrained", stages=["control", "gflownet"])
    results = run(recipe, quiet=True)
    assert list(results["methods"]) == ["teacher", "control", "gflownet"]
    for method in ("control", "gflownet"):
        folder = Path(results["methods"][method]["model"])
        before, merged = build_model(prepare(recipe), quantized=False), load_backbone(folder).eval()
        pairs = zip(before.named_parameters(), merged.parameters(), strict=True)
        changed = {name.rpartition(".")[0].rpartition(".")[2] for (name, a), b in pairs if not a.equal(b)}
        assert {"q_proj", "v_proj"} < changed <= {"q_proj", "v_proj", "embed_tokens", "lm_head"}
        adapted = PeftModel.from_pretrained(before, folder.parent / "adapters").eval()
        tokens = torch.tensor([[5, 9, 70, merged.config.vocab_size - 1, merged.config.vocab_size - 4]])
        torch.testing.assert_close(merged(tokens).logits, adapted(tokens).logits, rtol=1e-4, atol=1e-4)
        card = ModelCard.load(folder / "README.md")
        assert f"Training started from `{text_model.name}` (license: apache-2.0)." in card.text
        inputs = json.loads((folder.parent / "inputs.json").read_text())
        assert {"model_files", "prompt", "titles"} < inputs["start"].keys() and inputs["peft"] == LORA


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"load_in_4bit": True, "load_in_8bit": True}, "8 bit and 4 bit"),
        ({"load_in_4bit": 4}, "model.load_in_4bit must be true or false"),
        ({"bnb_4bit_quant_type": "nf4"}, "bnb_4bit_quant_type is set, but neither"),
    ],
)
def test_quantization_that_makes_no_sense(options, message, text_model, tmp_path):
    with pytest.raises((TypeError, ValueError), match=message):
        recipe_of(tmp_path, text_model, model={"model_name_or_path": str(text_model), **options})


def test_quantized_weights_cannot_be_trained_themselves(text_model, tmp_path):
    with pytest.raises(ValueError, match="add a section peft"):
        recipe_of(tmp_path, text_model, model={"model_name_or_path": str(text_model), "load_in_4bit": True}, peft={})
