"""What makes a language model's folder a recommender: the catalog, how prompts are made, titles and counts."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from gflowtrl.catalog import Item, ItemCatalog
from gflowtrl.files import read_json, reading, write_text

from .prompts import PromptEncoder, PromptFormat


RECOMMENDER_FILE = "recommender_config.json"
DETAILS_FILE = "item_details.json"
TABLE_FILE = "item_prompts.safetensors"
RESTORE = "Restore the files that were saved together."


def write_recommender_files(
    directory: str | os.PathLike,
    encoder: PromptEncoder,
    item_counts: Tensor | None = None,
    titles: Mapping[Item, str] | None = None,
) -> None:
    """Write the catalog, how prompts are made, and where they are known the items' titles and how often each was
    taken in training."""
    encoder.catalog.save_pretrained(directory)
    write_encoder(encoder, directory)
    details: dict[str, list] = {}
    if item_counts is not None:
        details["counts"] = item_counts.tolist()
    if titles:
        details["titles"] = [titles.get(item) for item in encoder.catalog.items]
    if details:
        _write_json(Path(directory, DETAILS_FILE), details)


def read_details(directory: str | os.PathLike, catalog: ItemCatalog) -> dict[str, Any]:
    """`titles` and `item_counts` of a recommender's folder, those that it has, in the order of its catalog.

    Raises:
        ValueError: the file is damaged, or of another catalog.
    """
    file = Path(directory, DETAILS_FILE)
    details = _read_settings(file) if file.is_file() else {}
    kinds: dict[str, Any] = {"counts": _is_count, "titles": lambda title: title is None or isinstance(title, str)}
    found: dict[str, Any] = {}
    for name, values in details.items():
        if name not in kinds or not isinstance(values, list):
            raise ValueError(f"{file} holds {name!r}; it must hold lists of counts and titles only. {RESTORE}")
        if len(values) != len(catalog):
            raise ValueError(
                f"{file} has {name} of {len(values)} items, but the catalog has {len(catalog)}. {RESTORE}"
            )
        for item, value in zip(catalog.items, values, strict=True):
            if not kinds[name](value):
                raise ValueError(f"{file} has {value!r} among the {name}, for item {item!r}. {RESTORE}")
    if "counts" in details:
        found["item_counts"] = torch.tensor(details["counts"])
    if "titles" in details:
        pairs = zip(catalog.items, details["titles"], strict=True)
        found["titles"] = {item: title for item, title in pairs if title is not None}
    return found


def _is_count(value: Any) -> bool:
    return type(value) in (int, float) and 0 <= value < math.inf


def write_encoder(encoder: PromptEncoder, directory: str | os.PathLike) -> None:
    """Write `recommender_config.json`, and for text prompts a file of the items' tokens, for `read_encoder`."""
    settings: dict[str, Any] = {"max_history_items": encoder.max_history_items, "prompt_format": "plain"}
    if encoder.format is not None:
        settings |= {"prompt_format": "text", **asdict(encoder.format), "head": encoder.head, "tail": encoder.tail}
        save_file({"tokens": encoder.table.int()}, Path(directory, TABLE_FILE))
    _write_json(Path(directory, RECOMMENDER_FILE), settings)


def read_encoder(
    directory: str | os.PathLike, catalog: ItemCatalog, tokenizer: PreTrainedTokenizerBase
) -> PromptEncoder:
    """The encoder of a saved recommender: the same tokens, whatever the tokenizer has become since.

    It is the plain one where the folder says nothing.

    Raises:
        ValueError: a file is damaged, or of another catalog or tokenizer; the message names it.
    """
    file = Path(directory, RECOMMENDER_FILE)
    if not file.is_file():
        return PromptEncoder(catalog, tokenizer)
    settings = _read_settings(file)
    kind = settings.get("prompt_format")
    if kind not in ("plain", "text"):
        raise ValueError(f"{file}: this version does not know prompts of the format {kind!r}. {RESTORE}")
    needed = ["max_history_items", *(["head", "tail"] if kind == "text" else [])]
    if missing := [name for name in needed if name not in settings]:
        raise ValueError(f"{file} lacks {missing[0]!r}. {RESTORE}")
    try:
        encoder = PromptEncoder(catalog, tokenizer, settings["max_history_items"])
        if kind == "text":
            known = {name: settings[name] for name in PromptFormat.__dataclass_fields__ if name in settings}
            encoder.format = PromptFormat(**known)
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"{file} cannot be used: {error} {RESTORE}") from None
    if kind == "text":
        for name in ("head", "tail"):
            tokens = settings[name]
            if not (isinstance(tokens, list) and all(type(token) is int and token >= 0 for token in tokens)):
                raise ValueError(f"{file}: {name} must be a list of token numbers, but it is {tokens!r}. {RESTORE}")
        encoder.head, encoder.tail = settings["head"], settings["tail"]
        encoder.table = _read_table(Path(directory, TABLE_FILE), encoder)
    if encoder.largest_token >= len(tokenizer):
        raise ValueError(
            f"The prompts of {directory} ({file.name}, {TABLE_FILE}) use token {encoder.largest_token}, but its "
            f"tokenizer has {len(tokenizer)} tokens: they do not belong together. {RESTORE}"
        )
    return encoder


def _read_table(file: Path, encoder: PromptEncoder) -> Tensor:
    """`(items, W)` the tokens of each item in a prompt of words, padded with -1."""
    if not file.is_file():
        raise ValueError(f"{file} is missing, which holds the items' tokens in prompts of words. {RESTORE}")
    with reading(file, "the items' tokens in a .safetensors file"):
        table = load_file(file)["tokens"].long()
    catalog = encoder.catalog
    if table.ndim != 2 or len(table) != len(catalog):
        raise ValueError(
            f"{file} is of shape {tuple(table.shape)}, but the catalog has {len(catalog)} items: one row of tokens "
            f"for each. {RESTORE}"
        )
    if encoder.format is not None and "{semantic_id}" in encoder.format.item:
        ids = catalog.item_token_ids
        within = torch.stack([((table == level[:, None]).any(1)) | (level < 0) for level in ids.T], 1).all(1)
        if not within.all():
            item = catalog.items[int((~within).nonzero()[0])]
            raise ValueError(
                f"{file} does not write item {item!r} with the tokens of its semantic id in catalog.json: they are of "
                f"different saves. {RESTORE}"
            )
    return table


def _read_settings(file: Path) -> dict[str, Any]:
    settings = read_json(file)
    if not isinstance(settings, dict):
        raise ValueError(f"{file} must hold a JSON object. {RESTORE}")
    return settings


def _write_json(file: Path, content: Any) -> None:
    write_text(file, json.dumps(content, indent=2, ensure_ascii=False))
