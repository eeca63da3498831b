"""The data that all stages of a run share: interactions, splits, tokenizer and catalog."""

from __future__ import annotations

import random
import warnings
from dataclasses import asdict, dataclass
from functools import cached_property
from hashlib import sha256
from pathlib import Path
from typing import Any

from datasets import Dataset
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from gflowtrl.catalog import ItemCatalog
from gflowtrl.data import (
    InteractionData,
    PromptEncoder,
    ShopTruth,
    Splits,
    SyntheticShop,
    TextPromptEncoder,
    add_item_tokens,
    build_tokenizer,
    k_core,
    leave_one_out,
    read_interactions,
)
from gflowtrl.policy.loading import load_tokenizer
from gflowtrl.teachers import fingerprint

from .recipe import Recipe


MOST_ITEMS = 1 << 28  # in the histories of all rows: some gigabytes
SAMPLED = 1 << 16  # bytes per block; a file's fingerprint reads up to 17 blocks


@dataclass
class RunData:
    """The data of a run.

    Attributes:
        truth: of the synthetic shop; only the evaluation reads it.
        fingerprint: changes with the data and with the way they are split.
    """

    recipe: Recipe
    interactions: InteractionData
    truth: ShopTruth | None
    splits: Splits
    tokenizer: PreTrainedTokenizerBase
    catalog: ItemCatalog
    fingerprint: str

    @cached_property
    def encoder(self) -> PromptEncoder:
        longest, form = self.recipe.data.max_history_items, self.recipe.prompt_format
        if form is None:
            return PromptEncoder(self.catalog, self.tokenizer, longest)
        return TextPromptEncoder(self.catalog, self.tokenizer, self.titles, form, longest)

    @property
    def titles(self) -> dict[Any, str]:
        """Title of each item that has one (items.jsonl)."""
        features = self.interactions.item_features
        return {i: features[i]["title"] for i in self.interactions.items if features.get(i, {}).get("title")}

    @property
    def item_counts(self) -> Tensor:
        """Training interactions of each item, in the order of `catalog.items`."""
        return self.splits.item_counts

    @cached_property
    def validation(self) -> Dataset:
        """The validation rows of the measured users."""
        return self._measured(self.splits.validation)

    @cached_property
    def test(self) -> Dataset:
        """The test rows of the measured users."""
        return self._measured(self.splits.test)

    def _measured(self, rows: Dataset) -> Dataset:
        count = self.recipe.evaluation.users
        if count is None or count >= len(rows):
            return rows
        return rows.select(sorted(random.Random(0).sample(range(len(rows)), count)))

    @property
    def kind(self) -> str:
        return "SYNTHETIC data" if self.interactions.synthetic else "real data"


def prepare(recipe: Recipe) -> RunData:
    """Read or make the interactions, split them, and build tokenizer and catalog.

    Raises:
        ValueError, FileNotFoundError: bad input; the message says what is wrong and where.
    """
    truth = None
    if recipe.data_dir is None:
        interactions, truth = SyntheticShop(**recipe.data.shop).generate()
    else:
        interactions = read_interactions(recipe.data_dir)
        if recipe.data.k_core:
            interactions = k_core(interactions, recipe.data.k_core)
    if interactions.semantic_ids is None:
        raise ValueError(
            f"{interactions.name} has no semantic ids: {recipe.data_dir} holds no semantic_ids.json. `gflowtrl "
            f"tokenize --data_dir {recipe.data_dir}` makes it; or give each item a list of tokens there "
            f"(docs/data.md)."
        )
    splits = leave_one_out(interactions, _history_cut(interactions, recipe.data.max_history_items))
    if recipe.model.get("model_name_or_path") is None:
        tokenizer = build_tokenizer(interactions.semantic_ids)
    else:
        tokenizer = load_tokenizer(**recipe.pretrained)
        add_item_tokens(tokenizer, interactions.semantic_ids)
    catalog = ItemCatalog.from_semantic_ids(interactions.semantic_ids, tokenizer)
    content = {
        "section": asdict(recipe.data),
        "users": interactions.users,
        "sequences": interactions.sequences,
        "events": interactions.events,
        "semantic_ids": list(interactions.semantic_ids.items()),
    }
    data = RunData(recipe, interactions, truth, splits, tokenizer, catalog, fingerprint(content))
    data.encoder  # noqa: B018  (its construction checks the prompts)
    return data


def _history_cut(data: InteractionData, max_history_items: int) -> int | None:
    """None: whole histories, so that rows of one user are computed together. A number if they would not fit."""
    total = sum(len(sequence) * (len(sequence) - 1) // 2 for sequence in data.sequences)
    if total <= MOST_ITEMS:
        return None
    warnings.warn(
        f"{data.name}: the histories of all rows hold {total:,} items. Each is cut to {max_history_items} items, and "
        f"each row is computed separately.",
        stacklevel=3,
    )
    return max_history_items


def files_fingerprint(folder: str | Path) -> str | None:
    """Fingerprint of a local model's files: their names, sizes and sampled blocks, so that gigabytes are not read.

    None if there is no such folder (a name on the Hub).
    """
    if not Path(folder).is_dir():
        return None
    found = []
    for path in sorted(file for file in Path(folder).glob("*") if file.is_file()):
        size, digest = path.stat().st_size, sha256()
        with path.open("rb") as file:
            for start in range(0, size, max(SAMPLED, size // 16)):
                file.seek(start)
                digest.update(file.read(SAMPLED))
        found.append([path.name, size, digest.hexdigest()])
    return fingerprint(found)
