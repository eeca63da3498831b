"""Checks of models, encoders and datasets before training starts."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from numbers import Integral
from typing import Any

import torch
from datasets import Dataset, IterableDataset
from torch import Tensor, nn
from transformers import PreTrainedModel

from gflowtrl.catalog import Item, ItemCatalog
from gflowtrl.checks import short_repr
from gflowtrl.compat import carries_adapters
from gflowtrl.data import PromptEncoder, check_column_names, has_exposed_rows
from gflowtrl.policy import check_causal, check_positions
from gflowtrl.policy.loading import check_embedded

from .folder import Parts


Rows = Dataset | IterableDataset
REQUIRED_COLUMNS = ("row_id", "history", "target")


def check_parts(parts: Parts, max_history_items: int | None, new_adapters: bool) -> None:
    """Run all checks of this module on a trainer's model and encoder."""
    check_model(parts.model, parts.catalog)
    check_trainable(parts.model, new_adapters)
    check_encoder(parts.encoder, parts.catalog, parts.model, max_history_items)


def check_datasets(train_dataset: Rows | None, others: Iterable[Rows | None], catalog: ItemCatalog) -> None:
    """Run all checks of this module on a trainer's datasets: that of the training, and those of the evaluation."""
    check_training_rows(train_dataset)
    for dataset in (train_dataset, *others):
        if not isinstance(dataset, IterableDataset):  # streamed rows are checked as they are read
            check_rows(dataset, catalog)


def check_model(model: PreTrainedModel, catalog: ItemCatalog) -> None:
    """Check that the model has an output layer, embeds every token of the catalog, and can be scored exactly."""
    if not isinstance(model, nn.Module) or not hasattr(model, "get_output_embeddings"):
        text = "it must be a language model of transformers, its name or its folder"
        raise TypeError(f"The model is of type {type(model).__name__}; {text}.")
    if model.get_output_embeddings() is None:
        raise ValueError(
            f"{type(model).__name__} has no output layer over tokens. Use a language model: a causal one "
            f"(AutoModelForCausalLM) or an encoder-decoder (AutoModelForSeq2SeqLM)."
        )
    if not model.config.is_encoder_decoder:
        check_causal(model)
    check_embedded(model, catalog.tree.num_tokens - 1)


def check_trainable(model: PreTrainedModel, new_adapters: bool) -> None:
    """Raise an error for unmerged adapters, which are frozen, and would be lost when new adapters are added."""
    trainable = any(parameter.requires_grad for parameter in model.parameters())
    if carries_adapters(model) and (new_adapters or not trainable):
        raise ValueError(
            f"{type(model).__name__} has adapters that are not merged, so it cannot be trained. Pass the folder of "
            f"the adapters as the model, without a quantization_config; then they are merged."
        )


def check_encoder(
    encoder: PromptEncoder,
    catalog: ItemCatalog,
    model: PreTrainedModel,
    max_history_items: int | None = None,
) -> None:
    """Check that the encoder has the same items and history length, and that the model has enough positions."""
    if not hasattr(encoder, "max_history_items"):
        raise TypeError(f"prompt_encoder is of type {type(encoder).__name__}; it must be a PromptEncoder.")
    if max_history_items not in (None, encoder.max_history_items):
        raise ValueError(
            f"max_history_items is {max_history_items}, but the prompt_encoder was created with "
            f"{encoder.max_history_items}. Leave it out of the configuration, or create the encoder with it."
        )
    if encoder.catalog.items != catalog.items:
        raise ValueError("The prompt_encoder has another catalog than the trainer. Create it with the same catalog.")
    check_embedded(model, encoder.largest_token, "The prompts use")
    check_positions(model, encoder.max_length, catalog.tree.max_depth, encoder.max_history_items)


def check_rows(rows: Dataset | None, catalog: ItemCatalog) -> None:
    """Check the columns of a dataset, and that row ids are unique, histories are not empty and all items are known."""
    if rows is None:
        return
    if not isinstance(rows, Dataset):
        raise TypeError(f"Rows must be a datasets.Dataset with a length and an order, got {type(rows).__name__}.")
    if not len(rows):
        raise ValueError("The dataset has no rows.")
    exposed = has_exposed_rows(rows)
    missing = [
        name for name in REQUIRED_COLUMNS if name not in rows.column_names and not (exposed and name == "target")
    ]
    if missing:
        raise ValueError(
            f"The dataset has no column {', '.join(missing)} (it has {', '.join(rows.column_names)}). "
            f"gflowtrl.data.leave_one_out creates such rows."
        )
    check_column_names(rows.column_names)
    known, seen = frozenset(catalog.items), set()
    # The items of a row besides its history: the target, or the candidates.
    others = rows["candidates"] if exposed else ([target] for target in rows["target"])
    for row_id, history, wanted in zip(rows["row_id"], rows["history"], others, strict=True):
        check_row(row_id, history, wanted, known)
        if row_id in seen:
            raise ValueError(
                f"Two rows have the row_id {row_id}. Make row ids unique: the random numbers of a row follow from it."
            )
        seen.add(row_id)


def check_row(row_id: Any, history: Any, wanted: Sequence[Any], known: frozenset[Item]) -> None:
    """Check a row: its id, its history and its other items (the target, or the candidates)."""
    if not isinstance(row_id, Integral) or isinstance(row_id, bool):
        raise TypeError(f"The row_id {short_repr(row_id)} is not an integer; number the rows.")
    for what, items in (("history", history), ("candidates", wanted)):
        if isinstance(items, str | Mapping) or not hasattr(items, "__len__"):
            raise TypeError(f"Row {row_id} has the {what} {short_repr(items)}; it must be a list of items.")
    if not len(history):
        raise ValueError(f"Row {row_id} has an empty history; leave out rows without a history.")
    try:
        all_known = known.issuperset(wanted) and known.issuperset(history)
    except TypeError:  # an item is a list or a dictionary
        all_known = False
    if not all_known:
        unknown = next(item for item in [*wanted, *history] if isinstance(item, list | dict) or item not in known)
        raise ValueError(
            f"Row {row_id} contains item {unknown!r}, which is not in the catalog of {len(known)} items. Leave it "
            f"out of the data or give it a semantic id."
        )


def check_training_rows(rows: Dataset | IterableDataset | None) -> None:
    """Raise an error for rows of exposed items, which are for evaluation only."""
    if isinstance(rows, Dataset) and has_exposed_rows(rows):
        raise ValueError(
            "train_dataset has candidates and likes of exposed items instead of targets. They are the truth that the "
            "evaluation measures on: pass them as eval_dataset, and train on the log (leave_one_out)."
        )


def item_counts_of(rows: object, catalog: ItemCatalog) -> Tensor:
    """Return how often each item is a training target, `(items,)`; all ones without rows that can be counted."""
    if not isinstance(rows, Dataset):
        return torch.ones(len(catalog), dtype=torch.long)
    return torch.bincount(catalog.index_of(rows["target"]), minlength=len(catalog))
