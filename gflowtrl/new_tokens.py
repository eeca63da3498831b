"""Tokens that no semantic id had before: which earlier tokens they are like, and their rows in a model's tables."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from gflowtrl.catalog import Item, ItemCatalog
from gflowtrl.compat import carries_adapters
from gflowtrl.semantic_ids import ItemTokenizer


def similar_tokens(
    ids: Mapping[Item, Sequence[str]],
    catalog: ItemCatalog,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Collection[int],
    item_tokenizer: ItemTokenizer | None,
) -> dict[str, list[str]]:
    """Return for each token that needs a row the tokens of its level that are most like it.

    That is the nearest code by its vector (or by its number, in a level that numbers collisions); without an item
    tokenizer, all tokens of the level. A word that prompts contain has its row, which must not change.

    Args:
        ids: the semantic ids of new items.
        catalog: the catalog before.
        tokenizer: its tokenizer.
        prompts: the token ids that prompts contain.
        item_tokenizer: what made the ids.
    """
    tokens, token_ids = catalog.distinct_tokens()
    vocabulary = tokenizer.get_vocab()
    known = set(tokens) | {token for token, number in vocabulary.items() if number in prompts}
    new = {token: level for path in ids.values() for level, token in enumerate(path) if token not in known}
    if not new:
        return {}
    text_of = dict(zip(token_ids, tokens, strict=True))
    levels = [np.unique(column).tolist() for column in catalog.history_token_ids.T.numpy()]
    similar = {}
    for token, level in new.items():
        texts = [text_of[number] for number in levels[min(level, len(levels) - 1)] if number >= 0]
        if item_tokenizer is not None:
            codes = torch.tensor([_code_of(text) for text in texts])
            books, code = item_tokenizer.quantizer.codebooks, _code_of(token)
            vectors = torch.arange(int(codes.max()) + code + 1)[:, None] if level >= len(books) else books[level]
            texts = [texts[int((vectors[codes] - vectors[code]).float().norm(dim=1).argmin())]]
        similar[token] = texts
    return similar


def _code_of(token: str) -> int:
    return int(token.rpartition("_")[2].removesuffix(">"))


def check_growth(model: nn.Module) -> None:
    """Check that the tables of a model can get rows for new tokens.

    Raises:
        ValueError: the model is quantized, or has adapters: theirs may be around the tables, and a save of adapters
            alone has no rows of the base model.
    """
    if getattr(model, "hf_quantizer", None) is not None:
        raise ValueError("The new items need new tokens, which a quantized model cannot get. Load it unquantized.")
    if isinstance(model, PeftModel) or carries_adapters(model):
        raise ValueError(
            "The new items need new tokens, which a model with adapters cannot get. Merge the adapters first: save "
            "the recommender and load it again."
        )


@torch.no_grad()
def add_token_rows(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, similar_tokens: Mapping[str, Sequence[str]]
) -> None:
    """Give new tokens rows in the model's tables, in place: the means of the rows of similar tokens.

    The modules stay the same objects, so policies of this model keep working. Rows of other tokens do not change.
    """
    head: Any = model.get_output_embeddings()
    if len(tokenizer) > model.get_input_embeddings().num_embeddings:
        model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
        larger: Any = model.get_output_embeddings()
        if larger is not head:
            head.weight, head.out_features = larger.weight, larger.out_features
            if larger.bias is not None:
                head.bias = larger.bias
            model.set_output_embeddings(head)
    tables = [model.get_input_embeddings().weight, head.weight, getattr(head, "bias", None)]
    for table in dict.fromkeys(table for table in tables if table is not None):  # one table if they are tied
        for token, similar in similar_tokens.items():
            rows = tokenizer.convert_tokens_to_ids(list(similar))
            table[tokenizer.convert_tokens_to_ids(token)] = table[rows].float().mean(0).to(table)
