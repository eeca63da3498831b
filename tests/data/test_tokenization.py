import pytest
import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from gflowtrl.data import add_item_tokens, build_tokenizer, check_round_trip

from .words import byte_tokenizer


IDS = {7: ("<a_10>", "<b_0>"), 8: ("<a_2>", "<b_1>"), 9: ("<a_2>", "<b_0>", "<c_0>")}


@pytest.fixture
def text_tokenizer():
    return byte_tokenizer()


def test_word_level_tokenizer(tmp_path):
    tokenizer = build_tokenizer(IDS)
    order = ["<pad>", "<bos>", "<eos>", "<a_2>", "<a_10>", "<b_0>", "<b_1>", "<c_0>"]  # by level, then by number
    assert tokenizer.convert_ids_to_tokens(range(len(tokenizer))) == order
    assert (tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id) == (0, 1, 2)
    assert tokenizer.padding_side == "left" and tokenizer.unk_token is None
    ids = tokenizer("<a_10> <b_0>", add_special_tokens=False)["input_ids"]
    assert ids == [4, 5] and tokenizer.decode(ids, skip_special_tokens=True) == "<a_10> <b_0>"
    with pytest.raises(Exception, match="UNK"):
        tokenizer("<a_10><b_0>")  # no silent unknown token
    tokenizer.save_pretrained(tmp_path)
    assert AutoTokenizer.from_pretrained(tmp_path)("<a_10> <b_0>")["input_ids"] == ids


def test_item_tokens_are_added_to_a_text_model(text_tokenizer):
    vocabulary = len(text_tokenizer)
    config = LlamaConfig(vocab_size=vocabulary, hidden_size=8, intermediate_size=8, num_hidden_layers=1,
                         num_attention_heads=1)  # fmt: skip
    model = LlamaForCausalLM(config)
    with pytest.raises(ValueError, match="Item 7: '<a_10>' is not a token of the tokenizer"):
        check_round_trip(text_tokenizer, IDS)
    assert add_item_tokens(text_tokenizer, IDS, model) == 5
    assert model.get_input_embeddings().num_embeddings == len(text_tokenizer) == vocabulary + 5
    assert not set(text_tokenizer.all_special_tokens) & {"<a_2>", "<b_0>"}
    ids = text_tokenizer("I took <a_2> <b_1>")["input_ids"]
    assert text_tokenizer.convert_ids_to_tokens(ids[-2:]) == ["<a_2>", "<b_1>"]
    assert text_tokenizer.decode(ids[-2:], skip_special_tokens=True).replace(" ", "") == "<a_2><b_1>"
    assert add_item_tokens(text_tokenizer, IDS, model) == 0  # a second call changes nothing
    assert model.get_input_embeddings().num_embeddings == vocabulary + 5


@pytest.mark.parametrize("tied", [False, True])
def test_new_tokens_are_initialized_from_titles(text_tokenizer, tied):
    ids = {n: (f"<a_{n % 3}>", f"<b_{n % 2}>", "<c_0>") for n in range(6)}
    titles = {n: "xyz"[n % 3] * 5 for n in range(6)} | {5: None}
    config = LlamaConfig(vocab_size=len(text_tokenizer), hidden_size=16, intermediate_size=8, num_hidden_layers=1,
                         num_attention_heads=1, tie_word_embeddings=tied)  # fmt: skip
    model = LlamaForCausalLM(config)
    before = model.get_input_embeddings().weight.detach().clone()
    add_item_tokens(text_tokenizer, ids, model, titles)
    tables = [model.get_input_embeddings().weight.detach(), model.get_output_embeddings().weight.detach()]
    assert torch.equal(tables[0][: len(before)], before)
    for table in tables:
        words = torch.stack([table[text_tokenizer(f" {x * 5}")["input_ids"]].mean(0) for x in "xyz"])
        new = table[[text_tokenizer.convert_tokens_to_ids(f"<a_{n}>") for n in range(3)]]
        cosine = torch.nn.functional.cosine_similarity(
            (new - new.mean(0))[:, None], (words - words.mean(0))[None], dim=-1
        )
        assert torch.allclose(cosine.diagonal(), torch.ones(3), atol=1e-4) and cosine.argmax(1).tolist() == [0, 1, 2]
        assert table.isfinite().all()
        known = table[: len(before)]
        size = (new - known.mean(0)).norm(dim=1).mean() / known.std(0).norm()
        assert size == pytest.approx(1.0, rel=1e-3)
        # The only token of a level is initialized with the mean.
        only = table[text_tokenizer.convert_tokens_to_ids("<c_0>")]
        torch.testing.assert_close(only, known.mean(0), rtol=1e-3, atol=1e-4)


def test_special_item_tokens_are_refused(text_tokenizer):
    text_tokenizer.add_special_tokens({"additional_special_tokens": ["<a_2>"]})
    with pytest.raises(ValueError, match="Item 8: '<a_2>' is a special token, which decoding drops"):
        add_item_tokens(text_tokenizer, IDS)


@pytest.mark.parametrize("token", ["<a 1>", "", "<bos>"])
def test_errors_name_bad_tokens(token):
    with pytest.raises(ValueError, match="Item 5 has the token"):
        build_tokenizer({5: (token,)})


@pytest.mark.parametrize("tokens", ["abc", None, 5, ("<a_1>", None), ("<a_1>", 3), {"<a_1>"}, (b"<a_1>",)])
def test_tokens_that_are_no_list_of_texts_are_refused(tokens):
    for check in (build_tokenizer, lambda ids: check_round_trip(build_tokenizer({1: ("<a_1>",)}), ids)):
        with pytest.raises(TypeError, match="The semantic id of item 5 is .*; give a list of its tokens as text"):
            check({5: tokens})
    with pytest.raises(TypeError, match="semantic_ids is of type list; it must be a dictionary"):
        build_tokenizer([tokens])
    with pytest.raises(ValueError, match="A token of item 5 holds half a character"):
        build_tokenizer({5: ("\ud83d",)})
