"""Tokenizers with the tokens of semantic ids."""

import re
from collections.abc import Mapping, Sequence

import torch
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers
from transformers import PreTrainedModel, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from gflowtrl.catalog import Item
from gflowtrl.catalog.items import check_tokens
from gflowtrl.checks import check_text, check_type


PAD, BOS, EOS = "<pad>", "<bos>", "<eos>"


def build_tokenizer(semantic_ids: Mapping[Item, Sequence[str]]) -> PreTrainedTokenizerFast:
    """Build a word-level tokenizer with only `<pad>`, `<bos>`, `<eos>` and the tokens of these ids.

    Words are split at whitespace. There is no unknown token: any other word is an error. Item tokens are ordinary (not
    special) tokens, sorted by the level at which they first occur and then by their number.

    Raises:
        ValueError: if a token is empty, contains whitespace, or is one of the three special tokens.
    """
    words = [PAD, BOS, EOS, *_item_tokens(semantic_ids)]
    core = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token=PAD,
        bos_token=BOS,
        eos_token=EOS,
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )
    check_round_trip(tokenizer, semantic_ids)
    return tokenizer


def add_item_tokens(
    tokenizer: PreTrainedTokenizerBase,
    semantic_ids: Mapping[Item, Sequence[str]],
    model: PreTrainedModel | None = None,
    titles: Mapping[Item, str] | None = None,
) -> int:
    """Add the tokens of these ids to a tokenizer, as ordinary tokens, and resize the embeddings of `model`.

    Special tokens would be dropped when a completion is decoded. Existing tokens are not changed. The embedding matrix
    is only enlarged, never shrunk, because many models have spare rows.

    Args:
        tokenizer: the tokenizer to extend.
        semantic_ids: the tokens of each item.
        model: the model whose input and output embeddings are extended. transformers draws new embeddings from the
            distribution of the existing ones, unless titles are given.
        titles: item titles. A new token is initialized with the mean embedding of the title words of its items,
            centered over the tokens of its level and scaled to the size of the vocabulary's embeddings.

    Returns:
        The number of tokens added.

    Raises:
        ValueError: if the ids do not survive a round trip through the tokenizer.
    """
    known = tokenizer.get_vocab()
    new = [token for token in _item_tokens(semantic_ids) if token not in known]
    # lstrip: the space between two item tokens belongs to the second one and is not a token of its own
    added = tokenizer.add_tokens([AddedToken(token, lstrip=True, normalized=False, special=False) for token in new])
    if model is not None and len(tokenizer) > model.get_input_embeddings().num_embeddings:
        model.resize_token_embeddings(len(tokenizer))
    check_round_trip(tokenizer, semantic_ids)
    if model is not None and titles is not None and new:
        _initialize_from_titles(model, tokenizer, semantic_ids, titles, set(new))
    return added


@torch.no_grad()
def _initialize_from_titles(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    semantic_ids: Mapping[Item, Sequence[str]],
    titles: Mapping[Item, str],
    new: set[str],
) -> None:
    """Initialize new tokens from titles, as `add_item_tokens` describes; items without a title do not count."""
    items = [item for item in semantic_ids if str(titles.get(item) or "").split()]
    words = tokenizer([f" {titles[item]}" for item in items], add_special_tokens=False)["input_ids"]
    embeddings = (model.get_input_embeddings().weight, model.get_output_embeddings().weight)
    for table in dict.fromkeys(embeddings):  # one table if they are tied
        vocabulary = torch.ones(len(table), dtype=torch.bool)
        vocabulary[tokenizer.convert_tokens_to_ids(list(new))] = False
        vocabulary[len(tokenizer) :] = False
        known = table[vocabulary.to(table.device)].float()
        means = torch.stack([table[row].float().mean(0) for row in words])
        for level in range(max(map(len, semantic_ids.values()))):
            rows_of: dict[str, list[int]] = {}  # new tokens of this level -> items that have them
            for row, item in enumerate(items):
                if level < len(semantic_ids[item]) and semantic_ids[item][level] in new:
                    rows_of.setdefault(semantic_ids[item][level], []).append(row)
            if not rows_of:
                continue
            initial = torch.stack([means[rows].mean(0) for rows in rows_of.values()])
            initial = initial - initial.mean(0)
            initial = initial * (known.std(0).norm() / initial.norm(dim=1).mean().clamp(min=1e-6)) + known.mean(0)
            table[tokenizer.convert_tokens_to_ids(list(rows_of))] = initial.to(table)


def check_round_trip(tokenizer: PreTrainedTokenizerBase, semantic_ids: Mapping[Item, Sequence[str]]) -> None:
    """Check for every item that each of its tokens, joined by spaces, becomes one token id and decodes unchanged.

    Raises:
        ValueError: for the first item whose text -> ids -> text is not the identity; the message names it.
    """
    check_type("tokenizer", tokenizer, PreTrainedTokenizerBase, "a tokenizer of transformers")
    check_type("semantic_ids", semantic_ids, Mapping, "a dictionary {item: tokens}")
    known = tokenizer.get_vocab()
    special = set(tokenizer.all_special_tokens)
    for item, tokens in semantic_ids.items():
        check_tokens(item, tokens)
        for token in tokens:
            if token not in known or token in special:
                what = "a special token, which decoding drops" if token in special else "not a token of the tokenizer"
                raise ValueError(f"Item {item!r}: {token!r} is {what}. Call add_item_tokens or build_tokenizer.")
    if not semantic_ids:  # transformers before 5.18 decode an empty list to one text
        return
    texts = [" ".join(tokens) for tokens in semantic_ids.values()]
    encoded = tokenizer(texts, add_special_tokens=False)["input_ids"]
    decoded = tokenizer.batch_decode(encoded, skip_special_tokens=True)
    for (item, tokens), text, ids, output in zip(semantic_ids.items(), texts, encoded, decoded, strict=True):
        if ids != [known[token] for token in tokens] or "".join(output.split()) != "".join(tokens):
            raise ValueError(
                f"Item {item!r}: {text!r} becomes the tokens {tokenizer.convert_ids_to_tokens(ids)} and the text "
                f"{output!r}. Every token of a semantic id must be one token of the tokenizer. Call add_item_tokens."
            )


def _item_tokens(semantic_ids: Mapping[Item, Sequence[str]]) -> list[str]:
    """Sort all tokens by the first level at which they occur, then in natural order (`<a_2>` before `<a_10>`)."""
    level_of: dict[str, int] = {}
    check_type("semantic_ids", semantic_ids, Mapping, "a dictionary {item: tokens}")
    for item, tokens in semantic_ids.items():
        check_tokens(item, tokens)
        for level, token in enumerate(tokens):
            check_text(f"A token of item {item!r}", token)
            if token in (PAD, BOS, EOS) or token.split() != [token]:
                raise ValueError(
                    f"Item {item!r} has the token {token!r}. A token must be a word without whitespace, other than "
                    f"{PAD}, {BOS} and {EOS}."
                )
            level_of[token] = min(level, level_of.get(token, level))
    return sorted(level_of, key=lambda token: (level_of[token], _natural(token), token))


def _natural(token: str) -> list[tuple[int, str]]:
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", token)]
