"""The data that all stages of a run share: interactions, splits, tokenizer and catalog."""

from __future__ import annotations

import random
import warnings
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from hashlib import sha256
from pathlib import Path
from typing import Any

from accelerate import PartialState
from datasets import Dataset
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from gflowtrl.catalog import Item, ItemCatalog
from gflowtrl.configuration import field_names, locate_errors
from gflowtrl.data import (
    ExposedRows,
    InteractionData,
    PromptEncoder,
    ShopTruth,
    Splits,
    SyntheticShop,
    TextPromptEncoder,
    add_item_tokens,
    augmented_rows,
    build_tokenizer,
    check_augmentable,
    exposed_rows,
    hold_out_items,
    k_core,
    leave_one_out,
    read_interactions,
    temporal_split,
)
from gflowtrl.data.interactions import lengths_of
from gflowtrl.policy.loading import load_tokenizer
from gflowtrl.semantic_ids import ItemTokenizer, SemanticIdOptions, item_texts, load_vectors, make_item_tokenizer
from gflowtrl.semantic_ids.texts import FEATURES
from gflowtrl.semantic_ids.tokenizer import DESCRIPTION_FILE
from gflowtrl.teachers import fingerprint
from gflowtrl.trainer.processes import A_DAY

from .recipe import Recipe
from .stage import if_set


MOST_ITEMS = 1 << 28  # in the histories of all rows: some gigabytes
SAMPLED = 1 << 16  # bytes per block; a file's fingerprint reads up to 17 blocks


@dataclass
class RunData:
    """The data of a run.

    Attributes:
        truth: of the synthetic shop; only the evaluation reads it.
        new_items: items that occur in nothing but test targets (`data.new_items`), or not before the validation period
            (`data.split: temporal`).
        item_tokenizer: what made the semantic ids; None: they are those of the data.
        history_cut: to how many items the histories of rows are cut; None: they are whole.
        fingerprint: changes with the data and with the way they are split.
    """

    recipe: Recipe
    interactions: InteractionData
    truth: ShopTruth | None
    splits: Splits
    tokenizer: PreTrainedTokenizerBase
    catalog: ItemCatalog
    fingerprint: str
    item_tokenizer: ItemTokenizer | None = None
    new_items: frozenset[Item] = frozenset()
    history_cut: int | None = None

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
    def train(self) -> Dataset:
        """The rows that policies train on: the training rows, with altered copies if the recipe says so."""
        options, splits = self.recipe.data.augmentation, self.splits
        if options is None:
            return splits.train
        source = self.interactions
        rows, sequences, seed = splits.train, splits.train_sequences, self.recipe.seed
        return augmented_rows(rows, source.users, sequences, options, seed, source.num_interactions, self.history_cut)

    @cached_property
    def train_sequences(self) -> list[list[Item]]:
        """The sequences of `train`, for supervised fine-tuning."""
        options, sequences = self.recipe.data.augmentation, self.splits.train_sequences
        return sequences if options is None else [*sequences, *options(sequences, self.recipe.seed)]

    @cached_property
    def exposed(self) -> ExposedRows | None:
        """The rows of exposed items, which only the evaluation reads; None if the data have none."""
        source = self.interactions
        if source.exposed is None:
            return None
        return exposed_rows(source.users, source.sequences, source.exposed)

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
    """Read or make the interactions, split them, make semantic ids if wanted, and build tokenizer and catalog.

    Raises:
        ValueError, FileNotFoundError: bad input; the message says what is wrong and where.
        ImportError: the embedder of semantic ids needs a package that is not installed.
    """
    truth, item_tokenizer, own_ids = None, None, recipe.data.semantic_ids is not None
    if recipe.data_dir is None:
        interactions, truth = SyntheticShop(**recipe.data.shop).generate()
    else:
        interactions = read_interactions(recipe.data_dir, with_ids=not own_ids)
        if recipe.data.k_core:
            interactions = k_core(interactions, recipe.data.k_core)
    if interactions.semantic_ids is None and not own_ids:
        raise ValueError(
            f"{interactions.name} has no semantic ids: {recipe.data_dir} holds no semantic_ids.json. Let the run make "
            f"them (--data.semantic_ids.quantizer kmeans), or make the file with `gflowtrl tokenize --data_dir "
            f"{recipe.data_dir}`; or give each item a list of tokens there (docs/data.md)."
        )
    new_items: frozenset[Item] = frozenset()
    if recipe.data.new_items:
        interactions, new_items = hold_out_items(interactions, recipe.data.new_items)
    cut = _history_cut(interactions, recipe.data.max_history_items)
    if recipe.data.split == "temporal":
        splits = temporal_split(interactions, recipe.data.validation_share, recipe.data.test_share, cut)
        new_items = frozenset(item for item, count in zip(splits.items, splits.item_counts, strict=True) if not count)
    else:
        splits = leave_one_out(interactions, cut)
    if recipe.data.augmentation is not None:
        check_augmentable(splits.train)
    if recipe.earlier is not None:
        ids, item_tokenizer = recipe.earlier.semantic_ids(interactions, own_ids)
        interactions = replace(interactions, semantic_ids=ids)
    elif own_ids:
        item_tokenizer = _item_tokenizer(recipe, interactions, splits)
        interactions = replace(interactions, semantic_ids=item_tokenizer.semantic_ids)
    tokenizer = None if recipe.model.get("model_name_or_path") is None else load_tokenizer(**recipe.pretrained)
    with locate_errors(f"The semantic ids of {interactions.name}", ()):
        if tokenizer is None:
            tokenizer = build_tokenizer(interactions.semantic_ids)
        else:
            add_item_tokens(tokenizer, interactions.semantic_ids)
    catalog = ItemCatalog.from_semantic_ids(interactions.semantic_ids, tokenizer)
    key = _data_fingerprint(recipe, interactions)
    data = RunData(recipe, interactions, truth, splits, tokenizer, catalog, key, item_tokenizer, new_items, cut)
    data.encoder  # noqa: B018  (its construction checks the prompts)
    return data


