"""The temperature of MSL applies to the policy, in training, evaluation, saved models and recommendations."""

import json

import pytest
import torch
from peft import LoraConfig, PeftModel

from gflowtrl import GFlowNetTrainer, Recommender
from gflowtrl.pipeline.models import save_merged
from gflowtrl.policy import StatelessNoise, load_backbone, make_policy
from gflowtrl.policy.temperature import FIELD, FILE, temperature_of
from tests.tiny import tiny_model, tiny_seq2seq

from .world import TOKENIZER, make_catalog, make_rows, make_trainer


TAU = 3.0
CATALOG = make_catalog()
MSL = {"loss_type": "msl", "loss_kwargs": {"msl": {"temperature": TAU}}}


@torch.no_grad()
def by_hand(model, prompt: list[int], temperature: float, vocabulary: bool = False) -> torch.Tensor:
    """log pi of every leaf, from full sequences: softmax(logits / temperature) over the children at each step."""
    found, tree, seq2seq = [], CATALOG.tree, model.config.is_encoder_decoder
    for leaf in range(tree.num_leaves):
        path, total = tree.paths[leaf][: tree.leaf_lengths[leaf]].tolist(), 0.0
        inputs = {"input_ids": [prompt + path[:-1]]}
        if seq2seq:
            inputs = {"input_ids": [prompt], "decoder_input_ids": [[model.config.decoder_start_token_id, *path[:-1]]]}
        steps = model(**{name: torch.tensor(ids) for name, ids in inputs.items()}).logits[0, -len(path) :].double()
        for depth, (token, logits) in enumerate(zip(path, steps, strict=True)):
            same = tree.paths[(tree.paths[:, :depth] == torch.tensor(path[:depth])).all(1)]
            legal = sorted({int(other[depth]) for other in same if other[depth] >= 0})
            scaled = logits / temperature
            total += float(scaled[token] - scaled[slice(None) if vocabulary else legal].logsumexp(0))
        found.append(total)
    return torch.tensor(found)


def prompt_of(encoder, history) -> list[int]:
    return encoder([history])["input_ids"][0].tolist()


@pytest.mark.parametrize("make", [tiny_model, tiny_seq2seq], ids=["llama", "t5"])
def test_a_policy_uses_the_temperature_of_its_model_everywhere(make):
    model = make(len(TOKENIZER)).eval()
    setattr(model.config, FIELD, TAU)
    policy, leaves = make_policy(model, CATALOG), torch.arange(CATALOG.tree.num_leaves)[None]
    ids = CATALOG.tree.tokens[[0, 4, 7, 2]].tolist()
    prompts = {"input_ids": torch.tensor([ids]), "attention_mask": torch.ones(1, 4).long()}
    expected, plain = by_hand(model, ids, TAU), by_hand(model, ids, 1.0)
    assert expected.exp().sum().item() == pytest.approx(1.0)
    tolerance = {"rtol": 0, "atol": 2e-4}
    torch.testing.assert_close(policy.leaf_log_probs(prompts)[0], expected, **tolerance)
    scores = policy.score(prompts, leaves, vocabulary=True)
    torch.testing.assert_close(scores.trajectory_log_probs[0], expected, **tolerance)
    over_all = by_hand(model, ids, TAU, vocabulary=True)
    torch.testing.assert_close(scores.vocabulary_log_probs.sum(-1)[0], over_all, **tolerance)
    ranked, log_probs = policy.beam_search(prompts, leaves.shape[1])
    order = expected.argsort(descending=True)
    assert ranked[0].equal(order) and not ranked[0].equal(plain.argsort(descending=True))  # another order
    torch.testing.assert_close(log_probs[0], expected[order], **tolerance)
    noise = StatelessNoise(0).at(0, torch.arange(1))
    drawn, log_q = policy.sample(prompts, 8, noise, temperature=2.0)  # in addition to TAU
    torch.testing.assert_close(log_q[0], by_hand(model, ids, 2 * TAU)[drawn[0]], **tolerance)


