"""The parts of a trainer (model, tokenizer, catalog, encoder), from arguments or from the folder of a recommender."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from gflowtrl.catalog import Item, ItemCatalog
from gflowtrl.catalog.catalog import CATALOG_FILE
from gflowtrl.checks import check_titles
from gflowtrl.data import PromptEncoder
from gflowtrl.files import read_json
from gflowtrl.policy import load_backbone
from gflowtrl.policy.loading import WHERE, load_tokenizer
from gflowtrl.recommender import read_details, read_encoder

from .tree_policy_config import TreePolicyConfig


def model_kwargs(args: TreePolicyConfig) -> dict[str, Any]:
    """Return `model_init_kwargs`, or an empty dictionary."""
    return args.model_init_kwargs if isinstance(args.model_init_kwargs, dict) else {}


def base_model_kwargs(args: TreePolicyConfig) -> dict[str, Any]:
    """Return the `model_init_kwargs` that are also needed to load the base model of saved adapters."""
    kept = ("trust_remote_code", "cache_dir", "token", "local_files_only")
    return {key: value for key, value in model_kwargs(args).items() if key in kept}


@dataclass(frozen=True)
class Parts:
    """A model with its tokenizer, catalog and encoder. Parts that are not given come from the model's folder."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    catalog: ItemCatalog
    encoder: PromptEncoder
    item_titles: Mapping[Item, str] | None
    item_counts: Tensor | None

    @classmethod
    def resolve(
        cls,
        model: str | PreTrainedModel,
        args: TreePolicyConfig,
        tokenizer: PreTrainedTokenizerBase | None,
        catalog: ItemCatalog | None,
        encoder: PromptEncoder | None,
        item_titles: Mapping[Item, str] | None,
        item_counts: Tensor | None,
    ) -> Parts:
        """Resolve the parts from a trainer's arguments. A name or folder is loaded.

        Raises:
            ValueError: arguments contradict each other or are missing, or a title is not text.
        """
        if isinstance(model, str):
            kwargs = model_kwargs(args)
            where = {key: kwargs[key] for key in (*WHERE, "trust_remote_code") if key in kwargs and key != "subfolder"}
            tokenizer = tokenizer or load_tokenizer(model, **where)
            catalog = catalog or ItemCatalog.from_pretrained(model)
            if encoder is None:
                encoder = read_encoder(model, catalog, tokenizer)
                encoder.max_history_items = args.max_history_items or encoder.max_history_items
            details = folder_details(model, catalog)
            item_titles = details.get("titles") if item_titles is None else item_titles
            item_counts = details.get("item_counts") if item_counts is None else item_counts
            model = load_backbone(model, **kwargs)
        elif args.model_init_kwargs:
            raise ValueError("model_init_kwargs was given, but the model is already loaded. Pass its name or folder.")
        if tokenizer is None or catalog is None:
            raise ValueError("processing_class and catalog are needed unless model is the folder of a recommender.")
        catalog.check_tokenizer(tokenizer)
        if encoder is None:
            encoder = PromptEncoder(catalog, tokenizer, args.max_history_items or 20)
        check_titles(item_titles or {})
        return cls(model, tokenizer, catalog, encoder, item_titles, item_counts)


def folder_details(directory: str, catalog: ItemCatalog) -> dict[str, Any]:
    """Return the `titles` and `item_counts` stored in a folder; nothing if its catalog has other items.

    Raises:
        ValueError: the folder's files have different numbers of items.
    """
    file = Path(directory, CATALOG_FILE)
    if not file.is_file() or read_json(file)["items"] != catalog.items:
        return {}
    return read_details(Path(directory), catalog)
