"""Token ids of semantic ids."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import zip_longest
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from gflowtrl.checks import check_type

from .items import Item, check_tokens


if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def ids_of_tokens(semantic_ids: Mapping[Item, Sequence[str]], tokenizer: PreTrainedTokenizerBase) -> dict[str, int]:
    """Return the token id of each token of these ids; check that the tokenizer knows all of them."""
    check_type("semantic_ids", semantic_ids, Mapping, "a dictionary {item: tokens}")
    check_is_tokenizer(tokenizer)
    for item, tokens in semantic_ids.items():
        check_tokens(item, tokens)
    texts = sorted({token for tokens in semantic_ids.values() for token in tokens})
    token_ids = dict(zip(texts, tokenizer.convert_tokens_to_ids(texts), strict=True))
    for item, tokens in semantic_ids.items():
        if not tokens:
            raise ValueError(f"Item {item!r} has an empty semantic id.")
        for token in tokens:
            if token_ids[token] in (None, tokenizer.unk_token_id):
                raise ValueError(
                    f"The tokenizer does not know token {token!r} of item {item!r}. Build it with "
                    f"gflowtrl.data.build_tokenizer or add the tokens with gflowtrl.data.add_item_tokens."
                )
    return token_ids


def pad_ids(semantic_ids: Iterable[Sequence[str]], token_ids: Mapping[str, int]) -> Tensor:
    """Return the token ids of semantic ids, padded with -1 on the right."""
    levels = zip_longest(*([token_ids[token] for token in tokens] for tokens in semantic_ids), fillvalue=-1)
    columns = list(levels)
    return torch.tensor(columns).T.contiguous() if columns else torch.empty((0, 1), dtype=torch.long)


def check_is_tokenizer(tokenizer: object) -> None:
    """Check that an object is a tokenizer; the error is a TypeError."""
    if not hasattr(tokenizer, "convert_tokens_to_ids"):
        raise TypeError(f"tokenizer is of type {type(tokenizer).__name__}; it must be a tokenizer of transformers.")
