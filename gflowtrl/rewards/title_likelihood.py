"""How probable a language model that reads titles finds the title of an item."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForCausalLM

from gflowtrl.catalog import Item, ItemCatalog
from gflowtrl.checks import COUNT, check_choice, check_number
from gflowtrl.compat import attention_implementation, whole_models
from gflowtrl.data import Step
from gflowtrl.policy import check_causal
from gflowtrl.policy.causal import CausalDecoder
from gflowtrl.policy.loading import load_tokenizer, load_weights
from gflowtrl.policy.packing import separate_branches

from .likelihood import frozen
from .reward import Reward


if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from .from_spec import RewardContext

#: What the language model reads; `{history}` becomes the titles, oldest first, one a line.
TEMPLATE = "A customer bought these products, the oldest first:\n{history}\nThe next product that the customer bought:"


class TitleLikelihoodReward(Reward):
    """Likelihood of the item's *title* under a frozen language model that reads the history's titles.

    The language-model variant of r_y in GFlowGR (arXiv 2506.16114): what the model knows about the world, not about
    ids. It also tells items apart that no one has taken yet. Reads the column `history`.

    Cost: a prompt once a row, and each drawn title's tokens behind its cached keys and values; over all items as many
    titles as there are items, a row. Therefore `score_items` is for small catalogs and has to be asked for
    (`all_items`).

    Args:
        model: a causal language model with ordinary (not sharded) weights; encoder-decoders are refused.
        tokenizer: the model's own, which has nothing to do with the semantic ids' one.
        titles: the title of every item of the catalog.
        template: text with `{history}` in it. The title follows it after a space.
        max_history_items: how many items of the history, the last ones, are read.
        max_title_words: longer titles are cut, in the history and as an answer.
        normalize: "mean" is the geometric mean of the title's token probabilities, in (0, 1], which does not favor
            short titles; "sum" is the probability of the whole title, tiny and very peaked.
        batch_size: titles in one forward pass. Memory goes with batch_size x tokens a title x vocabulary.
        all_items: let exact flows and the sampler "reward" ask for all items at every step.

    Raises:
        ValueError: bad options; an item without a title; a prompt that is longer than the model's positions.
    """

    provided = frozenset({"tokenizer", "titles"})
    reads_target = False

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        titles: Mapping[Item, str],
        template: str = TEMPLATE,
        max_history_items: int = 10,
        max_title_words: int = 16,
        normalize: str = "mean",
        batch_size: int = 32,
        all_items: bool = False,
    ):
        super().__init__("title_likelihood")
        _check_options(
            template=template, max_history_items=max_history_items, max_title_words=max_title_words,
            normalize=normalize, batch_size=batch_size,
        )  # fmt: skip
        attention = attention_implementation(model.config)
        if model.config.is_encoder_decoder or "flash" in attention:
            raise ValueError(
                f"TitleLikelihoodReward reads causal language models with attn_implementation='sdpa' or 'eager', not "
                f"{type(model).__name__} with {attention!r}."
            )
        check_causal(model)
        self.model, self.text_tokenizer = model, tokenizer
        self.titles, self.template = titles, template
        self.max_history_items, self.max_title_words = max_history_items, max_title_words
        self.normalize, self.batch_size, self.scores_all_items = normalize, batch_size, all_items

    def _prepare(self, catalog: ItemCatalog) -> None:
        bare = [item for item in catalog.items if not str(self.titles.get(item) or "").split()]
        if bare:
            raise ValueError(
                f"Reward {self.__name__!r} needs the title of every item, but {len(bare)} of {len(catalog)} have "
                f"none, for example {bare[0]!r}."
            )

    def score_items(self, step: Step) -> Tensor:
        """`(B, items)`: as many titles as there are items, a row."""
        histories, size = step.histories(self._owner), len(self._bound_catalog())
        return self._likelihoods(histories, torch.arange(size).expand(len(histories), -1), step.device)

    def score_leaves(self, step: Step, leaves: Tensor) -> Tensor:
        """`(B, K)`; a title that a row needs several times is read once."""
        catalog, histories = self._bound_catalog(), step.histories(self._owner)
        members = {leaf: catalog.index_of(catalog.items_of(leaf)).tolist() for leaf in leaves.unique().tolist()}
        rows = [list(dict.fromkeys(item for leaf in row for item in members[leaf])) for row in leaves.tolist()]
        items = _padded(rows)
        return self._fold_some(leaves, items, self._likelihoods(histories, items, leaves.device))

    # -------------------------------------------------------------------------------------------- likelihood of titles
    def _likelihoods(self, histories: Sequence[Sequence[Item]], items: Tensor, device: torch.device) -> Tensor:
        """Likelihood of the titles of `items (B, C)`, positions padded with -1 (0 there): `(B, C)`."""
        known, place = items.unique(return_inverse=True)
        texts = [self._title(self.catalog.items[i]) if i >= 0 else "" for i in known.tolist()]
        tokens = _padded(self._tokens([f" {text}" if text else "" for text in texts], False)).to(device)
        prompts = self._tokens([self._prompt(history) for history in histories], True)
        rows = max(self.batch_size // items.shape[1], 1)
        found = []
        with frozen(self.model, device):
            for start in range(0, len(histories), rows):
                titles = tokens[place[start : start + rows].to(device)]
                batch = _left_padded(prompts[start : start + rows], device)
                self._check_length(batch["input_ids"].shape[1] + titles.shape[2])
                found.append(title_log_probs(self.model, batch, titles, max(self.batch_size // len(titles), 1)))
        log_probs, real = torch.cat(found), (tokens >= 0)[place.to(device)]
        total = log_probs.sum(-1)
        if self.normalize == "mean":
            total = total / real.sum(-1).clamp(min=1)
        return torch.where(real.any(-1), total.exp(), 0.0)

    def _tokens(self, texts: list[str], special: bool) -> list[list[int]]:
        """Prompts with the tokenizer's own beginning, titles without."""
        return self.text_tokenizer(texts, add_special_tokens=special)["input_ids"]

    def _prompt(self, history: Sequence[Item]) -> str:
        titles = [f"- {self._title(item)}" for item in history[-self.max_history_items :]]
        return self.template.replace("{history}", "\n".join(titles))

    def _title(self, item: Item) -> str:
        if item not in self.titles:
            raise ValueError(f"Reward {self.__name__!r} has no title of item {item!r}, which is in a history.")
        return " ".join(str(self.titles[item]).split()[: self.max_title_words])

    def _check_length(self, length: int) -> None:
        limit = getattr(self.model.config, "max_position_embeddings", None)
        if limit is not None and length > limit:
            raise ValueError(
                f"Reward {self.__name__!r}: a prompt and its titles take {length} tokens, but the model has {limit} "
                f"positions; lower max_history_items ({self.max_history_items}) or max_title_words."
            )

    @classmethod
    def check_spec(cls, spec: Mapping[str, Any]) -> None:
        if not isinstance(spec.get("model"), str):
            raise ValueError("model must name the language model that reads the titles, for example its folder.")
        _check_options(**spec)

    @classmethod
    def needs(cls, spec: Mapping[str, Any]) -> set[str]:
        return {"titles"}

    @classmethod
    def scores_every_item(cls, spec: Mapping[str, Any]) -> bool:
        return bool(spec.get("all_items", False))

    @classmethod
    def from_spec(cls, spec: Mapping[str, Any], context: RewardContext) -> Self:
        folder = context.local(spec["model"])
        with whole_models():
            model = load_weights(AutoModelForCausalLM, folder)
        return cls(**{**spec, "model": model, "tokenizer": load_tokenizer(folder), "titles": context.titles})


