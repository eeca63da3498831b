"""Load a checkpoint, recommend."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from gflowtrl.catalog import Item, ItemCatalog
from gflowtrl.data import PromptEncoder, load_encoder, save_encoder
from gflowtrl.policy import StatelessNoise, load_backbone, make_policy
from gflowtrl.policy.heads import split_heads


RECOMMENDER_FILE = "recommender_config.json"
STRATEGIES = ("beam", "sample")


@dataclass(frozen=True)
class Recommendation:
    """One recommended item.

    Attributes:
        item: the item.
        log_prob: natural logarithm of the policy's probability of its leaf (of the tempered policy, where it was
            drawn with a temperature); items that share a semantic id share it.
    """

    item: Item
    log_prob: float


class Recommender:
    """A trained generative recommender: histories in, ranked items out.

    Args:
        model: a causal language model or an encoder-decoder.
        tokenizer: its tokenizer.
        catalog: the items that can be recommended.
        max_history_items: how many items of a history are used, the last ones.
        encoder: what makes prompts of histories, where these are not the plain ones.

    Example:
        ```python
        recommender = Recommender.from_pretrained("outputs/gflownet")
        for recommendation in recommender.recommend([[17, 4, 2205]], k=10)[0]:
            print(recommendation.item, recommendation.log_prob)
        recommender.recommend([[17, 4, 2205]], k=10, strategy="sample", seed=1)  # another list for another seed
        ```
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        catalog: ItemCatalog,
        max_history_items: int = 20,
        encoder: PromptEncoder | None = None,
    ):
        self.model, self.tokenizer, self.catalog = model.eval(), tokenizer, catalog
        self.policy = make_policy(model, catalog)
        self.encoder = PromptEncoder(catalog, tokenizer, max_history_items) if encoder is None else encoder

    @classmethod
    def from_pretrained(cls, directory: str | os.PathLike, **model_kwargs) -> Recommender:
        """Load what a gflowtrl trainer saved (or a checkpoint of its run).

        Args:
            directory: the folder with model, tokenizer, `catalog.json` and `recommender_config.json`.
            **model_kwargs: handed to the `from_pretrained` of `AutoModelForSeq2SeqLM` where the checkpoint is an
                encoder-decoder, of `AutoModelForCausalLM` otherwise, for example `device_map` or `dtype`.

        Raises:
            FileNotFoundError: the folder or one of its files is missing.
        """
        directory = Path(directory)
        if not directory.is_dir():
            raise FileNotFoundError(f"{directory} is not a folder; give the folder of a saved recommender.")
        catalog = ItemCatalog.from_pretrained(directory)
        tokenizer = AutoTokenizer.from_pretrained(directory)
        encoder = read_encoder(directory, catalog, tokenizer)
        return cls(load_backbone(directory, **model_kwargs), tokenizer, catalog, encoder=encoder)

    def save_pretrained(self, directory: str | os.PathLike) -> None:
        """Write a folder that `from_pretrained` loads."""
        state_dict, _ = split_heads(self.model.state_dict())  # flow heads serve training only
        self.model.save_pretrained(directory, state_dict=state_dict)
        self.tokenizer.save_pretrained(directory)
        write_recommender_files(directory, self.encoder)

    def recommend(
        self,
        histories: Sequence[Sequence[Item]],
        k: int = 10,
        num_beams: int | None = None,
        exclude_seen: bool = False,
        batch_size: int = 256,
        strategy: str = "beam",
        temperature: float = 1.0,
        seed: int = 0,
    ) -> list[list[Recommendation]]:
        """Recommend `k` items for each history.

        Args:
            histories: items in chronological order, at least one each.
            k: length of the lists; shorter only where the catalogue runs out.
            num_beams: beam width, by default `max(20, k)`; with `strategy="sample"` the number of ids that are drawn,
                by default `k`. With `exclude_seen` it grows by the longest history.
            exclude_seen: leave out items of the history. For applications; benchmark figures keep them.
            batch_size: histories decoded together.
            strategy: `"beam"`, the most probable items, the most probable first; or `"sample"`, items drawn without
                replacement in proportion to their probability, in the order of the draw (stochastic beam search). A
                policy that is proportional to a reward then gives lists that are, so that every good item gets its
                turn. Items that share a semantic id come together.
            temperature: with `"sample"`: divides the logits; below 1 nearer to `"beam"`, above 1 more varied.
            seed: with `"sample"`: the same seed gives the same lists. Each history draws by its place in
                `histories`, whatever the batch size.

        Raises:
            ValueError: an empty history or an unknown item, named with its row; k below 1, or num_beams below k; an
                unknown strategy; a temperature that is not positive, or one with `"beam"`.
            TypeError: a history is no list of items.
        """
        _check_request(k, num_beams, strategy, temperature)
        self._check_histories(histories)
        beams = num_beams or (max(20, k) if strategy == "beam" else k)
        if exclude_seen:
            beams += max((len(set(history)) for history in histories), default=0)
        results: list[list[Recommendation]] = []
        device = next(self.model.parameters()).device
        for start in range(0, len(histories), batch_size):
            part = histories[start : start + batch_size]
            prompts = {name: value.to(device) for name, value in self.encoder(part).items()}
            if strategy == "beam":
                leaves, log_probs = self.policy.beam_search(prompts, beams)
            else:
                rows = torch.arange(start, start + len(part), device=device)
                drawn = self.policy.stochastic_beam_search(
                    prompts, beams, StatelessNoise(seed).at(0, rows), temperature
                )
                leaves, log_probs = drawn.leaves, drawn.log_probs
            results += self._lists(part, leaves, log_probs, k, exclude_seen)
        return results

    def _lists(
        self, histories: Sequence[Sequence[Item]], leaves: Tensor, log_probs: Tensor, k: int, exclude_seen: bool
    ) -> list[list[Recommendation]]:
        """The first `k` items of ranked leaves `(B, n)`."""
        results = []
        for history, row, values in zip(histories, leaves.tolist(), log_probs.tolist(), strict=True):
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


