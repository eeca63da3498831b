"""Causal and encoder-decoder models, detected automatically."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForSeq2SeqLM

from gflowtrl import GFlowNetConfig, GFlowNetTrainer
from gflowtrl.policy import load_backbone, make_policy
from gflowtrl.rewards import CollaborativeReward, GroundTruthReward
from tests.tiny import tiny_model, tiny_seq2seq

from .world import TOKENIZER, losses, make_catalog, make_rows, make_trainer, make_user_rows, teacher, weights


def rewards() -> list:
    return [GroundTruthReward(), CollaborativeReward(teacher)]


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> GFlowNetTrainer:
    """An encoder-decoder that was trained with a flow head, evaluated and saved."""
    trainer = make_trainer(
        tmp_path_factory.mktemp("t5"), rewards(), tiny_seq2seq(len(TOKENIZER)), loss_type="sft,detailed_balance",
        eval_dataset=make_rows(6, 1, 500), eval_strategy="steps", eval_steps=2, save_strategy="steps", save_steps=2,
    )  # fmt: skip
    trainer.train()
    trainer.save_model()
    return trainer


def test_an_encoder_decoder_is_evaluated_by_its_own_beam_search(trained):
    metrics = trained.evaluate()
    rows = make_rows(6, 1, 500)
    prompts = trained._encoder(rows["history"])
    exact = make_policy(trained.model.eval(), make_catalog()).leaf_log_probs(prompts)
    target = exact.gather(1, make_catalog().leaf_of(rows["target"])[:, None])
    hits = ((exact > target).sum(1) < 5).float().mean().item()  # 10 beams over 23 leaves find all of the first 5 here
    assert metrics["eval_recall@5"] == pytest.approx(hits)


def test_its_folder_is_loaded_with_the_right_class_and_trained_further(trained, tmp_path, warned):
    folder = trained.args.output_dir
    assert type(AutoModelForSeq2SeqLM.from_pretrained(folder)).__name__ == "T5ForConditionalGeneration"
    assert not warned
    args = GFlowNetConfig(str(tmp_path), use_cpu=True, max_steps=1, disable_tqdm=True, save_strategy="no")
    trainer = GFlowNetTrainer(folder, rewards(), args, make_rows())
    assert torch.equal(trainer.model.shared.weight, trained.model.shared.weight)
    trainer.train()
    assert not torch.equal(trainer.model.shared.weight, trained.model.shared.weight)


def test_it_resumes(trained, tmp_path):
    resumed = make_trainer(
        tmp_path, rewards(), tiny_seq2seq(len(TOKENIZER), seed=5), loss_type="sft,detailed_balance",
        eval_dataset=make_rows(6, 1, 500), eval_strategy="steps", eval_steps=2,
    )  # fmt: skip
    resumed.train(resume_from_checkpoint=f"{trained.args.output_dir}/checkpoint-2")
    expected = weights(trained)
    assert all(torch.equal(value, expected[name]) for name, value in weights(resumed).items())


def test_gpt_neox_with_dropout_and_tied_embeddings_resumes_bit_for_bit(tmp_path):
    """The vocabulary is large, so that only the catalog's logits are computed."""

    def make(folder, **options):
        model = tiny_model(
            3 * len(TOKENIZER), "gpt_neox", hidden_dropout=0.2, attention_dropout=0.2, tie_word_embeddings=True
        )
        return make_trainer(
            tmp_path / folder, rewards(), model, loss_type="sft,detailed_balance", learning_rate=1e-3,
            save_strategy="steps", save_steps=2, train_dataset=make_user_rows(), **options,
        )  # fmt: skip

    whole, resumed = make("whole"), make("resumed")
    whole.train()
    whole.save_model()
    assert whole.policy_of(whole.model)._output is not None
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    expected = weights(whole)
    assert all(torch.equal(value, expected[name]) for name, value in weights(resumed).items())
    assert losses(resumed)[-2:] == losses(whole)[-2:]
    saved = load_backbone(str(tmp_path / "whole"))
    assert saved.get_output_embeddings().weight is saved.get_input_embeddings().weight
    prompts = whole._encoder(make_user_rows(6)["history"])
    one, other = (make_policy(m.eval(), make_catalog()).leaf_log_probs(prompts) for m in (whole.model, saved))
    torch.testing.assert_close(one, other)


def test_adapters_on_an_encoder_decoder_are_trained_and_their_reference_is_the_base_model(tmp_path):
    config = LoraConfig(r=2, target_modules=["q", "v"], task_type="SEQ_2_SEQ_LM")
    trainer = make_trainer(
        tmp_path, rewards(), tiny_seq2seq(len(TOKENIZER)), peft_config=config, ref_weight=1.0,
        loss_type="sft,trajectory_balance",
    )  # fmt: skip
    start = weights(trainer)
    trainer.train()
    moved = {name for name, value in weights(trainer).items() if not torch.equal(value, start[name])}
    assert moved == {name for name in start if any(kind in name for kind in ("lora_", "tokens_delta", "flow_heads"))}
    batch = next(iter(trainer.get_train_dataloader()))
    expected = make_policy(tiny_seq2seq(len(TOKENIZER)), make_catalog()).leaf_log_probs(batch["prompts"])
    torch.testing.assert_close(trainer.prior.score_all(trainer.model, batch["prompts"]), expected)


@pytest.mark.parametrize(
    ("model", "task", "modules", "kind"),
    [
        (tiny_model, "CAUSAL_LM", ["q_proj"], "LlamaForCausalLM"),
        (tiny_seq2seq, "SEQ_2_SEQ_LM", ["q"], "T5ForConditionalGeneration"),
    ],
)
def test_a_folder_of_adapters_loads_as_its_base_model_with_adapters(tmp_path, model, task, modules, kind):
    model(len(TOKENIZER)).save_pretrained(tmp_path / "base")
    adapted = get_peft_model(
        load_backbone(str(tmp_path / "base")), LoraConfig(r=2, target_modules=modules, task_type=task)
    )
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    adapted.save_pretrained(tmp_path / "adapters")
    loaded = load_backbone(str(tmp_path / "adapters"))
    assert type(loaded).__name__ == kind
    prompts = {"input_ids": torch.tensor([[3, 4, 5]]), "attention_mask": torch.ones(1, 3, dtype=torch.long)}
    one, other = (make_policy(m.eval(), make_catalog()).leaf_log_probs(prompts) for m in (adapted, loaded))
    torch.testing.assert_close(one, other)
