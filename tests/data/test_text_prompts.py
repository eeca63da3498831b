"""Text prompts: the expected text in training, in decoding and after loading."""

import json

import pytest
import torch
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st

from gflowtrl import GFlowNetConfig, GFlowNetTrainer, Recommender
from gflowtrl.catalog import ItemCatalog
from gflowtrl.data import PromptFormat, TextPromptEncoder, Windows, add_item_tokens, text_sft_dataset
from gflowtrl.rewards import GroundTruthReward
from gflowtrl.trunks import separate_prompts
from tests.tiny import tiny_model

from .words import CHAT, byte_tokenizer


IDS = {1: ("<a_0>", "<b_0>", "<c_0>"), 2: ("<a_1>",), 3: ("<a_2>", "<b_0>"), 4: ("<a_1>",)}
TITLES = {1: "Red pen, fine", 2: "Blue {semantic_id} pen", 3: "Pad of paper A4", 4: "Desk lamp"}


def make(chat_template: str | None = None):
    tokenizer = byte_tokenizer(chat_template)
    add_item_tokens(tokenizer, IDS)
    return tokenizer, ItemCatalog.from_semantic_ids(IDS, tokenizer)


TOKENIZER, CATALOG = make()
CHAT_TOKENIZER, CHAT_CATALOG = make(CHAT)


def text(tokenizer, prompts, row: int = 0) -> str:
    tokens = prompts["input_ids"][row][prompts["attention_mask"][row].bool()]
    return tokenizer.decode(tokens)


def test_a_prompt_follows_its_template():
    encoder = TextPromptEncoder(
        CATALOG, TOKENIZER, TITLES, PromptFormat("Had:\n{history}Next:", "- {title} = {semantic_id}\n")
    )
    assert (
        text(TOKENIZER, encoder([[3, 1]]))
        == "Had:\n- Pad of paper A4 =<a_2><b_0>\n- Red pen, fine =<a_0><b_0><c_0>\nNext:"
    )


def test_titles_are_cut_and_inserted_literally():
    short = TextPromptEncoder(CATALOG, TOKENIZER, TITLES, PromptFormat("{history}", "{title};", max_title_words=2))
    assert text(TOKENIZER, short([[2, 3]])) == "Blue {semantic_id};Pad of;"


def test_missing_titles_are_replaced():
    titles = {**TITLES, 2: " "}
    del titles[3]
    prompt_format = PromptFormat("{history}", "{title};", untitled="something")
    encoder = TextPromptEncoder(CATALOG, TOKENIZER, titles, prompt_format)
    assert text(TOKENIZER, encoder([[2, 3]])) == "something;something;"


def test_a_chat_uses_the_chat_template_of_the_tokenizer():
    prompt_format = PromptFormat("I had {history}. And now?", "{title} ", chat=True, system="Recommend.")
    encoder = TextPromptEncoder(CHAT_CATALOG, CHAT_TOKENIZER, TITLES, prompt_format)
    expected = CHAT_TOKENIZER.apply_chat_template(
        [{"role": "system", "content": "Recommend."}, {"role": "user", "content": "I had Desk lamp . And now?"}],
        tokenize=False, add_generation_prompt=True,
    )  # fmt: skip
    assert text(CHAT_TOKENIZER, encoder([[4]])) == expected


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.lists(st.sampled_from(list(IDS)), min_size=1, max_size=5), min_size=1, max_size=4),
    st.integers(1, 4),
)
def test_prompts_are_left_padded_concatenations_of_pieces(histories, max_items):
    """Oracle: each row is built separately from its pieces."""
    encoder = TextPromptEncoder(
        CATALOG, TOKENIZER, TITLES, PromptFormat("A {history}Z", "{title} {semantic_id}."), max_items
    )

    def tokens(words: str) -> list[int]:
        return TOKENIZER(words, add_special_tokens=False)["input_ids"]

    rows = []
    for history in histories:
        items = [tokens(f"{TITLES[item]} {' '.join(IDS[item])}.") for item in history[-max_items:]]
        rows.append([*tokens("A "), *(token for item in items for token in item), *tokens("Z")])
    prompts = encoder(histories)
    width = max(map(len, rows))
    assert prompts["input_ids"].shape == (len(rows), width)
    for row, ids, mask in zip(rows, prompts["input_ids"], prompts["attention_mask"], strict=True):
        assert ids[width - len(row) :].tolist() == row and mask.tolist() == [0] * (width - len(row)) + [1] * len(row)


