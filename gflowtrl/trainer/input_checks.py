"""What is checked before any training time is spent."""

from __future__ import annotations

import torch
from datasets import Dataset
from torch import Tensor
from transformers import PreTrainedModel

from gflowtrl.catalog import ItemCatalog
from gflowtrl.compat import carries_adapters
from gflowtrl.data import PromptEncoder, check_column_names
from gflowtrl.policy import check_causal, check_positions
from gflowtrl.policy.loading import check_embedded


REQUIRED_COLUMNS = ("row_id", "history", "target")


def check_model(model: PreTrainedModel, catalog: ItemCatalog) -> None:
    """The model must write tokens, know every token of the catalog, and be one that is exact as a policy."""
    if model.get_output_embeddings() is None:
        raise ValueError(
            f"{type(model).__name__} has no output layer over tokens; this trainer takes language models: causal ones "
            f"(AutoModelForCausalLM) or encoder-decoders (AutoModelForSeq2SeqLM)."
        )
    if not model.config.is_encoder_decoder:
        check_causal(model)
    check_embedded(model, catalog.tree.num_tokens - 1)


def check_trainable(model: PreTrainedModel, new_adapters: bool) -> None:
    """Adapters that lie on a model without being merged are frozen, and lost where new ones are put in their place."""
    trainable = any(parameter.requires_grad for parameter in model.parameters())
    if carries_adapters(model) and (new_adapters or not trainable):
        raise ValueError(
            f"{type(model).__name__} carries adapters that are not merged into it, so that it cannot be trained on. "
            f"Give the folder of adapters as the model, without a quantization_config: they are merged then."
        )


def check_encoder(
    encoder: PromptEncoder,
    catalog: ItemCatalog,
    model: PreTrainedModel,
    max_history_items: int | None = None,
) -> None:
    """The encoder must be of these items, and cut histories as the configuration says (where it does) and to what the
    model has positions for."""
    if max_history_items not in (None, encoder.max_history_items):
        raise ValueError(
            f"max_history_items is {max_history_items}, but the prompt_encoder was made with "
            f"{encoder.max_history_items}. Leave it out of the configuration, or make the encoder with it."
        )
    if encoder.catalog.items != catalog.items:
        raise ValueError("The prompt_encoder was made of another catalog than the trainer's.")
    check_embedded(model, encoder.largest_token, "The prompts use")
    check_positions(model, encoder.max_length, catalog.tree.max_depth, encoder.max_history_items)


def check_rows(rows: Dataset | None, catalog: ItemCatalog) -> None:
    """Rows must have their columns, no empty history, no unknown item, and ids that tell them apart."""
    if rows is None:
        return
    if not isinstance(rows, Dataset):
        raise TypeError(f"Rows must be a datasets.Dataset with a length and an order, got {type(rows).__name__}.")
    missing = [column for column in REQUIRED_COLUMNS if column not in rows.column_names]
    if missing:
        raise ValueError(
            f"The dataset has no column {', '.join(missing)} (it has {', '.join(rows.column_names)}). "
            f"gflowtrl.data.leave_one_out makes such rows."
        )
    check_column_names(rows.column_names)
    if not len(rows):
        raise ValueError("The dataset has no rows.")
    known, met = set(catalog.items), set()
    for row_id, history, target in zip(rows["row_id"], rows["history"], rows["target"], strict=True):
        if not isinstance(row_id, int):
            raise TypeError(f"The row_id {row_id!r} is no integer; number the rows.")
        if row_id in met:
            raise ValueError(
                f"Two rows share the row_id {row_id}; each needs its own, because its random numbers follow from it."
            )
        met.add(row_id)
        if not history:
            raise ValueError(f"Row {row_id} has an empty history; leave rows without one out.")
        if target not in known or not known.issuperset(history):
            stranger = next(item for item in [target, *history] if item not in known)
            raise ValueError(
                f"Row {row_id} holds item {stranger!r}, which is not in the catalog of {len(catalog)} items. "
                f"Leave it out of the data or give it a semantic id."
            )


def item_counts_of(rows: Dataset | None, catalog: ItemCatalog) -> Tensor:
    """How often each item is a training target: `(items,)`; ones without training rows."""
    if rows is None:
        return torch.ones(len(catalog), dtype=torch.long)
    return torch.bincount(catalog.index_of(rows["target"]), minlength=len(catalog))
