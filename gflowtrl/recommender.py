"""Load a checkpoint, recommend."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from gflowtrl.catalog import Item, ItemCatalog
from gflowtrl.data import PromptEncoder
from gflowtrl.policy import CausalTreePolicy
from gflowtrl.policy.heads import split_heads


RECOMMENDER_FILE = "recommender_config.json"


@dataclass(frozen=True)
class Recommendation:
    """One recommended item.

    Attributes:
        item: the item.
        log_prob: natural logarithm of the policy's probability of its leaf; items that share a semantic id share it.
    """

    item: Item
    log_prob: float


class Recommender:
    """A trained generative recommender: histories in, ranked items out.

    Args:
        model: a causal language model.
        tokenizer: its tokenizer.
        catalog: the items that can be recommended.
        max_history_items: how many items of a history are used, the last ones.

    Example:
        ```python
        recommender = Recommender.from_pretrained("outputs/gflownet")
        for recommendation in recommender.recommend([[17, 4, 2205]], k=10)[0]:
            print(recommendation.item, recommendation.log_prob)
        ```
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        catalog: ItemCatalog,
        max_history_items: int = 20,
    ):
        self.model, self.tokenizer, self.catalog = model.eval(), tokenizer, catalog
        self.policy = CausalTreePolicy(model, catalog)
        self.encoder = PromptEncoder(catalog, tokenizer, max_history_items)

    @classmethod
    def from_pretrained(cls, directory: str | os.PathLike, **model_kwargs) -> Recommender:
        """Load what a gflowtrl trainer saved (or a checkpoint of its run).

        Args:
            directory: the folder with model, tokenizer, `catalog.json` and `recommender_config.json`.
            **model_kwargs: handed to `AutoModelForCausalLM.from_pretrained`, for example `device_map` or `dtype`.

        Raises:
            FileNotFoundError: the folder or one of its files is missing.
        """
        directory = Path(directory)
        if not directory.is_dir():
            raise FileNotFoundError(f"{directory} is not a folder; give the folder of a saved recommender.")
        catalog = ItemCatalog.from_pretrained(directory)
        file = directory / RECOMMENDER_FILE
        settings = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
        model = AutoModelForCausalLM.from_pretrained(directory, **model_kwargs)
        return cls(model, AutoTokenizer.from_pretrained(directory), catalog, settings.get("max_history_items", 20))

    def save_pretrained(self, directory: str | os.PathLike) -> None:
        """Write a folder that `from_pretrained` loads."""
        state_dict, _ = split_heads(self.model.state_dict())  # flow heads serve training only
        self.model.save_pretrained(directory, state_dict=state_dict)
        self.tokenizer.save_pretrained(directory)
        write_recommender_files(directory, self.catalog, self.encoder.max_history_items)

    def recommend(
        self,
        histories: Sequence[Sequence[Item]],
        k: int = 10,
        num_beams: int | None = None,
        exclude_seen: bool = False,
        batch_size: int = 256,
    ) -> list[list[Recommendation]]:
        """Recommend `k` items for each history, the most probable first.

        Args:
            histories: items in chronological order, at least one each.
            k: length of the lists; shorter only where the catalogue runs out.
            num_beams: beam width, by default `max(20, k)`. With `exclude_seen` it grows by the longest history.
            exclude_seen: leave out items of the history. For applications; benchmark figures keep them.
            batch_size: histories decoded together.

        Raises:
            ValueError: an empty history or an unknown item, named with its row; k below 1, or num_beams below k.
            TypeError: a history is no list of items.
        """
        if k < 1:
            raise ValueError(f"k is {k}; ask for at least 1 item.")
        if num_beams is not None and num_beams < k:
            raise ValueError(f"num_beams is {num_beams}, but {k} items are asked for; use at least {k} beams.")
        self._check_histories(histories)
        beams = max(20, k) if num_beams is None else num_beams
        if exclude_seen:
            beams += max((len(set(history)) for history in histories), default=0)
        results: list[list[Recommendation]] = []
        device = next(self.model.parameters()).device
        for start in range(0, len(histories), batch_size):
            part = histories[start : start + batch_size]
            prompts = {name: value.to(device) for name, value in self.encoder(part).items()}
            leaves, log_probs = self.policy.beam_search(prompts, beams)
            for history, row, values in zip(part, leaves.tolist(), log_probs.tolist(), strict=True):
                seen = set(history) if exclude_seen else set()
                found = [
                    Recommendation(item, value)
                    for leaf, value in zip(row, values, strict=True)
                    if leaf >= 0
                    for item in self.catalog.items_of(leaf)
                    if item not in seen
                ]
                results.append(found[:k])
        return results

    def _check_histories(self, histories: Sequence[Sequence[Item]]) -> None:
        for row, history in enumerate(histories):
            if isinstance(history, str) or not isinstance(history, Sequence):
                raise TypeError(f"The history in row {row} is {history!r}; give a list of items for each user.")
            if not len(history):
                raise ValueError(f"The history in row {row} is empty; recommendations need at least one item.")
            for item in history:
                if item not in self.catalog:
                    raise ValueError(f"The history in row {row} holds item {item!r}, which is not in the catalogue.")


def write_recommender_files(directory: str | os.PathLike, catalog: ItemCatalog, max_history_items: int) -> None:
    """What makes a language model's folder a recommender: `catalog.json` and `recommender_config.json`."""
    catalog.save_pretrained(directory)
    settings = {"max_history_items": max_history_items, "prompt_format": "plain"}
    scratch = Path(directory, f"{RECOMMENDER_FILE}.tmp")
    scratch.write_text(json.dumps(settings, indent=2), encoding="utf-8")
    os.replace(scratch, Path(directory, RECOMMENDER_FILE))