def test_msl_trains_evaluates_saves_and_resumes_at_its_temperature(tmp_path):
    trainer = make_trainer(tmp_path / "run", max_steps=3, eval_dataset=(rows := make_rows(6, seed=3)), **MSL)
    batch = next(iter(trainer.get_train_dataloader()))
    loss = trainer.compute_loss(trainer.model, batch).item()
    prompts = [ids[mask.bool()].tolist() for ids, mask in zip(*batch["prompts"].values(), strict=True)]
    targets = CATALOG.leaf_of(batch["rows"].columns["target"]).tolist()
    log_probs = [by_hand(trainer.model.eval(), p, TAU)[t] for p, t in zip(prompts, targets, strict=True)]
    assert loss == pytest.approx(-float(sum(log_probs)) / len(targets), rel=1e-4)
    trainer.train()
    ranked = torch.as_tensor(trainer.predict(rows).predictions)
    for history, leaves in zip(rows["history"], ranked, strict=True):
        log_pi = by_hand(trainer.model.eval(), prompt_of(trainer._encoder, history), TAU)
        assert log_pi[leaves].equal(log_pi[leaves].sort(descending=True).values) and log_pi[leaves[0]] == log_pi.max()
    trainer.save_model(str(tmp_path / "model"))
    recommender = Recommender.from_pretrained(tmp_path / "model")
    history = rows[0]["history"]
    log_pi = by_hand(trainer.model, prompt_of(trainer._encoder, history), TAU)
    for one in recommender.recommend([history], k=5)[0]:
        assert one.log_prob == pytest.approx(float(log_pi[CATALOG.leaf_of([one.item])]), abs=2e-4)
    recommender.save_pretrained(tmp_path / "again")
    assert temperature_of(load_backbone(tmp_path / "again")) == TAU
    for options, temperature in (({}, TAU), ({"loss_kwargs": {"msl": {"temperature": 1.0}}}, 1.0)):
        again = make_trainer(tmp_path, model=str(tmp_path / "again"), loss_type="msl", **options)
        assert temperature_of(again.model) == temperature
    assert FIELD in json.loads((tmp_path / "model" / "config.json").read_text())
    assert not (tmp_path / "model" / FILE).exists()


def test_adapters_are_saved_with_it(tmp_path):
    tiny_model(len(TOKENIZER)).save_pretrained(tmp_path / "base")
    lora = LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    trainer = make_trainer(
        tmp_path / "run", model=str(tmp_path / "base"), peft_config=lora, max_steps=2, **MSL
    )  # fmt: skip
    trainer.train()
    assert isinstance(trainer.model, PeftModel)
    trainer.save_model(str(tmp_path / "adapters"))
    expected = by_hand(trainer.model.eval(), [1, 5, 9], TAU)
    prompts = {"input_ids": torch.tensor([[1, 5, 9]]), "attention_mask": torch.ones(1, 3).long()}
    save_merged(lambda: load_backbone(tmp_path / "base"), tmp_path / "adapters", tmp_path / "merged")
    for folder in ("adapters", "merged"):
        found = make_policy(load_backbone(tmp_path / folder), CATALOG).leaf_log_probs(prompts)[0]
        torch.testing.assert_close(found, expected, rtol=0, atol=2e-4)
    (tmp_path / "adapters" / FILE).unlink()
    assert temperature_of(load_backbone(tmp_path / "adapters")) == 1.0


def test_the_default_reference_has_the_same_temperature(tmp_path):
    trainer: GFlowNetTrainer = make_trainer(
        tmp_path, loss_type=["msl", "sdpo"], loss_weights=[0.0, 1.0], loss_kwargs=MSL["loss_kwargs"], num_generations=2
    )  # fmt: skip
    batch = next(iter(trainer.get_train_dataloader()))
    leaves = torch.arange(5).expand(8, -1)
    own = make_policy(trainer.model, CATALOG).score(batch["prompts"], leaves).log_probs
    torch.testing.assert_close(trainer.reference.token_scores(trainer.model, batch["prompts"], leaves).log_probs, own)


@pytest.mark.parametrize("value", [0, -1.0, float("nan"), "warm"])
def test_invalid_temperatures_are_errors(value):
    model = tiny_model(len(TOKENIZER))
    setattr(model.config, FIELD, value)
    with pytest.raises(ValueError, match="policy_temperature of the model's configuration is .*finite number above 0"):
        make_policy(model, CATALOG)