def title_log_probs(model: nn.Module, prompts: Mapping[str, Tensor], titles: Tensor, chunk: int) -> Tensor:
    """Log-probability of every token of several continuations behind each prompt, which is computed once.

    Args:
        model: a causal language model.
        prompts: left-padded `{"input_ids": (B, P), "attention_mask": (B, P)}`.
        titles: `(B, C, T)` tokens, padded with -1 at the right.
        chunk: continuations of a prompt in one forward pass; they see the prompt and themselves, not each other.

    Returns:
        `(B, C, T)`, 0 on padding; equal to scoring every full sequence by itself.
    """
    decoder = CausalDecoder(model, prompts)
    first = decoder.root_logits[:, :, None].log_softmax(-1)
    batch, width, device = len(titles), titles.shape[2] - 1, titles.device
    found = []
    for part in titles.split(chunk, 1):
        count, tokens = part.shape[1], part.clamp(min=0)
        log_probs = first.expand(-1, count, -1, -1).gather(-1, tokens[:, :, :1, None]).squeeze(-1)
        if width:
            # A title's last token predicts nothing, so it is not fed.
            visible = separate_branches(count, width, device).expand(batch, -1, -1)
            steps = torch.arange(width, device=device).repeat(count)
            logits = decoder.feed(tokens[:, :, :-1].reshape(batch, -1), visible, steps)
            logits = logits.view(batch, count, width, -1)
            decoder.restart()
            chosen = logits.gather(-1, tokens[:, :, 1:, None]).squeeze(-1).float()
            log_probs = torch.cat([log_probs, chosen - logits.float().logsumexp(-1)], 2)
        found.append(log_probs.masked_fill(part < 0, 0.0))
    return torch.cat(found, 1)


def _check_options(**options: Any) -> None:
    """Check options of `TitleLikelihoodReward`, before any model is loaded; those not given are fine."""
    template = options.get("template", TEMPLATE)
    if "{history}" not in template:
        raise ValueError(f"The template of TitleLikelihoodReward must hold {{history}}, but it is {template!r}.")
    for name in ("max_history_items", "max_title_words", "batch_size"):
        check_number(f"{name} of TitleLikelihoodReward", options.get(name, 1), COUNT)
    check_choice("normalize", options.get("normalize", "mean"), ("mean", "sum"))


def _padded(rows: Sequence[Sequence[int]]) -> Tensor:
    return pad_sequence([torch.tensor(row, dtype=torch.long) for row in rows], True, -1)


def _left_padded(rows: Sequence[Sequence[int]], device: torch.device) -> dict[str, Tensor]:
    """Token lists as a batch whose padding, token 0, stands at the left."""
    ids = _padded([row[::-1] for row in rows]).flip(1).to(device)
    return {"input_ids": ids.clamp(min=0), "attention_mask": (ids >= 0).long()}
