"""The parts of a trainer (model, tokenizer, catalog, encoder), from arguments or from the folder of a recommender."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from peft import PeftConfig
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from gflowtrl.catalog import Item, ItemCatalog
from gflowtrl.catalog.catalog import CATALOG_FILE
from gflowtrl.checks import check_titles
from gflowtrl.data import PromptEncoder
from gflowtrl.data.recommender_files import read_details, read_encoder
from gflowtrl.files import read_json
from gflowtrl.policy import load_backbone
from gflowtrl.policy.loading import load_tokenizer, tokenizer_kwargs

from .tree_policy_config import TreePolicyConfig


def model_kwargs(args: TreePolicyConfig) -> dict[str, Any]:
    """Return `model_init_kwargs`, or an empty dictionary."""
    return args.model_init_kwargs if isinstance(args.model_init_kwargs, dict) else {}


def base_model_kwargs(args: TreePolicyConfig) -> dict[str, Any]:
    """Return the `model_init_kwargs` that are also needed to load the base model of saved adapters."""
    kept = ("trust_remote_code", "cache_dir", "token", "local_files_only")
    return {key: value for key, value in model_kwargs(args).items() if key in kept}


@dataclass(frozen=True)
class Given:
    """What the constructor got to make the trained model, its sampler and its objective from."""

    tokenizer: PreTrainedTokenizerBase | None
    catalog: ItemCatalog | None
    encoder: PromptEncoder | None
    item_titles: Mapping[Item, str] | None
    item_counts: Tensor | None
    sampler: Any
    peft_config: PeftConfig | None
    quantization_config: Any

    def with_parts(self, parts: Parts) -> Given:
        """Return a copy with the tokenizer, catalog and encoder of the first model, which all later ones share."""
        return replace(
            self, tokenizer=parts.tokenizer, catalog=parts.catalog, encoder=parts.encoder,
            item_titles=parts.item_titles, item_counts=parts.item_counts,
        )  # fmt: skip

    def new_sampler(self) -> Any:
        """Return the sampler's specification, of which a sampler object is a copy: a training changes its state."""
        return copy.deepcopy(self.sampler)


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
    def resolve(cls, model: str | PreTrainedModel, args: TreePolicyConfig, given: Given) -> Parts:
        """Resolve the parts from a trainer's arguments. A name or folder is loaded.

        Args:
            model: the model, its name or its folder. A model that was loaded from a folder finds the rest there too.
            args: the configuration.
            given: the other arguments.

        Raises:
            ValueError: arguments contradict each other or are missing, or a title is not text.
        """
        tokenizer, catalog, encoder = given.tokenizer, given.catalog, given.encoder
        item_titles, item_counts = given.item_titles, given.item_counts
        kwargs, folder = loading_kwargs(model, args, given.quantization_config), source_folder(model)
        if folder is not None:
            tokenizer = tokenizer or load_tokenizer(folder, **tokenizer_kwargs(kwargs))
            catalog = catalog or ItemCatalog.from_pretrained(folder)
            # A model object may get another catalog, which the folder's prompts do not belong to.
            if encoder is None and (isinstance(model, str) or _has_items(folder, catalog)):
                encoder = read_encoder(folder, catalog, tokenizer)
                encoder.max_history_items = args.max_history_items or encoder.max_history_items
            details = folder_details(folder, catalog)
            item_titles = details.get("titles") if item_titles is None else item_titles
            if item_counts is None and "item_counts" in details:
                item_counts = details["item_counts"][: len(catalog)]  # without those of retired items
        if isinstance(model, str):
            model = load_backbone(model, **kwargs)
        if tokenizer is None or catalog is None:
            raise ValueError("processing_class and catalog are needed unless model is the folder of a recommender.")
        catalog.check_tokenizer(tokenizer)
        if encoder is None:
            encoder = PromptEncoder(catalog, tokenizer, args.max_history_items or 20)
        check_titles(item_titles or {})
        return cls(model, tokenizer, catalog, encoder, item_titles, item_counts)


def source_folder(model: str | PreTrainedModel) -> str | None:
    """Return the name or folder of a model; for a model that is loaded, only the folder of a recommender."""
    if isinstance(model, str):
        return model
    name = getattr(getattr(model, "config", None), "name_or_path", None)
    return name if name and Path(name, CATALOG_FILE).is_file() else None


def loading_kwargs(model: str | PreTrainedModel, args: TreePolicyConfig, quantization_config: Any) -> dict[str, Any]:
    """Return the keyword arguments of `from_pretrained`.

    Raises:
        ValueError: an argument is given twice, or would not be used because the model is already loaded.
    """
    kwargs = dict(model_kwargs(args))
    if quantization_config is not None and "quantization_config" in kwargs:
        raise ValueError("quantization_config is given twice: as an argument and in model_init_kwargs. Leave one out.")
    for name, value in (("model_init_kwargs", kwargs), ("quantization_config", quantization_config)):
        if value and not isinstance(model, str):
            raise ValueError(f"{name} was given, but the model is already loaded. Pass its name or folder.")
    return kwargs if quantization_config is None else kwargs | {"quantization_config": quantization_config}


def folder_details(directory: str, catalog: ItemCatalog) -> dict[str, Any]:
    """Return the `titles` and `item_counts` stored in a folder; nothing if its catalog has other items.

    Raises:
        ValueError: the folder's files have different numbers of items.
    """
    return read_details(Path(directory), catalog) if _has_items(directory, catalog) else {}


def _has_items(directory: str, catalog: ItemCatalog) -> bool:
    """Return whether the folder's catalog has the same items in the same order."""
    file = Path(directory, CATALOG_FILE)
    if not file.is_file():
        return False
    content = read_json(file)
    return content["items"] == catalog.items and content.get("retired", {}).get("items", []) == catalog.retired
