import pytest
import torch
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st

from gflowtrl.catalog import ItemCatalog
from gflowtrl.data import (
    GroupCollator,
    PromptEncoder,
    RowWindows,
    TargetCollator,
    build_tokenizer,
    leave_one_out,
    sft_dataset,
    user_windows,
)
from gflowtrl.trunks import separate_prompts


IDS = {1: ("<a_0>", "<b_0>", "<c_0>"), 2: ("<a_1>",), 3: ("<a_2>", "<b_0>"), 4: ("<a_1>",)}
TOKENIZER = build_tokenizer(IDS)
CATALOG = ItemCatalog.from_semantic_ids(IDS, TOKENIZER)

histories_of_users = st.lists(st.lists(st.sampled_from(list(IDS)), min_size=1, max_size=6), min_size=1, max_size=5)


@settings(max_examples=60, deadline=None)
@given(histories_of_users, st.integers(1, 4), st.booleans())
def test_prompts_equal_the_tokenized_text(histories, max_items, with_bos):
    """Oracle: the tokenizer on the text of the last items, with ids of different lengths and left padding."""
    tokenizer = build_tokenizer(IDS)
    if not with_bos:
        tokenizer.bos_token = None
    encoder = PromptEncoder(CATALOG, tokenizer, max_items)
    texts = [" ".join(token for item in history[-max_items:] for token in IDS[item]) for history in histories]
    texts = [f"<bos> {text}" if with_bos else text for text in texts]
    expected = TOKENIZER(texts, add_special_tokens=False, padding=True, return_tensors="pt")
    prompts = encoder(histories)
    assert prompts["input_ids"].equal(expected["input_ids"]) and prompts["input_ids"].dtype == torch.long
    assert prompts["attention_mask"].equal(expected["attention_mask"])


def test_padding_falls_back_and_is_masked():
    tokenizer = build_tokenizer(IDS)
    tokenizer.pad_token = None
    prompts = PromptEncoder(CATALOG, tokenizer)([[2], [1]])
    assert prompts["input_ids"][0, :2].tolist() == [tokenizer.eos_token_id] * 2
    assert prompts["attention_mask"].tolist() == [[0, 0, 1, 1], [1, 1, 1, 1]]


@pytest.mark.parametrize(
    ("histories", "message"),
    [
        ([], "no history to encode"),
        ([[1], []], "history in row 1 is empty"),
        ([[1], [2, 77, 1]], "history in row 1 cannot be read. Item 77 is not in the catalog"),
    ],
)
def test_bad_histories_are_named(histories, message):
    with pytest.raises(ValueError, match=message):
        PromptEncoder(CATALOG, TOKENIZER)(histories)


def test_collator_keeps_every_column(small_shop):
    data, _ = small_shop
    tokenizer = build_tokenizer(data.semantic_ids)
    encoder = PromptEncoder(ItemCatalog.from_semantic_ids(data.semantic_ids, tokenizer), tokenizer)
    rows = leave_one_out(data).train.to_list()[:3]
    batch = GroupCollator(encoder)(rows)
    assert batch.keys() == {"prompts", "row_ids", "rows"} and batch["rows"].columns.keys() == rows[0].keys()
    assert batch["row_ids"].tolist() == [row["row_id"] for row in rows] and batch["row_ids"].dtype == torch.long
    for column in ("user", "history", "target", "session_items", "session_levels"):
        assert batch["rows"].columns[column] == [row[column] for row in rows]
    expected = encoder([row["history"] for row in rows])
    assert all(batch["prompts"][name].equal(expected[name]) for name in expected)
    with pytest.raises(ValueError, match="no column 'row_id'.*remove_unused_columns=False"):
        GroupCollator(encoder)([{"history": [1], "target": 2}])


