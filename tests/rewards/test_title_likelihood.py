"""The likelihood of titles equals a separate forward pass per text, for any packing of prompts and titles."""

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from gflowtrl.rewards import CompositeReward
from gflowtrl.rewards.title_likelihood import TEMPLATE, TitleLikelihoodReward
from tests.rewards.world import (
    TITLES,
    all_leaves,
    make_catalog,
    make_seq2seq,
    make_step,
    make_title_reward,
    text_tokenizer,
)
from tests.tiny import tiny_model


def naive(model, history, item, words=16, items=10, normalize="mean"):
    """Compute the likelihood with one forward pass over one full text, without padding or cache."""
    tokenizer = text_tokenizer()
    titles = {name: " ".join(title.split()[:words]) for name, title in TITLES.items()}
    text = TEMPLATE.format(history="\n".join(f"- {titles[name]}" for name in history[-items:]))
    prompt, title = tokenizer(text)["input_ids"], tokenizer(titles[item], add_special_tokens=False)["input_ids"]
    with torch.no_grad():
        log_probs = model(torch.tensor([prompt + title])).logits[0].log_softmax(-1)
    token_log_probs = [log_probs[len(prompt) - 1 + i, token].item() for i, token in enumerate(title)]
    total = torch.tensor(sum(token_log_probs) / (len(title) if normalize == "mean" else 1))
    return total.exp().item()


@pytest.mark.parametrize("batch_size", [1, 5, 32, 1000])
@pytest.mark.parametrize("normalize", ["mean", "sum"])
def test_equals_the_score_of_the_full_text(batch_size, normalize):
    """Titles and histories of different lengths, in chunks of rows and titles, equal the naive score of all pairs.

    Dropout is off.
    """
    catalog, step = make_catalog(), make_step()
    reward = make_title_reward(normalize=normalize, batch_size=batch_size, max_history_items=2, max_title_words=3)
    expected = torch.tensor([
        [naive(reward.model, history, item, 3, 2, normalize) for item in catalog.items]
        for history in step.columns["history"]
    ])  # fmt: skip
    reward.model.train()
    for layer in reward.model.model.layers:
        layer.self_attn.attention_dropout = 0.5
    scores = reward.bind(catalog).score_items(step)
    torch.testing.assert_close(scores, expected, atol=1e-6, rtol=1e-4)
    assert (scores > 0).all() and (scores <= 1).all() and not scores.requires_grad and reward.model.training


def test_learned_positions_and_titles_of_one_word():
    """GPT-2 uses learned positions from `position_ids`. Titles of one token need no second forward pass."""
    torch.manual_seed(0)
    tokenizer, catalog, step = text_tokenizer(), make_catalog(), make_step()
    config = GPT2Config(
        vocab_size=len(tokenizer), n_positions=64, n_embd=16, n_layer=2, n_head=2, initializer_range=0.3
    )
    model = GPT2LMHeadModel(config).eval()
    for words in (16, 1):
        reward = TitleLikelihoodReward(model, tokenizer, TITLES, max_title_words=words).bind(catalog)
        scores = reward.score_items(step)
        for row, history in enumerate(step.columns["history"]):
            expected = [naive(model, history, item, words) for item in catalog.items]
            assert scores[row].tolist() == pytest.approx(expected, rel=1e-4)


def test_only_drawn_titles_are_read_and_each_once(monkeypatch):
    catalog, step = make_catalog(), make_step()
    reward, shapes = make_title_reward().bind(catalog), []
    forward = reward.model.forward

    def counting(*args, **kwargs):
        shapes.append(kwargs["input_ids"].shape)
        return forward(*args, **kwargs)

    every = reward.score_leaves(step, all_leaves(catalog, step))
    monkeypatch.setattr(reward.model, "forward", counting)
    leaves = catalog.leaf_of(["plum", "kiwi", "plum", "plum"]).expand(4, -1)
    torch.testing.assert_close(reward.score_leaves(step, leaves), every.gather(1, leaves))
    assert [shape[0] for shape in shapes] == [4]  # one prompt per row; titles of one word need no further pass


def test_all_items_must_be_enabled():
    """Exact flows would read a title per item and row at every step, so `all_items` must be set."""
    catalog = make_catalog()
    for all_items in (False, True):
        composite = CompositeReward(make_title_reward(all_items=all_items), catalog)
        assert composite.can_score_all == all_items
    with pytest.raises(ValueError, match="'title_likelihood' cannot score all items"):
        CompositeReward(make_title_reward(), catalog).dense(make_step())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"template": "Next:"}, "is 'Next:'; it must contain {history}"),
        ({"normalize": "none"}, "normalize is 'none'; choose 'mean'"),
        (
            {"max_history_items": 0},
            "max_history_items of TitleLikelihoodReward is 0; it must be a whole number of at least 1",
        ),
        (
            {"max_title_words": 0},
            "max_title_words of TitleLikelihoodReward is 0; it must be a whole number of at least 1",
        ),
        ({"batch_size": 0}, "batch_size of TitleLikelihoodReward is 0; it must be a whole number of at least 1"),
    ],
)
def test_invalid_options(options, message):
    with pytest.raises(ValueError, match=message):
        make_title_reward(**options)


def test_invalid_models_and_titles():
    tokenizer, catalog = text_tokenizer(), make_catalog()
    with pytest.raises(ValueError, match="is T5ForConditionalGeneration .*; it must be a causal language model"):
        TitleLikelihoodReward(make_seq2seq(), tokenizer, TITLES)
    model = tiny_model(len(tokenizer))
    with pytest.raises(ValueError, match="but 2 of 9 items have no title, for example 'apple'"):
        TitleLikelihoodReward(model, tokenizer, {**TITLES, "apple": " ", "nut": None}).bind(catalog)
    reward = make_title_reward().bind(catalog)
    with pytest.raises(ValueError, match="no title for item 'soap' of a history"):
        reward.score_items(make_step(history=[["soap"]] * 4))
    reward.model.config.max_position_embeddings = 20
    with pytest.raises(ValueError, match=r"have \d+ tokens, but the model has 20 positions. Lower max_history_items"):
        reward.score_items(make_step())
