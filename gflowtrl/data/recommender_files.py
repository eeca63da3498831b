"""Files that turn a language model's folder into a recommender: catalog, prompt settings, titles and item counts."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from gflowtrl.catalog import Item, ItemCatalog
from gflowtrl.files import is_entry, read_object, read_tensors, reading, write_text

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
    """Write the catalog and the prompt settings and, if given, the titles and training counts of the items.

    Counts are in the order of `catalog.history_items`; those of retired items are 0 if they are missing.
    """
    items = encoder.catalog.history_items
    encoder.catalog.save_pretrained(directory)
    write_encoder(encoder, directory)
    details: dict[str, list] = {}
    if item_counts is not None:
        details["counts"] = item_counts.tolist() + [0] * (len(items) - len(item_counts))
    if titles:
        details["titles"] = [titles.get(item) for item in items]
    if details:
        write_text(Path(directory, DETAILS_FILE), json.dumps(details, indent=2, ensure_ascii=False))


def read_details(directory: str | os.PathLike, catalog: ItemCatalog) -> dict[str, Any]:
    """Read those of `titles` and `item_counts` that a recommender's folder has, in the order of `history_items`.

    Raises:
        ValueError: if the file is damaged or belongs to another catalog.
    """
    file = Path(directory, DETAILS_FILE)
    details = read_object(file) if is_entry(file) else {}
    is_valid: dict[str, Any] = {"counts": _is_count, "titles": lambda title: title is None or isinstance(title, str)}
    result: dict[str, Any] = {}
    for name, values in details.items():
        if name not in is_valid or not isinstance(values, list):
            raise ValueError(f"{file} contains {name!r}; it may contain only lists of counts and titles. {RESTORE}")
        if len(values) != len(catalog.history_items):
            raise ValueError(
                f"{file} has {name} for {len(values)} items, but the catalog has {len(catalog.history_items)}. "
                f"{RESTORE}"
            )
        for item, value in zip(catalog.history_items, values, strict=True):
            if not is_valid[name](value):
                raise ValueError(f"{file} has the invalid value {value!r} in {name} for item {item!r}. {RESTORE}")
    if "counts" in details:
        result["item_counts"] = torch.tensor(details["counts"])
    if "titles" in details:
        pairs = zip(catalog.history_items, details["titles"], strict=True)
        result["titles"] = {item: title for item, title in pairs if title is not None}
    return result


def _is_count(value: Any) -> bool:
    return type(value) in (int, float) and 0 <= value < math.inf


def write_encoder(encoder: PromptEncoder, directory: str | os.PathLike) -> None:
    """Write `recommender_config.json` and, for text prompts, the tokens of the items, for `read_encoder`."""
    settings: dict[str, Any] = {"max_history_items": encoder.max_history_items, "prompt_format": "plain"}
    if encoder.format is not None:
        settings |= {"prompt_format": "text", **asdict(encoder.format), "head": encoder.head, "tail": encoder.tail}
        save_file({"tokens": encoder.table.int()}, Path(directory, TABLE_FILE))
    write_text(Path(directory, RECOMMENDER_FILE), json.dumps(settings, indent=2, ensure_ascii=False))


def read_encoder(
    directory: str | os.PathLike, catalog: ItemCatalog, tokenizer: PreTrainedTokenizerBase
) -> PromptEncoder:
    """Load the prompt encoder of a saved recommender, with the saved tokens even if the tokenizer has changed since.

    A folder without `recommender_config.json` gets an encoder of plain prompts.

    Raises:
        ValueError: if a file is damaged, or belongs to another catalog or tokenizer; the message names it.
    """
    file = Path(directory, RECOMMENDER_FILE)
    if not is_entry(file):
        return PromptEncoder(catalog, tokenizer)
    settings = read_object(file)
    kind = settings.get("prompt_format")
    if kind not in ("plain", "text"):
        raise ValueError(f"{file}: prompt_format is {kind!r}; this version knows 'plain' and 'text'. {RESTORE}")
    required = ["max_history_items", *(["head", "tail"] if kind == "text" else [])]
    if missing := [name for name in required if name not in settings]:
        raise ValueError(f"{file} lacks {missing[0]!r}. {RESTORE}")
    try:
        encoder = PromptEncoder(catalog, tokenizer, settings["max_history_items"])
        if kind == "text":
            fields = {name: settings[name] for name in PromptFormat.__dataclass_fields__ if name in settings}
            encoder.format = PromptFormat(**fields)
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"{file} cannot be used: {error} {RESTORE}") from None
    if kind == "text":
        for name in ("head", "tail"):
            tokens = settings[name]
            if not (isinstance(tokens, list) and all(type(token) is int and token >= 0 for token in tokens)):
                raise ValueError(f"{file}: {name} must be a list of token ids, but it is {tokens!r}. {RESTORE}")
        encoder.head, encoder.tail = settings["head"], settings["tail"]
        encoder.table = _read_table(Path(directory, TABLE_FILE), encoder)
    if encoder.largest_token >= len(tokenizer):
        raise ValueError(
            f"The prompts of {directory} ({file.name}, {TABLE_FILE}) use token {encoder.largest_token}, but its "
            f"tokenizer has {len(tokenizer)} tokens, so they do not belong together. {RESTORE}"
        )
    return encoder


def _read_table(file: Path, encoder: PromptEncoder) -> Tensor:
    """Read the tokens of each item in a text prompt, `(history items, W)`, right-padded with -1."""
    if not file.is_file():
        raise ValueError(f"{file} is missing; it contains the tokens of the items in text prompts. {RESTORE}")
    with reading(file, "the items' tokens in a .safetensors file"):
        table = read_tensors(file)["tokens"].long()
    catalog = encoder.catalog
    if table.ndim != 2 or len(table) != (count := len(catalog.history_items)):
        raise ValueError(
            f"{file} has the shape {tuple(table.shape)}; it must have one row for each of the {count} items "
            f"of the catalog. {RESTORE}"
        )
    if encoder.format is not None and "{semantic_id}" in encoder.format.item:
        ids = catalog.history_token_ids
        matches = torch.stack([((table == level[:, None]).any(1)) | (level < 0) for level in ids.T], 1).all(1)
        if not matches.all():
            item = catalog.history_items[int((~matches).nonzero()[0])]
            raise ValueError(
                f"{file} does not contain the tokens of the semantic id of item {item!r} in catalog.json. The two "
                f"files come from different saves. {RESTORE}"
            )
    return table
