"""What makes a language model's folder a recommender: the catalogue, how prompts are made, titles and counts."""

from __future__ import annotations

import json
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
from gflowtrl.catalog.files import write_text

from .prompts import PromptEncoder, PromptFormat


RECOMMENDER_FILE = "recommender_config.json"
DETAILS_FILE = "item_details.json"
TABLE_FILE = "item_prompts.safetensors"


def write_recommender_files(
    directory: str | os.PathLike,
    encoder: PromptEncoder,
    item_counts: Tensor | None = None,
    titles: Mapping[Item, str] | None = None,
) -> None:
    """Write the catalogue, how prompts are made, and where they are known the items' titles and how often each was
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
    """`titles` and `item_counts` of a recommender's folder, those that it has, in the order of its catalogue."""
    file = Path(directory, DETAILS_FILE)
    details = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    for name, values in details.items():
        if len(values) != len(catalog):
            raise ValueError(f"{file} has {name} of {len(values)} items, but the catalogue has {len(catalog)}.")
    found: dict[str, Any] = {}
    if "counts" in details:
        found["item_counts"] = torch.tensor(details["counts"])
    if "titles" in details:
        pairs = zip(catalog.items, details["titles"], strict=True)
        found["titles"] = {item: title for item, title in pairs if title is not None}
    return found


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
    """
    file = Path(directory, RECOMMENDER_FILE)
    if not file.is_file():
        return PromptEncoder(catalog, tokenizer)
    settings = json.loads(file.read_text(encoding="utf-8"))
    if settings["prompt_format"] not in ("plain", "text"):
        raise ValueError(f"{file}: this version knows no prompts of the format {settings['prompt_format']!r}.")
    encoder = PromptEncoder(catalog, tokenizer, settings["max_history_items"])
    if settings["prompt_format"] == "text":
        encoder.head, encoder.tail = settings["head"], settings["tail"]
        encoder.table = load_file(Path(directory, TABLE_FILE))["tokens"].long()
        encoder.format = PromptFormat(**{n: settings[n] for n in PromptFormat.__dataclass_fields__ if n in settings})
        if len(encoder.table) != len(catalog):
            raise ValueError(f"{TABLE_FILE} has {len(encoder.table)} items, but the catalogue has {len(catalog)}.")
    return encoder


def _write_json(file: Path, content: Any) -> None:
    write_text(file, json.dumps(content, indent=2, ensure_ascii=False))
