"""The earlier run that a run continues, with its model, its item tokenizer and its teachers."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from gflowtrl.catalog import Item, ItemCatalog
from gflowtrl.checks import SEED, check_number, check_text
from gflowtrl.data import InteractionData
from gflowtrl.files import damage_of, read_object, reading
from gflowtrl.recommender import ITEM_TOKENIZER_FOLDER, TEACHER_FOLDER
from gflowtrl.semantic_ids import ItemTokenizer
from gflowtrl.semantic_ids.tokenizer import DESCRIPTION_FILE
from gflowtrl.teachers import MixtureTeacher, SASRec, load_teacher
from gflowtrl.teachers.teacher import TENSOR_FILE

from .specs import options_of


#: Methods whose model may be trained further, the best one first.
POLICIES = ("gflownet", "sft", "control")
WARM = "sasrec"  # the type of teachers that are trained further; others are fitted from scratch


@dataclass(frozen=True)
class EarlierRun:
    """A finished run.

    Attributes:
        folder: its `output_dir`.
        model: the folder of its policy.
        recipe: its settings, from `results.json`.
    """

    folder: Path
    model: Path
    recipe: Mapping[str, Any]

    @classmethod
    def read(cls, folder: str | Path) -> EarlierRun:
        """Read the last run of an output folder.

        Raises:
            FileNotFoundError: no run has finished there, or its model is missing.
            ValueError: the run has trained no policy, or files of its model are damaged.
        """
        file = Path(folder, "results.json")
        if not file.is_file():
            raise FileNotFoundError(
                f"continue_from: {folder} has no results.json. Give the output_dir of a run that has finished."
            )
        results = read_object(file)
        with reading(file, "the results of a run"):
            trained = [name for name in POLICIES if name in results["methods"]]
            # Its place is known relative to the folder, which may have been moved.
            place = Path(results["methods"][trained[0]]["model"]).parent.name if trained else ""
            recipe = results["recipe"]
            for spec in [recipe["teacher"], *recipe["teacher"].get("parts", [])]:
                check_text("the type of a teacher", spec["type"])
            check_number("recipe.seed", recipe["seed"], SEED)
        if not trained:
            raise ValueError(f"continue_from: the run in {folder} has trained no policy. Give one that has.")
        model = Path(folder, place, "model")
        if not model.is_dir():
            raise FileNotFoundError(f"continue_from: the folder {model}, which results.json names, is missing.")
        files = [path for path in sorted(model.iterdir()) if path.suffix in (".json", ".safetensors")]
        if damages := [f"{path} {damage}" for path in files if (damage := damage_of(path))]:
            raise ValueError(f"continue_from: {'; '.join(damages)}. Restore the file, or give another run.")
        return cls(Path(folder), model, recipe)

    @cached_property
    def catalog(self) -> ItemCatalog:
        """The items of the run."""
        return ItemCatalog.from_pretrained(self.model)

    def semantic_ids(self, data: InteractionData, makes_ids: bool) -> tuple[dict[Item, Any], ItemTokenizer | None]:
        """Return the ids of all items of new data, and the item tokenizer that made them, if there is one.

        Items of the earlier run keep their ids.

        Args:
            data: the new data.
            makes_ids: whether the run makes its ids (`data.semantic_ids`), or takes those of the data.

        Raises:
            ValueError: ids are to be made and the earlier run made none, or its tokenizer needs vectors; the data have
                another id for an item of the earlier run, or none of its items.
        """
        known = set(self.catalog.items)
        if not known & set(data.items):
            raise ValueError(
                f"continue_from: {data.name} has no item of the run in {self.folder}, whose items are like "
                f"{self.catalog.items[0]!r}. The data must hold the earlier items too."
            )
        tokenizer, ids = None, data.semantic_ids
        if makes_ids:
            tokenizer = self._item_tokenizer()
            tokenizer.add(data)
            ids = {item: tokenizer.semantic_ids[item] for item in data.items}
        tokens = dict(zip(self.catalog.items, self.catalog.semantic_ids, strict=True))
        changed = [item for item in data.items if item in known and tuple(ids[item]) != tuple(tokens[item])]
        if changed:
            raise ValueError(
                f"continue_from: {len(changed)} items have other semantic ids than in the run in {self.folder}, for "
                f"example {changed[0]!r}. The policy knows the earlier ids: keep them with gflowtrl tokenize --add."
            )
        return ids, tokenizer

    def _item_tokenizer(self) -> ItemTokenizer:
        folder = self.model / ITEM_TOKENIZER_FOLDER
        if not Path(folder, DESCRIPTION_FILE).is_file():
            raise ValueError(
                f"data.semantic_ids is set, but the run in {self.folder} took its ids from its data. Leave it out, "
                f"and give new items ids with gflowtrl tokenize --add."
            )
        tokenizer = ItemTokenizer.from_pretrained(folder)
        if tokenizer.embedder is None:
            raise ValueError(
                f"The ids of the run in {self.folder} were made from vectors, so that new items cannot be added by "
                f"their texts. Add them with gflowtrl tokenize --add --vectors, and leave data.semantic_ids out."
            )
        return tokenizer

    def teacher(self, spec: Mapping[str, Any]) -> SASRec | None:
        """Return the teacher of the earlier run that has the options of `spec`, to be trained further, or None.

        Of several ones, that with the same seed is preferred.
        """
        if spec["type"] != WARM or spec.get("folds"):
            return None
        found = [
            (seed == spec.get("seed"), module)
            for options, seed, module in self._teachers
            if options == {**options_of(spec), "seed": None}
        ]
        return max(found, key=lambda entry: entry[0], default=(False, None))[1]

    @cached_property
    def teacher_digest(self) -> str:
        """A hash of the parameters of the run's teacher."""
        with Path(self.model, TEACHER_FOLDER, TENSOR_FILE).open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    @cached_property
    def _teachers(self) -> list[tuple[dict[str, Any], int, SASRec]]:
        """Options, seed and module of each part of the run's teacher that can be trained further."""
        folder, spec = self.model / TEACHER_FOLDER, self.recipe["teacher"]
        if not folder.is_dir() or spec.get("folds"):
            return []
        teacher = load_teacher(folder)
        parts = [(spec, teacher)]
        if isinstance(teacher, MixtureTeacher):
            parts = list(zip(spec["parts"], teacher.parts, strict=True))
        return [
            ({**options_of(options), "seed": None}, options.get("seed", self.recipe["seed"]), module)
            for options, module in parts
            if options["type"] == WARM and isinstance(module, SASRec)
        ]

    def summary(self, items: Sequence[Item]) -> str:
        """Return a sentence about the items of new data."""
        known, now = set(self.catalog.items), set(items)
        return (
            f"Continues {self.model}: {len(known & now):,} of its items, {len(now - known):,} new ones; "
            f"{len(known - now):,} are gone."
        )