def _data_fingerprint(recipe: Recipe, interactions: InteractionData) -> str:
    """Return a hash of the data and of the way they are split.

    Without the exposed items: what is trained does not depend on them.
    """
    section, temporal = asdict(recipe.data), recipe.data.split == "temporal"
    del section["semantic_ids"]  # equal ids are equal data, whoever made them
    # Fields that are not used do not count.
    for name in () if temporal else ("split", "validation_share", "test_share"):
        del section[name]
    if not recipe.data.new_items:
        del section["new_items"]
    del section["augmentation"]  # teachers and the evaluation do not depend on it
    content = {
        "section": section,
        "users": interactions.users,
        "sequences": interactions.sequences,
        "events": interactions.events,
        "semantic_ids": list(interactions.semantic_ids.items()),
        **if_set(impressions=interactions.impressions, times=interactions.times if temporal else None),
    }
    return fingerprint(content)


def _item_tokenizer(recipe: Recipe, data: InteractionData, splits: Splits) -> ItemTokenizer:
    """Make the semantic ids of a recipe, or load them from `output_dir`: equal inputs give the same folder.

    The first process makes them, and the others wait and load them.
    """
    given = recipe.data.semantic_ids
    files = {name: recipe.local_file(getattr(given, name)) for name in ("vectors", "alignment_vectors")}
    options = replace(given, embedder=recipe.local(given.embedder), **files)
    with locate_errors("data.semantic_ids", field_names(SemanticIdOptions)):
        key = fingerprint(_ids_inputs(options, data, splits))
        folder = Path(recipe.output_dir, f"semantic_ids-{key[:8]}")
        state = PartialState(timeout=A_DAY)
        with state.main_process_first():
            if not Path(folder, DESCRIPTION_FILE).is_file():
                tokenizer, _ = make_item_tokenizer(options, data, splits.train_sequences)
                tokenizer.save_pretrained(folder)
                return tokenizer
            try:
                return ItemTokenizer.from_pretrained(folder)
            except (ValueError, FileNotFoundError) as error:
                raise ValueError(f"{error} To make the ids again, remove {folder}.") from error


def _ids_inputs(options: SemanticIdOptions, data: InteractionData, splits: Splits) -> dict[str, Any]:
    """All that semantic ids depend on. Files count by their content."""
    inputs: dict[str, Any] = {**asdict(options), "items": data.items}
    if options.uses_texts:
        inputs["texts"] = item_texts(data, options.features or FEATURES)
        inputs["embedder_files"] = files_fingerprint(options.embedder)
    for name in ("vectors", "alignment_vectors"):
        if (file := getattr(options, name)) is not None:
            inputs[name] = sha256(load_vectors(file, data.items).numpy().tobytes()).hexdigest()
    if options.uses_interactions:
        inputs["sequences"] = splits.train_sequences
    return inputs


def _history_cut(data: InteractionData, max_history_items: int) -> int | None:
    """None: whole histories, so that rows of one user are computed together. A number if they would not fit."""
    lengths = lengths_of(data.sequences)
    total = int((lengths * (lengths - 1) // 2).sum())
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
