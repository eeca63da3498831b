"""Trainers compare the policy with the model's plain forward at the first use, and raise an error if they differ."""

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, MistralConfig, MistralForCausalLM

from gflowtrl import Recommender
from gflowtrl.policy import CausalTreePolicy, masks
from gflowtrl.rewards import GroundTruthReward, LikelihoodReward
from tests.tiny import tiny_model
from tests.trainer.world import TOKENIZER, make_catalog, make_rows, make_trainer


def windowed(seed=0):
    """A model with an attention window of 6, for prompts of 61 positions."""
    torch.manual_seed(seed)
    config = MistralConfig(
        vocab_size=len(TOKENIZER), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, sliding_window=6, initializer_range=0.3, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    return MistralForCausalLM(config).eval()


def gpt2(positions):
    config = GPT2Config(vocab_size=len(TOKENIZER), n_embd=32, n_layer=1, n_head=4, n_positions=positions)
    return GPT2LMHeadModel(config).eval()


@pytest.fixture
def forgotten(monkeypatch):
    """Ignore attention windows, as if gflowtrl did not know this model's."""
    monkeypatch.setattr(masks.Reach, "limits", lambda self, num_positions: False)


def test_a_windowed_model_is_trained_and_evaluated(tmp_path):
    trainer = make_trainer(tmp_path, [GroundTruthReward()], windowed(), eval_dataset=make_rows(6, 1, 500))
    trainer.train()
    assert 0 <= trainer.evaluate()["eval_ndcg@10"] <= 1


@pytest.mark.usefixtures("forgotten")
@pytest.mark.parametrize("use", ["train", "evaluate"])
def test_a_policy_that_differs_from_the_model_is_an_error_at_the_first_use(tmp_path, use):
    trainer = make_trainer(tmp_path, [GroundTruthReward()], windowed(), eval_dataset=make_rows(6, 1, 500))
    with pytest.raises(ValueError, match="MistralForCausalLM is not exact as a policy"):
        getattr(trainer, use)()
    assert trainer.state.global_step == 0


@pytest.mark.usefixtures("forgotten")
def test_reference_and_likelihood_are_also_compared(tmp_path):
    model = tiny_model(len(TOKENIZER))
    reference = make_trainer(tmp_path, [GroundTruthReward()], model, ref_model=windowed(), ref_weight=0.5)
    likelihood = make_trainer(tmp_path, [GroundTruthReward(), LikelihoodReward(windowed())], model)
    for trainer in (reference, likelihood):
        with pytest.raises(ValueError, match="MistralForCausalLM is not exact as a policy"):
            trainer.train()


@pytest.mark.usefixtures("forgotten")
def test_a_recommender_is_compared_at_its_first_list():
    recommender = Recommender(windowed(), TOKENIZER, make_catalog())
    with pytest.raises(ValueError, match="MistralForCausalLM is not exact as a policy"):
        recommender.recommend([["i001"]], k=3)


def test_the_comparison_is_made_once(tmp_path, monkeypatch):
    calls, plain = [], CausalTreePolicy._plain_logits
    monkeypatch.setattr(
        CausalTreePolicy, "_plain_logits", lambda self, prompt, paths: calls.append(1) or plain(self, prompt, paths)
    )
    trainer = make_trainer(tmp_path, [GroundTruthReward()], eval_dataset=make_rows(6, 1, 500))
    trainer.train()
    trainer.evaluate()
    assert len(calls) == 2  # one per compared prompt


@pytest.mark.parametrize(("positions", "fits"), [(62, False), (63, True)])
def test_prompts_longer_than_the_model_are_errors(tmp_path, positions, fits):
    """1 + 20 * 3 tokens of the prompt, and two of the three tokens of an id."""
    make = [
        lambda: make_trainer(tmp_path, [GroundTruthReward()], gpt2(positions)).train(),
        lambda: Recommender(gpt2(positions), TOKENIZER, make_catalog()).recommend([["i001"] * 20], k=3),
    ]
    for start in make:
        if fits:
            start()
            continue
        with pytest.raises(
            ValueError, match="takes up to 61 tokens, and with an id 63, but .* has 62 positions. Lower"
        ):
            start()
