"""Text prompts for pretrained language models: titles and semantic ids in a text template."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from datasets import Dataset
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerBase

from gflowtrl.catalog import Item, ItemCatalog

from .prompts import IGNORED_LABEL, PromptEncoder, PromptFormat


class TextPromptEncoder(PromptEncoder):
    """Encode histories as text prompts.

    The text before the items, each item, and the text after the items are tokenized separately, once. A prompt is the
    concatenation of these pieces, in training and in decoding.

    Args:
        catalog: the catalog of the items.
        tokenizer: a text tokenizer with the tokens of the semantic ids.
        titles: title of every item; not needed if the `item` of the format has no `{title}`.
        format: format of the prompts.
        max_history_items: number of most recent items of a history that a prompt contains.

    Raises:
        ValueError: if an item has no title, or the format is a chat and the tokenizer has no chat template.
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
        before, after = self._text_around_items(tokenizer)
        self.head = tokenizer(before, add_special_tokens=not self.format.chat)["input_ids"]
        # Some tokenizers append an end token, which must not follow the beginning of a prompt.
        if not self.format.chat and self.head and self.head[-1] == tokenizer.eos_token_id:
            self.head = self.head[:-1]
        self.tail = tokenizer(after, add_special_tokens=False)["input_ids"] if after else []
        texts = tokenizer(self._item_texts(titles or {}), add_special_tokens=False)["input_ids"]
        self.table = pad_sequence([torch.tensor(text, dtype=torch.long) for text in texts], True, -1)

    def _text_around_items(self, tokenizer: PreTrainedTokenizerBase) -> tuple[str, str]:
        text = self.format.template
        if self.format.chat:
            if not tokenizer.chat_template:
                raise ValueError("chat is True, but the tokenizer has no chat template. Set tokenizer.chat_template.")
            contents = {"system": self.format.system, "user": text}
            messages = [{"role": role, "content": words} for role, words in contents.items() if words is not None]
            text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        before, _, after = text.partition("{history}")
        return before, after

    def _item_texts(self, titles: Mapping[Item, str]) -> list[str]:
        template = self.format.item
        if "{title}" in template and self.format.untitled is None:
            untitled = [item for item in self.catalog.history_items if not str(titles.get(item) or "").split()]
            if untitled:
                raise ValueError(
                    f"The prompt has titles, but {len(untitled)} of {len(self.catalog.history_items)} items have "
                    f"none, for example {untitled[0]!r}. Give titles, a replacement as untitled, or an item format "
                    f"without {{title}}."
                )
        texts = []
        for item, tokens in zip(self.catalog.history_items, self.catalog.history_semantic_ids, strict=True):
            words = str(titles.get(item) or "").split() or [self.format.untitled or ""]
            title = " ".join(words[: self.format.max_title_words])
            texts.append(template.replace("{semantic_id}", " ".join(tokens)).replace("{title}", title))
        return texts


def text_sft_dataset(histories: Sequence[Sequence[Item]], targets: Sequence[Item], encoder: PromptEncoder) -> Dataset:
    """Create tokenized rows for TRL's `SFTTrainer`, one per target: the prompt and the target's semantic id as label.

    Decoding follows the prefix tree, so no end token is needed.

    Returns:
        A dataset with the columns `input_ids` and `labels`.
    """
    catalog = encoder.catalog
    ids = catalog.item_token_ids[catalog.index_of(list(targets))]
    columns: dict[str, list[list[int]]] = {"input_ids": [], "labels": []}
    for start in range(0, len(ids), 1024):
        prompts = encoder(histories[start : start + 1024])
        for tokens, mask, answer in zip(prompts["input_ids"], prompts["attention_mask"], ids[start:], strict=False):
            prompt, label = tokens[mask.bool()].tolist(), answer[answer >= 0].tolist()
            columns["input_ids"].append(prompt + label)
            columns["labels"].append([IGNORED_LABEL] * len(prompt) + label)
    return Dataset.from_dict(columns)
