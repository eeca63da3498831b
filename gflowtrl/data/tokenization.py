"""Tokenizers that know the tokens of semantic ids."""

import re
from collections.abc import Mapping, Sequence

import torch
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers
from transformers import PreTrainedModel, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from gflowtrl.catalog import Item


PAD, BOS, EOS = "<pad>", "<bos>", "<eos>"


def build_tokenizer(semantic_ids: Mapping[Item, Sequence[str]]) -> PreTrainedTokenizerFast:
    """A word-level tokenizer of nothing but `<pad>`, `<bos>`, `<eos>` and the tokens of these ids.

    Words are split at white space. There is no unknown token: any other word is an error. Item tokens are ordinary
    tokens, sorted by the level at which they occur and then by their number.

    Raises:
        ValueError: if a token is empty, has white space in it, or is one of the three special ones.
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
    """Add the tokens of these ids to any tokenizer, as ordinary tokens, and make room for them in `model`.

    Special tokens would vanish when a completion is decoded. Tokens that are there already are left alone. The
    embedding matrix is only ever enlarged: many models have spare rows.

    Args:
        tokenizer: gets the tokens.
        semantic_ids: the tokens of each item.
        model: gets embeddings for them, at input and output. transformers draws them from the distribution of those
            that are there, unless titles are given.
        titles: new tokens begin near the words of the titles of the items that have them: the mean over these words,
            centered over the tokens of a level and as large as the embeddings of the vocabulary.

    Returns:
        The number of tokens added.

    Raises:
        ValueError: if the ids do not survive a round trip through the tokenizer.
    """
    known = tokenizer.get_vocab()
    new = [token for token in _item_tokens(semantic_ids) if token not in known]
    # lstrip: the space between two item tokens belongs to the second and is no token of its own
    added = tokenizer.add_tokens([AddedToken(token, lstrip=True, normalized=False, special=False) for token in new])
    if model is not None and len(tokenizer) > model.get_input_embeddings().num_embeddings:
        model.resize_token_embeddings(len(tokenizer))
    check_round_trip(tokenizer, semantic_ids)
    if model is not None and titles is not None and new:
        _begin_near_titles(model, tokenizer, semantic_ids, titles, set(new))
    return added


@torch.no_grad()
def _begin_near_titles(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    semantic_ids: Mapping[Item, Sequence[str]],
    titles: Mapping[Item, str],
    new: set[str],
) -> None:
    """See `add_item_tokens`; items without a title do not count."""
    items = [item for item in semantic_ids if str(titles.get(item) or "").split()]
    words = tokenizer([f" {titles[item]}" for item in items], add_special_tokens=False)["input_ids"]
    embeddings = (model.get_input_embeddings().weight, model.get_output_embeddings().weight)
    for table in dict.fromkeys(embeddings):  # one where they are tied
        vocabulary = torch.ones(len(table), dtype=torch.bool)
        vocabulary[[tokenizer.convert_tokens_to_ids(token) for token in new]] = False
        vocabulary[len(tokenizer) :] = False
        known = table[vocabulary.to(table.device)].float()
        means = torch.stack([table[row].float().mean(0) for row in words])
        for level in range(max(map(len, semantic_ids.values()))):
            holders: dict[str, list[int]] = {}
            for row, item in enumerate(items):
                if level < len(semantic_ids[item]) and semantic_ids[item][level] in new:
                    holders.setdefault(semantic_ids[item][level], []).append(row)
            if not holders:
                continue
            near = torch.stack([means[rows].mean(0) for rows in holders.values()])
            near = near - near.mean(0)
            near = near * (known.std(0).norm() / near.norm(dim=1).mean().clamp(min=1e-6)) + known.mean(0)
            table[[tokenizer.convert_tokens_to_ids(token) for token in holders]] = near.to(table)


def check_round_trip(tokenizer: PreTrainedTokenizerBase, semantic_ids: Mapping[Item, Sequence[str]]) -> None:
    """Check for every item that its tokens, joined by spaces, become one id each and come back unchanged.

    Raises:
        ValueError: naming the first item for which text -> ids -> text is not the identity.
    """
    known = tokenizer.get_vocab()
    special = set(tokenizer.all_special_tokens)
    for item, tokens in semantic_ids.items():
        for token in tokens:
            if token not in known or token in special:
                what = "a special token, which decoding drops" if token in special else "no token of the tokenizer"
                raise ValueError(f"Item {item!r}: {token!r} is {what}. Call add_item_tokens or build_tokenizer.")
    texts = [" ".join(tokens) for tokens in semantic_ids.values()]
    encoded = tokenizer(texts, add_special_tokens=False)["input_ids"] if texts else []
    decoded = tokenizer.batch_decode(encoded, skip_special_tokens=True)
    for (item, tokens), text, ids, back in zip(semantic_ids.items(), texts, encoded, decoded, strict=True):
        if ids != [known[token] for token in tokens] or "".join(back.split()) != "".join(tokens):
            raise ValueError(
                f"Item {item!r}: {text!r} becomes the tokens {tokenizer.convert_ids_to_tokens(ids)} and the text "
                f"{back!r}. Every token of a semantic id must be one token of the tokenizer: call add_item_tokens."
            )


def _item_tokens(semantic_ids: Mapping[Item, Sequence[str]]) -> list[str]:
    """All tokens, by the first level at which they occur, then in natural order (`<a_2>` before `<a_10>`)."""
    level_of: dict[str, int] = {}
    for item, tokens in semantic_ids.items():
        for level, token in enumerate(tokens):
            if token in (PAD, BOS, EOS) or token.split() != [token]:
                raise ValueError(
                    f"Item {item!r} has the token {token!r}. A token must be a word without white space, and not one "
                    f"of {PAD}, {BOS}, {EOS}."
                )
            level_of[token] = min(level, level_of.get(token, level))
    return sorted(level_of, key=lambda token: (level_of[token], _natural(token), token))


def _natural(token: str) -> list[tuple[int, str]]:
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", token)]