def test_sft_rows_are_prompt_and_answer():
    encoder = TextPromptEncoder(CATALOG, TOKENIZER, TITLES, PromptFormat("{history}>", "{title} "))
    rows = text_sft_dataset([[1], [2, 3]], [3, 1], encoder)
    for row, history, target in zip(rows, [[1], [2, 3]], [3, 1], strict=True):
        prompt = encoder([history])["input_ids"][0].tolist()
        answer = CATALOG.item_token_ids[CATALOG.index_of([target])[0]]
        answer = answer[answer >= 0].tolist()
        assert row["input_ids"] == prompt + answer and row["labels"] == [-100] * len(prompt) + answer


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: PromptFormat(template="no place"), "must contain {history} exactly once"),
        (lambda: PromptFormat(item="nothing"), "must contain {title} or {semantic_id}"),
        (lambda: PromptFormat(system="You are"), "only a chat has a system message"),
        (lambda: PromptFormat(max_title_words=0), "max_title_words is 0; it must be"),
        (lambda: TextPromptEncoder(CATALOG, TOKENIZER, {1: "a"}), "3 of 4 items have none, for example 2"),
        (lambda: TextPromptEncoder(CATALOG, TOKENIZER, TITLES, PromptFormat(chat=True)), "has no chat template"),
    ],
)
def test_bad_input_raises_errors(build, message):
    with pytest.raises(ValueError, match=message):
        build()


@pytest.fixture
def rows():
    histories = [[1], [2, 3], [3], [4, 1]] * 2
    return Dataset.from_dict({"row_id": list(range(8)), "history": histories, "target": [3, 1, 2, 3] * 2})


def test_a_trainer_and_its_checkpoint_use_the_same_prompts(tmp_path, rows):
    encoder = TextPromptEncoder(CATALOG, TOKENIZER, TITLES, PromptFormat(max_title_words=3), max_history_items=2)
    args = GFlowNetConfig(
        str(tmp_path / "out"), use_cpu=True, max_steps=2, loss_type="vargrad", per_device_train_batch_size=4,
        num_generations=2, save_strategy="no", disable_tqdm=True, max_history_items=2,
    )  # fmt: skip
    trainer = GFlowNetTrainer(
        tiny_model(len(TOKENIZER)), GroundTruthReward(), args, rows, processing_class=TOKENIZER, catalog=CATALOG,
        prompt_encoder=encoder,
    )  # fmt: skip
    assert next(iter(trainer.get_train_dataloader()))["prompts"]["input_ids"].shape[1] > 40
    trainer.train()
    trainer.save_model()
    saved = json.loads((tmp_path / "out" / "recommender_config.json").read_text())
    assert saved["prompt_format"] == "text" and saved["template"] == encoder.format.template
    loaded = Recommender.from_pretrained(tmp_path / "out")
    for name, value in encoder([[3, 2, 1]]).items():
        assert torch.equal(loaded.encoder([[3, 2, 1]])[name], value)
    expected = Recommender(trainer.model, TOKENIZER, CATALOG, encoder=encoder).recommend([[1, 3]], k=3)
    assert loaded.recommend([[1, 3]], k=3) == expected
    # The next trainer loads the prompt format from the folder.
    again = GFlowNetTrainer(str(tmp_path / "out"), GroundTruthReward(), args, rows)
    assert again._encoder.format == encoder.format and torch.equal(again._encoder.table, encoder.table)
    loaded.save_pretrained(tmp_path / "copy")
    assert torch.equal(Recommender.from_pretrained(tmp_path / "copy").encoder.table, encoder.table)


def long_context_model():
    """Create a model with positions for twenty titles."""
    model = tiny_model(len(TOKENIZER))
    model.config.max_position_embeddings = 1024
    return model


def test_prompts_with_text_after_the_items_are_computed_separately(tmp_path):
    histories, targets = [[1], [1, 3], [2], [2, 2]], [3, 4, 2, 1]
    rows = Dataset.from_dict({"row_id": list(range(4)), "history": histories, "target": targets})
    args = GFlowNetConfig(str(tmp_path), use_cpu=True, loss_type="sft", train_sampling_strategy="sequential")
    options = {"train_dataset": rows, "processing_class": TOKENIZER, "catalog": CATALOG}
    with_tail = TextPromptEncoder(CATALOG, TOKENIZER, TITLES)
    with pytest.raises(ValueError, match="no prompt is a prefix of another"):
        with_tail.encode_windows(Windows.pack([[1]], [2]))
    trainer = GFlowNetTrainer(long_context_model(), None, args, prompt_encoder=with_tail, **options)
    assert "trunk" not in next(iter(trainer.get_train_dataloader()))["prompts"]
    without_tail = TextPromptEncoder(CATALOG, TOKENIZER, TITLES, PromptFormat("Had: {history}"))
    trainer = GFlowNetTrainer(long_context_model(), None, args, prompt_encoder=without_tail, **options)
    batch = next(iter(trainer.get_train_dataloader()))
    expected = without_tail(batch["rows"].windows.histories)
    prompts = separate_prompts(batch["prompts"])
    assert "trunk" in batch["prompts"] and prompts["attention_mask"].equal(expected["attention_mask"])
    real = expected["attention_mask"].bool()
    assert prompts["input_ids"][real].equal(expected["input_ids"][real])
    other = ItemCatalog.from_semantic_ids({1: IDS[1], 2: IDS[2]}, TOKENIZER)
    with pytest.raises(ValueError, match="has another catalog than the trainer"):
        GFlowNetTrainer(
            long_context_model(), None, GFlowNetConfig(str(tmp_path), use_cpu=True, loss_type="sft"),
            prompt_encoder=TextPromptEncoder(other, TOKENIZER, TITLES), **options,
        )  # fmt: skip
