"""Adapters, and the embeddings of item tokens that are trained with them."""

import pytest
import torch
from peft import AutoPeftModelForCausalLM, IA3Config, LoraConfig, PromptTuningConfig, get_peft_model
from safetensors.torch import load_file
from transformers import BitsAndBytesConfig

from gflowtrl import GFlowNetConfig, GFlowNetTrainer, Recommender
from gflowtrl.policy import load_backbone, make_policy
from gflowtrl.rewards import CollaborativeReward, GroundTruthReward
from gflowtrl.trainer.adapters import add_adapters, embedding_names
from tests.tiny import needs_transformers, tiny_model, tiny_seq2seq

from .world import TOKENIZER, make_catalog, make_rows, make_trainer, teacher, weights


VOCABULARY = 4 * len(TOKENIZER)
KINDS = [("llama", False), ("llama", True), ("t5", False), ("t5", True)]


def build(kind: str, tied: bool):
    model = (tiny_seq2seq if kind == "t5" else tiny_model)(VOCABULARY, kind)
    model.config.tie_word_embeddings = tied
    torch.manual_seed(0)
    return type(model)(model.config)


def lora(kind: str = "llama", **options) -> LoraConfig:
    modules, task = (["q"], "SEQ_2_SEQ_LM") if kind == "t5" else (["q_proj"], "CAUSAL_LM")
    return LoraConfig(**{"r": 2, "target_modules": modules, "task_type": task, **options})


def train(folder, kind, tied, config=None, **options):
    trainer = make_trainer(
        folder, [GroundTruthReward(), CollaborativeReward(teacher)], build(kind, tied),
        peft_config=config or lora(kind), loss_type="sft,trajectory_balance", **options,
    )  # fmt: skip
    before = weights(trainer)
    trainer.train()
    moved = {name for name, value in weights(trainer).items() if not torch.equal(value, before[name])}
    return trainer, moved


@pytest.mark.parametrize(("kind", "tied"), KINDS)
def test_all_embeddings_of_the_item_tokens_are_trained_and_no_other_row(tmp_path, kind, tied):
    trainer, moved = train(tmp_path, kind, tied)
    deltas = [name for name in moved if "trainable_tokens_delta" in name]
    assert len(deltas) == (1 if tied else 3 if kind == "t5" else 2)
    assert all("lora_" in name or "tokens_delta" in name or "flow_heads" in name for name in moved)
    tokens = make_catalog().tree.tokens
    model, base = trainer.model.merge_and_unload(), build(kind, tied)
    tables = [(model.get_output_embeddings(), base.get_output_embeddings())]
    if kind == "t5":
        tables += [(model.encoder.embed_tokens, base.encoder.embed_tokens)]
        tables += [(model.decoder.embed_tokens, base.decoder.embed_tokens)]
    else:
        tables += [(model.get_input_embeddings(), base.get_input_embeddings())]
    for own, other in tables:
        changed = (own.weight != other.weight).any(1).nonzero().squeeze(1)
        assert set(changed.tolist()) <= set(tokens.tolist()) and len(changed) > 3