@settings(max_examples=60, deadline=None)
@given(histories_of_users, st.integers(1, 3))
def test_sft_rows_are_prompts_whose_labels_are_the_new_targets(sequences, max_items):
    windows = user_windows(sequences, max_items)
    if not windows:
        with pytest.raises(ValueError, match="nothing to predict"):
            sft_dataset(sequences, CATALOG, TOKENIZER, max_items)
        return
    rows = sft_dataset(sequences, CATALOG, TOKENIZER, max_items).to_list()
    encoder = PromptEncoder(CATALOG, TOKENIZER, max_items + 1)
    for row, (items, first_target) in zip(rows, windows, strict=True):
        assert row["input_ids"] == encoder([items])["input_ids"][0].tolist()
        context = 1 + sum(len(IDS[item]) for item in items[:first_target])
        assert row["labels"] == [-100] * context + row["input_ids"][context:]
    learned = sum(label >= 0 for row in rows for label in row["labels"])
    assert learned == sum(len(IDS[item]) for sequence in sequences for item in sequence[1:])


def test_shared_prompts_equal_separate_prompts():
    """Prompts contain the items of their windows and are the same as prefixes of trunks and in separate rows."""
    sequences = [[1, 2, 3, 2, 2], [3, 3, 1], [1, 3]]
    rows = [{"user": u, "history": s[:p], "target": s[p]} for u, s in enumerate(sequences) for p in range(1, len(s))]
    rows = [{"row_id": 7 + i, **row} for i, row in enumerate(rows)]
    encoder = PromptEncoder(CATALOG, TOKENIZER, max_history_items=2)
    seen = RowWindows.of(Dataset.from_list(rows), CATALOG.items, 2)
    mixed = [rows[i] for i in (3, 5, 0, 6, 2, 4, 1)]
    shared, separate = (GroupCollator(encoder, seen, share)(mixed) for share in (True, False))
    assert separate["rows"].windows.histories == shared["rows"].windows.histories
    assert shared["rows"].windows.histories == [[3, 2], [3, 3], [1], [1], [2, 3], [3], [1, 2]]
    assert len(shared["prompts"]["input_ids"]) == len(shared["rows"].windows.items) == 5
    unpacked = separate_prompts(shared["prompts"])
    assert unpacked["attention_mask"].equal(separate["prompts"]["attention_mask"])
    assert (unpacked["input_ids"] * unpacked["attention_mask"]).equal(
        separate["prompts"]["input_ids"] * unpacked["attention_mask"]
    )
    # A trunk includes the last target, which is scored on it, without the last token, which is not needed.
    trunks = shared["prompts"]["input_ids"].tolist(), shared["prompts"]["attention_mask"].bool().tolist()
    unpadded = [[t for t, real in zip(*trunk, strict=True) if real] for trunk in zip(*trunks, strict=True)]
    for tokens, items in zip(unpadded, shared["rows"].windows.items, strict=True):
        whole = PromptEncoder(CATALOG, TOKENIZER)([items])["input_ids"][0].tolist()
        assert tokens == whole[:-1]
    with pytest.raises(KeyError, match="no row 3 in the training data"):
        GroupCollator(encoder, seen)([{**rows[0], "row_id": 3}])


def test_targets_of_encoder_decoders_are_right_padded():
    encoder = PromptEncoder(CATALOG, TOKENIZER)
    batch = TargetCollator(encoder)([{"history": [3], "target": 2}, {"history": [2, 2], "target": 1}])
    first, whole = (TOKENIZER.convert_tokens_to_ids(list(IDS[item])) for item in (2, 1))
    assert batch["labels"].tolist() == [[*first, -100, -100], whole]
    assert batch["input_ids"].equal(encoder([[3], [2, 2]])["input_ids"])


def test_the_longest_histories_contain_the_longest_items():
    """Four of twelve ids have three tokens, the others two; no item occurs twice while there are enough."""
    ids = {i: (f"<a_{i}>", f"<b_{i}>") if i % 3 else (f"<a_{i}>", f"<b_{i}>", f"<c_{i}>") for i in range(12)}
    tokenizer = build_tokenizer(ids)
    catalog = ItemCatalog.from_semantic_ids(ids, tokenizer)
    for count in (1, 4, 12, 20):
        encoder = PromptEncoder(catalog, tokenizer, max_history_items=count)
        histories = encoder.longest_histories()
        assert [len(history) for history in histories] == [count, 1]
        assert len(set(histories[0])) == min(count, 12)
        assert encoder.max_length == {1: 4, 4: 13, 12: 29, 20: 29 + 4 * 3 + 4 * 2}[count]
        if count <= 4:
            assert encoder(histories)["input_ids"].shape == (2, encoder.max_length)