def _check_request(k: int, num_beams: int | None, strategy: str, temperature: float) -> None:
    if k < 1:
        raise ValueError(f"k is {k}; ask for at least 1 item.")
    if num_beams is not None and num_beams < k:
        raise ValueError(f"num_beams is {num_beams}, but {k} items are asked for; use at least {k} beams.")
    if strategy not in STRATEGIES:
        raise ValueError(f"strategy is {strategy!r}; use one of {', '.join(map(repr, STRATEGIES))}.")
    if temperature <= 0:
        raise ValueError(f"temperature is {temperature}; it divides the logits and must be positive.")
    if strategy == "beam" and temperature != 1.0:
        raise ValueError(f"temperature is {temperature}, but strategy 'beam' draws nothing; use strategy='sample'.")


def write_recommender_files(directory: str | os.PathLike, encoder: PromptEncoder) -> None:
    """What makes a language model's folder a recommender: the catalogue, and how prompts are made."""
    encoder.catalog.save_pretrained(directory)
    settings = save_encoder(encoder, directory)
    scratch = Path(directory, f"{RECOMMENDER_FILE}.tmp")
    scratch.write_text(json.dumps(settings, indent=2, ensure_ascii=False), encoding="utf-8")
    os.replace(scratch, Path(directory, RECOMMENDER_FILE))


def read_encoder(
    directory: str | os.PathLike, catalog: ItemCatalog, tokenizer: PreTrainedTokenizerBase
) -> PromptEncoder:
    """The encoder of a saved recommender; the plain one where the folder says nothing."""
    file = Path(directory, RECOMMENDER_FILE)
    settings = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    return load_encoder(settings, directory, catalog, tokenizer)