@pytest.mark.parametrize(("kind", "tied"), KINDS)
def test_a_saved_adapter_is_the_trained_model_again_merged_or_not(tmp_path, kind, tied):
    build(kind, tied).save_pretrained(tmp_path / "base")
    trainer = make_trainer(
        tmp_path / "out", [GroundTruthReward(), CollaborativeReward(teacher)], str(tmp_path / "base"),
        peft_config=lora(kind), loss_type="sft,trajectory_balance",
    )  # fmt: skip
    trainer.train()
    trainer.save_model()
    catalog, history = make_catalog(), [["i010", "twin"]]
    policy = make_policy(trainer.model.eval(), catalog)
    expected = policy.leaf_log_probs(trainer._encoder(history))
    saved = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert all(value.shape[0] <= VOCABULARY // 2 for name, value in saved.items() if "tokens" in name)
    assert "flow_heads.safetensors" in {file.name for file in (tmp_path / "out").iterdir()}
    loaded = Recommender.from_pretrained(tmp_path / "out")
    torch.testing.assert_close(make_policy(loaded.model, catalog).leaf_log_probs(loaded.encoder(history)), expected)
    trainer.model.merge_and_unload().save_pretrained(tmp_path / "merged")
    merged = load_backbone(tmp_path / "merged").eval()
    torch.testing.assert_close(
        make_policy(merged, catalog).leaf_log_probs(trainer._encoder(history)), expected, rtol=1e-4, atol=1e-4
    )


def adapters_on(base, folder, kind="llama", tied=False, **options) -> str:
    """Train adapters on a base model in a folder, and save them to another folder."""
    build(kind, tied).save_pretrained(base)
    trainer = make_trainer(
        folder, [CollaborativeReward(teacher)], str(base), peft_config=lora(kind), max_steps=2, **options
    )
    trainer.train()
    trainer.save_model()
    return str(folder)


def log_probs(model) -> torch.Tensor:
    catalog = make_catalog()
    prompts = Recommender(model, TOKENIZER, catalog).encoder([["i010", "twin"]])
    return make_policy(model.eval(), catalog).leaf_log_probs(prompts).detach()


def next_trainer(folder: str, out, **options) -> GFlowNetTrainer:
    """A trainer that continues from a folder alone."""
    settings = {"max_steps": 1, "learning_rate": 1e-2, "save_strategy": "no", "use_cpu": True, "disable_tqdm": True}
    own = {name: value for name, value in options.items() if name in GFlowNetConfig.__dataclass_fields__}
    arguments = {name: value for name, value in options.items() if name not in own}
    args = GFlowNetConfig(str(out), **(settings | own))
    return GFlowNetTrainer(folder, [CollaborativeReward(teacher)], args, make_rows(), **arguments)


@pytest.mark.parametrize(("kind", "tied", "tokens"), [(*kind, True) for kind in KINDS] + [("llama", True, False)])
def test_a_folder_of_adapters_is_trained_further_as_one_model(tmp_path, kind, tied, tokens):
    folder = adapters_on(tmp_path / "base", tmp_path / "first", kind, tied, train_item_tokens=tokens)
    expected = log_probs(Recommender.from_pretrained(folder).model)
    trainer = next_trainer(folder, tmp_path / "second")
    torch.testing.assert_close(log_probs(trainer.model), expected)
    start = weights(trainer)
    assert not [name for name in start if "lora_" in name or "tokens_delta" in name]
    assert all(parameter.requires_grad for parameter in trainer.model.parameters())
    if kind == "llama":
        assert (trainer.model.lm_head.weight is trainer.model.model.embed_tokens.weight) == tied
    trainer.train()
    assert all(not torch.equal(value, start[name]) for name, value in weights(trainer).items() if "layers" in name)
    trainer.save_model()
    again = Recommender.from_pretrained(tmp_path / "second")
    torch.testing.assert_close(log_probs(again.model), log_probs(trainer.model), rtol=1e-4, atol=1e-4)


def test_adapters_are_put_on_a_folder_of_adapters(tmp_path):
    folder = adapters_on(tmp_path / "base", tmp_path / "first")
    trainer = next_trainer(folder, tmp_path / "second", peft_config=lora(), ref_weight=1.0)
    trainer.train()
    trainer.save_model()
    again = Recommender.from_pretrained(tmp_path / "second")
    torch.testing.assert_close(log_probs(again.model), log_probs(trainer.model), rtol=1e-4, atol=1e-4)
    again.save_pretrained(tmp_path / "whole")
    whole = Recommender.from_pretrained(tmp_path / "whole")
    assert torch.equal(log_probs(whole.model), log_probs(again.model))
    # The reference is the model to which the new adapters were added.
    batch = next(iter(trainer.get_train_dataloader()))
    below = make_policy(load_backbone(folder).eval(), make_catalog()).leaf_log_probs(batch["prompts"])
    torch.testing.assert_close(trainer.prior.score_all(trainer.model, batch["prompts"]), below)


def test_a_folder_of_adapters_as_the_reference(tmp_path):
    folder = adapters_on(tmp_path / "base", tmp_path / "first")
    trainer = make_trainer(
        tmp_path / "out", [CollaborativeReward(teacher)], build("llama", False), ref_model=folder, ref_weight=1.0
    )
    trainer.train()
    torch.testing.assert_close(log_probs(trainer.prior.model), log_probs(Recommender.from_pretrained(folder).model))


@pytest.mark.parametrize("kind", ["llama", "t5"])
def test_adapters_on_a_base_that_had_fewer_tokens(tmp_path, kind):
    small = (tiny_seq2seq if kind == "t5" else tiny_model)(9, kind)
    small.save_pretrained(tmp_path / "small")
    grown = load_backbone(tmp_path / "small")
    grown.resize_token_embeddings(len(TOKENIZER))
    config, out = lora(kind), tmp_path / "out"
    trainer = make_trainer(out, [CollaborativeReward(teacher)], grown, peft_config=config, max_steps=2)
    trainer.train()
    with pytest.warns(UserWarning, match="the embedding layer has been resized"):
        trainer.save_model()
    loaded = Recommender.from_pretrained(out)
    torch.testing.assert_close(log_probs(loaded.model), log_probs(trainer.model), rtol=1e-4, atol=1e-4)


def test_adapters_on_a_quantized_base_recommend_but_are_not_trained_on(tmp_path):
    pytest.importorskip("bitsandbytes")
    needs_transformers("5.18", "adapters on a quantized model")
    folder = adapters_on(tmp_path / "base", tmp_path / "first")
    options = {"quantization_config": BitsAndBytesConfig(load_in_8bit=True)}
    recommender = Recommender.from_pretrained(folder, **options)
    whole = log_probs(Recommender.from_pretrained(folder).model)
    torch.testing.assert_close(log_probs(recommender.model), whole, rtol=0.1, atol=0.3)
    for peft_config in (None, lora()):
        with pytest.raises(ValueError, match="has adapters that are not merged.*without a quantization_config"):
            next_trainer(folder, tmp_path / "second", model_init_kwargs=options, peft_config=peft_config)


def test_prompts_as_adapters_cannot_be_merged(tmp_path):
    build("llama", False).save_pretrained(tmp_path / "base")
    config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    get_peft_model(load_backbone(tmp_path / "base"), config).save_pretrained(tmp_path / "adapters")
    with pytest.raises(ValueError, match="holds PROMPT_TUNING adapters, which are prompts and cannot be merged"):
        load_backbone(tmp_path / "adapters")


def test_peft_alone_loads_it(tmp_path):
    build("llama", False).save_pretrained(tmp_path / "base")
    trainer = make_trainer(
        tmp_path / "out", [GroundTruthReward()], str(tmp_path / "base"), peft_config=lora(), loss_type="vargrad"
    )
    trainer.train()
    trainer.save_model()
    model = AutoPeftModelForCausalLM.from_pretrained(str(tmp_path / "out")).eval()
    tokens = torch.tensor([[1, 5, 9, 4]])
    torch.testing.assert_close(model(tokens).logits, trainer.model.eval()(tokens).logits)


def test_a_configuration_that_names_the_embeddings_is_used_unchanged():
    model = build("llama", False)
    config = lora(modules_to_save=["embed_tokens"])
    adapted = add_adapters(model, config, make_catalog())
    assert not [name for name, _ in adapted.named_parameters() if "tokens_delta" in name]
    own = add_adapters(build("llama", False), lora(trainable_token_indices=[5]), make_catalog())
    assert [p.shape[0] for name, p in own.named_parameters() if "tokens_delta" in name] == [1]
    every = add_adapters(build("llama", False), lora(target_modules=["q_proj", "lm_head"]), make_catalog())
    assert not [name for name, _ in every.named_parameters() if "tokens_delta" in name]
    assert config.trainable_token_indices is None  # the user's configuration is not modified


def test_other_adapters_and_frozen_tokens(tmp_path):
    ia3 = IA3Config(target_modules=["k_proj"], feedforward_modules=[], task_type="CAUSAL_LM")
    _, moved = train(tmp_path / "ia3", "llama", False, ia3)
    assert moved and all("ia3" in name or "flow_heads" in name for name in moved)
    _, moved = train(tmp_path / "frozen", "llama", False, train_item_tokens=False)
    assert all("lora_" in name or "flow_heads" in name for name in moved)


@pytest.mark.parametrize(("kind", "tied"), KINDS)
def test_names_of_the_embeddings(kind, tied):
    model = build(kind, tied)
    names = embedding_names(model)
    own = {id(model.get_submodule(name).weight) for name in names}
    used = [model.encoder.embed_tokens, model.decoder.embed_tokens] if kind == "t5" else [model.model.embed_tokens]
    assert own == {id(module.weight) for module in [*used, model.lm_head]}


@pytest.mark.parametrize("tied", [False, True])
def test_training_with_adapters_resumes(tmp_path, tied):
    options = {"save_strategy": "steps", "save_steps": 2, "train_dataset": make_rows(48)}
    whole, _ = train(tmp_path / "whole", "llama", tied, **options)
    resumed = make_trainer(
        tmp_path / "again", [GroundTruthReward(), CollaborativeReward(teacher)], build("llama", tied),
        peft_config=lora(), loss_type="sft,trajectory_balance", **options,
    )  # fmt: skip
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    expected = weights(whole)
    assert all(torch.equal(value, expected[name]) for name, value in weights(resumed).items())
