"""APAO: the loss over the vocabulary by hand, adaptive weights in plain loops, checkpoints, wrong arguments."""

import dataclasses
import math

import pytest
import torch

from gflowtrl import APAOConfig, APAOTrainer, GFlowNetTrainer, Recommender
from gflowtrl.losses import PrefixWeights
from tests.tiny import tiny_model, tiny_seq2seq

from .world import TOKENIZER, losses, make_catalog, make_rows


CATALOG = make_catalog()


def make_apao(folder, model=None, vocabulary: int | None = None, **options) -> APAOTrainer:
    data = {"train_dataset": make_rows(24), "eval_dataset": make_rows(7, 1, 500)}
    settings = {
        "per_device_train_batch_size": 8, "learning_rate": 1e-2, "num_train_epochs": 1, "report_to": "none",
        "use_cpu": True, "logging_steps": 1, "disable_tqdm": True, "save_strategy": "no", "num_negatives": 5,
    }  # fmt: skip
    data |= {name: options.pop(name) for name in ("sampler",) if name in options}
    return APAOTrainer(
        tiny_model(vocabulary or len(TOKENIZER)) if model is None else model,
        APAOConfig(str(folder), **settings | options),
        processing_class=TOKENIZER, catalog=make_catalog(), **data,
    )  # fmt: skip


def steps_by_hand(model, encoder, history, leaf: int) -> list[float]:
    """log P of each token of the leaf's id over the whole vocabulary, with a separate forward for this id."""
    path = [token for token in CATALOG.tree.paths[leaf].tolist() if token >= 0]
    prompt = encoder([history])["input_ids"]
    if model.config.is_encoder_decoder:
        start = [model.config.decoder_start_token_id]
        logits = model(input_ids=prompt, decoder_input_ids=torch.tensor([start + path[:-1]])).logits[0]
    else:
        ids = torch.cat([prompt, torch.tensor([path])], 1)
        logits = model(input_ids=ids).logits[0, prompt.shape[1] - 1 : -1]
    log_probs = logits.float().log_softmax(-1)
    return [float(log_probs[place, token]) for place, token in enumerate(path)]


@pytest.mark.parametrize("method", ["pointwise", "pairwise"])
@pytest.mark.parametrize("model", [tiny_model, tiny_seq2seq])
def test_the_loss_equals_the_papers_over_the_whole_vocabulary(tmp_path, model, method):
    """Most of the vocabulary does not belong to items, and some states have one child; both count here."""

    def chosen(step, policy, reward, k, noise):
        return (step.row_ids[:, None] * 3 + torch.arange(k)) % CATALOG.tree.num_leaves

    options = {"sampler": chosen} if method == "pairwise" else {}
    trainer = make_apao(tmp_path, model(4 * len(TOKENIZER)), method=method, beta=0.7, **options)
    trainer.model.eval()
    batch = next(iter(trainer.get_train_dataloader()))
    columns, expected = batch["rows"].columns, 0.0
    for row, (history, target) in enumerate(zip(columns["history"], columns["target"], strict=True)):
        leaf = int(CATALOG.leaf_of([target]))
        own = steps_by_hand(trainer.model, trainer._encoder, history, leaf)
        expected -= sum(own) / len(own)
        group = (batch["row_ids"][row] * 3 + torch.arange(6)) % CATALOG.tree.num_leaves if method == "pairwise" else []
        for m in range(1, len(own) + 1):
            if method == "pointwise":
                term = -sum(own[:m]) / m
            else:
                competing = {}
                for other in map(int, group):
                    path = CATALOG.tree.paths[other].tolist()[:m]
                    if -1 not in path and path != CATALOG.tree.paths[leaf].tolist()[:m]:
                        steps = steps_by_hand(trainer.model, trainer._encoder, history, other)
                        competing[tuple(path)] = math.exp(sum(steps[:m]))
                term = math.log1p(sum(competing.values()) / math.exp(sum(own[:m])))
            expected += 0.7 * term / CATALOG.tree.max_depth
    loss = trainer.compute_loss(trainer.model, batch).item()
    assert loss == pytest.approx(expected / len(columns["target"]), rel=1e-4)


def by_hand(variant: str, eta: float, steps: list[list[list[float]]]) -> list[list[float]]:
    """The weights of each step. A step is given by the L_m of its prompts, all of full length."""
    used, weights = [], None
    for prompts in steps:
        means = [sum(column) / len(column) for column in zip(*prompts, strict=True)]
        total = sum(means)
        if variant == "2025":
            weights = [value / total * math.exp(eta * value) for value in means]
        elif weights is None:
            weights = [1.0] * len(means) if variant == "paper" else [value / total for value in means]
        weights = [weight / sum(weights) for weight in weights]
        used.append(weights)
        if variant != "2025":
            rate = eta if variant == "paper" else eta / total
            weights = [weight * math.exp(rate * value) for weight, value in zip(weights, means, strict=True)]
    return used


