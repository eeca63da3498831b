"""Prompts in words, for language models that have read some: titles and semantic ids in a text template."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from datasets import Dataset
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerBase

from gflowtrl.catalog import Item, ItemCatalog

from .prompts import IGNORED_LABEL, PromptEncoder, PromptFormat


class TextPromptEncoder(PromptEncoder):
    """Turns histories into prompts of words.

    What stands before the items, each item, and what stands behind them are tokenized apart, once: a prompt is these
    pieces end to end, in training as in decoding.

    Args:
        catalog: the items.
        tokenizer: knows words and the tokens of the ids.
        titles: of every item; not needed where the format's `item` has none.
        format: the text around them.
        max_history_items: how many items of a history, the last ones, are used.

    Raises:
        ValueError: an item without a title, or a tokenizer without a chat template for a chat.
    """

    def __init__(
        self,
        catalog: ItemCatalog,
        tokenizer: PreTrainedTokenizerBase,
        titles: Mapping[Item, str] | None = None,
        format: PromptFormat | None = None,
        max_history_items: int = 20,
    ):
        super().__init__(catalog, tokenizer, max_history_items)
        self.format = PromptFormat() if format is None else format
        before, behind = self._surroundings(tokenizer)
        self.head = tokenizer(before, add_special_tokens=not self.format.chat)["input_ids"]
        # A tokenizer that ends a text with a special token would end the prompt's beginning.
        if not self.format.chat and self.head and self.head[-1] == tokenizer.eos_token_id:
            self.head = self.head[:-1]
        self.tail = tokenizer(behind, add_special_tokens=False)["input_ids"] if behind else []
        texts = tokenizer(self._item_texts(titles or {}), add_special_tokens=False)["input_ids"]
        self.table = pad_sequence([torch.tensor(text, dtype=torch.long) for text in texts], True, -1)

    def _surroundings(self, tokenizer: PreTrainedTokenizerBase) -> tuple[str, str]:
        text = self.format.template
        if self.format.chat:
            if not tokenizer.chat_template:
                raise ValueError("chat is True, but the tokenizer has no chat template; set tokenizer.chat_template.")
            said = {"system": self.format.system, "user": text}
            messages = [{"role": role, "content": words} for role, words in said.items() if words is not None]
            text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        before, _, behind = text.partition("{history}")
        return before, behind

    def _item_texts(self, titles: Mapping[Item, str]) -> list[str]:
        form = self.format.item
        if "{title}" in form and self.format.untitled is None:
            bare = [item for item in self.catalog.items if not str(titles.get(item) or "").split()]
            if bare:
                raise ValueError(
                    f"The prompt holds titles, but {len(bare)} of {len(self.catalog)} items have none, for example "
                    f"{bare[0]!r}. Give titles, a text for them as untitled, or an item format without {{title}}."
                )
        texts = []
        for item, tokens in zip(self.catalog.items, self.catalog.semantic_ids, strict=True):
            words = str(titles.get(item) or "").split() or [self.format.untitled or ""]
            title = " ".join(words[: self.format.max_title_words])
            texts.append(form.replace("{semantic_id}", " ".join(tokens)).replace("{title}", title))
        return texts


def text_sft_dataset(histories: Sequence[Sequence[Item]], targets: Sequence[Item], encoder: PromptEncoder) -> Dataset:
    """Rows for TRL's `SFTTrainer`, already tokenized, one a target: the prompt, and the target's id to be learned.

    As ids are read on the tree of items, no end token is needed.

    Returns:
        A dataset with the columns `input_ids` and `labels`.
    """
    catalog = encoder.catalog
    ids = catalog.item_token_ids[catalog.index_of(list(targets))]
    columns: dict[str, list[list[int]]] = {"input_ids": [], "labels": []}
    for start in range(0, len(ids), 1024):
        prompts = encoder(histories[start : start + 1024])
        for tokens, mask, answer in zip(prompts["input_ids"], prompts["attention_mask"], ids[start:], strict=False):
            prompt, written = tokens[mask.bool()].tolist(), answer[answer >= 0].tolist()
            columns["input_ids"].append(prompt + written)
            columns["labels"].append([IGNORED_LABEL] * len(prompt) + written)
    return Dataset.from_dict(columns)