@pytest.mark.parametrize("variant", ["paper", "2025", "kdd"])
def test_the_weights_equal_their_formulas(variant):
    generator = torch.Generator().manual_seed(0)
    batches = 4 * torch.rand(5, 6, 3, generator=generator)
    expected = by_hand(variant, 0.8, batches.tolist())
    weights = PrefixWeights(3, torch.clone, 0.8, variant)
    lengths = torch.full((6,), 3)
    for losses_of_step, hand in zip(batches, expected, strict=True):
        assert weights.weigh(losses_of_step, lengths).tolist() == pytest.approx(hand, rel=1e-5)
        weights.step()
    again = PrefixWeights(3, torch.clone, 0.8, variant)
    if weights.state_dict():
        again.load_state_dict(weights.state_dict())
    more = torch.rand(4, 3)
    assert torch.equal(weights.weigh(more, lengths[:4]), again.weigh(more, lengths[:4]))


def test_weights_adapt_once_per_step_and_short_ids_have_no_long_prefixes():
    whole, parts = PrefixWeights(2, torch.clone, 1.0, "paper"), PrefixWeights(2, torch.clone, 1.0, "paper")
    losses_of_step, lengths = torch.tensor([[1.0, 3.0], [2.0, 0.0], [5.0, 1.0]]), torch.tensor([2, 1, 2])
    whole.weigh(losses_of_step, lengths)
    for rows in (slice(0, 1), slice(1, 3)):
        assert parts.weigh(losses_of_step[rows], lengths[rows]).tolist() == [0.5, 0.5]
    for weights in (whole, parts):
        weights.step()
        ratio = math.exp(2.0 - 8 / 3)  # mean of 3 and 1 over two prompts, of 1, 2 and 5 over three
        assert weights.weigh(losses_of_step, lengths).tolist() == pytest.approx([1 / (1 + ratio), ratio / (1 + ratio)])


def test_it_learns_and_recommends(tmp_path):
    trainer = make_apao(tmp_path, method="pairwise", num_train_epochs=6, prefix_eta=0.1)
    trainer.train()
    assert losses(trainer)[-1] < 0.7 * losses(trainer)[0]
    logged = [log for log in trainer.state.log_history if "loss" in log][-1]
    assert sum(logged[f"prefix_pairwise/weight_{m}"] for m in (1, 2, 3)) == pytest.approx(1.0)
    assert {"loss/sft", "loss/prefix_pairwise", "prefix_pairwise/loss_1"} <= logged.keys()
    trainer.save_model(str(tmp_path / "model"))
    assert "APAO" in (tmp_path / "model" / "README.md").read_text()
    found = Recommender.from_pretrained(tmp_path / "model").recommend([make_rows(1)[0]["history"]], k=3)
    assert len(found[0]) == 3


@pytest.mark.parametrize("variant", ["paper", "kdd"])
def test_an_interrupted_training_resumes_exactly(tmp_path, variant):
    options = {"method": "pairwise", "prefix_variant": variant, "prefix_eta": 0.3, "max_steps": 6}
    whole = make_apao(tmp_path / "whole", save_strategy="steps", save_steps=3, **options)
    whole.train()
    again = make_apao(tmp_path / "again", **options)
    again.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))
    assert losses(again)[-3:] == losses(whole)[-3:]
    own, other = (t.prefix_weights["prefix_pairwise"].state_dict()["log_weights"] for t in (whole, again))
    assert torch.equal(own, other) and own.unique().numel() > 1


def test_with_a_balance_loss(tmp_path):
    """Prefix losses together with a GFlowNet objective."""
    from .test_step import rewards
    from .world import make_trainer

    trainer = make_trainer(tmp_path, rewards(), loss_type=["exact_flow", "prefix_pairwise"], loss_weights=[1, 0.3])
    trainer.train()
    assert isinstance(trainer, GFlowNetTrainer) and losses(trainer)[-1] < losses(trainer)[0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "listwise"}, "choose 'pointwise' or 'pairwise'"),
        ({"beta": -1.0}, "beta is -1.0"),
        ({"beta": float("inf")}, "beta is inf; it must be a finite number"),
        ({"num_negatives": 0}, "num_negatives is 0; it must be a whole number of at least 1"),
        ({"prefix_variant": "2024"}, "prefix_variant is '2024'"),
        ({"prefix_eta": -0.1}, "prefix_eta is -0.1"),
        ({"label_space": "items"}, "choose 'tree' or 'vocabulary'"),
        ({"loss_type": ["vargrad"]}, "use GFlowNetTrainer with loss_type"),
    ],
)
def test_invalid_values_are_errors(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        APAOConfig(str(tmp_path), **options)


def test_it_accepts_no_rewards(tmp_path):
    with pytest.raises(ValueError, match="does not use reward_funcs"):
        APAOTrainer(tiny_model(len(TOKENIZER)), APAOConfig(str(tmp_path)), reward_funcs=[len])


@pytest.mark.parametrize("name", ["loss_weights", "num_generations"])
def test_derived_fields_cannot_be_set(tmp_path, name):
    with pytest.raises(TypeError, match=name):
        APAOConfig(str(tmp_path), **{name: 1})
    config = APAOConfig(str(tmp_path), method="pairwise", num_negatives=3, beta=0.2)
    again = dataclasses.replace(config, beta=0.4, num_negatives=5)
    assert (config.loss_weights, config.num_generations) == ([1.0, 0.2], 4)
    assert (again.loss_weights, again.num_generations) == ([1.0, 0.4], 6)
