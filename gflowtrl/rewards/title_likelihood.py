"""A reward from the likelihood of an item's title under a language model that reads titles."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForCausalLM

from gflowtrl.catalog import Item, ItemCatalog
from gflowtrl.checks import COUNT, check_choice, check_number, check_type
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

#: Default prompt of the language model. `{history}` is replaced by the titles, oldest first, one per line.
TEMPLATE = "A customer bought these products, the oldest first:\n{history}\nThe next product that the customer bought:"


class TitleLikelihoodReward(Reward):
    """Likelihood of the item's *title* under a frozen language model that reads the titles of the history.

    This is the language-model variant of r_y in GFlowGR (arXiv 2506.16114). It uses the model's world knowledge, not
    the semantic ids, and it also distinguishes items without interactions. Reads the column `history`.

    Cost: each prompt is read once per row, and the tokens of each drawn title are read after the cached prompt.
    Scoring all items reads as many titles per row as the catalog has items. `score_items` is therefore meant for small
    catalogs and must be enabled with `all_items`.

    Args:
        model: a causal language model with ordinary (not sharded) weights. Encoder-decoders are not supported.
        tokenizer: tokenizer of the model. It is independent of the tokenizer of the semantic ids.
        titles: the title of every item of the catalog.
        template: text that contains `{history}`. The title follows it after a space.
        max_history_items: number of last items of the history that are read.
        max_title_words: longer titles are truncated, both in the history and as the scored title.
        normalize: "mean" is the geometric mean of the token probabilities of the title, in (0, 1], which does not
            favor short titles. "sum" is the probability of the whole title, which is tiny and very peaked.
        batch_size: titles per forward pass. Memory grows with batch_size x tokens per title x vocabulary.
        all_items: allow exact flows and the sampler "reward" to score all items at every step.

    Raises:
        ValueError: invalid options; an item without a title; a prompt that is longer than the model's positions.
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
        check_type("model", model, nn.Module, "a causal language model")
        check_type("titles", titles, Mapping, "a dictionary {item: title}")
        attention = attention_implementation(model.config)
        if model.config.is_encoder_decoder or "flash" in attention:
            raise ValueError(
                f"The model of TitleLikelihoodReward is {type(model).__name__} with {attention!r} attention; it must "
                f"be a causal language model with attn_implementation='sdpa' or 'eager'."
            )
        check_causal(model)
        self.model, self.text_tokenizer = model, tokenizer
        self.titles, self.template = titles, template
        self.max_history_items, self.max_title_words = max_history_items, max_title_words
        self.normalize, self.batch_size, self.scores_all_items = normalize, batch_size, all_items

    def _prepare(self, catalog: ItemCatalog) -> None:
        untitled = [item for item in catalog.items if not str(self.titles.get(item) or "").split()]
        if untitled:
            raise ValueError(
                f"{self._owner} needs the title of every item, but {len(untitled)} of {len(catalog)} items have no "
                f"title, for example {untitled[0]!r}. Add the missing titles."
            )

    def score_items(self, step: Step) -> Tensor:
        """Return `(B, items)`. Reads the titles of all items for each row."""
        histories, size = step.histories(self._owner), len(self._bound_catalog())
        return self._likelihoods(histories, torch.arange(size).expand(len(histories), -1), step.device)

    def score_leaves(self, step: Step, leaves: Tensor) -> Tensor:
        """Return `(B, K)`. A title that occurs several times in a row is read once."""
        catalog, histories = self._bound_catalog(), step.histories(self._owner)
        members = {leaf: catalog.index_of(catalog.items_of(leaf)).tolist() for leaf in leaves.unique().tolist()}
        rows = [list(dict.fromkeys(item for leaf in row for item in members[leaf])) for row in leaves.tolist()]
        items = _pad(rows)
        return self._fold_some(leaves, items, self._likelihoods(histories, items, leaves.device))

    # -------------------------------------------------------------------------------------------- likelihood of titles
    def _likelihoods(self, histories: Sequence[Sequence[Item]], items: Tensor, device: torch.device) -> Tensor:
        """Return the likelihood `(B, C)` of the titles of `items (B, C)`, positions padded with -1. Padding gets 0."""
        distinct, inverse = items.unique(return_inverse=True)
        texts = [f" {self._title(self.catalog.items[i])}" if i >= 0 else "" for i in distinct.tolist()]
        tokens = _pad(self.text_tokenizer(texts, add_special_tokens=False)["input_ids"]).to(device)
        prompts = self.text_tokenizer([self._prompt(history) for history in histories])["input_ids"]
        rows = max(self.batch_size // items.shape[1], 1)
        chunks = []
        with frozen(self.model, device):
            for start in range(0, len(histories), rows):
                titles = tokens[inverse[start : start + rows].to(device)]
                ids = _pad(prompts[start : start + rows], "left").to(device)
                self._check_length(ids.shape[1] + titles.shape[2])
                batch = {"input_ids": ids.clamp(min=0), "attention_mask": (ids >= 0).long()}
                chunks.append(title_log_probs(self.model, batch, titles, max(self.batch_size // len(titles), 1)))
        log_probs, is_token = torch.cat(chunks), (tokens >= 0)[inverse.to(device)]
        total = log_probs.sum(-1)
        if self.normalize == "mean":
            total = total / is_token.sum(-1).clamp(min=1)
        return torch.where(is_token.any(-1), total.exp(), 0.0)

    def _prompt(self, history: Sequence[Item]) -> str:
        titles = [f"- {self._title(item)}" for item in history[-self.max_history_items :]]
        return self.template.replace("{history}", "\n".join(titles))

    def _title(self, item: Item) -> str:
        if item not in self.titles:
            raise ValueError(f"{self._owner} has no title for item {item!r} of a history; add it to titles.")
        return " ".join(str(self.titles[item]).split()[: self.max_title_words])

    def _check_length(self, length: int) -> None:
        limit = getattr(self.model.config, "max_position_embeddings", None)
        if limit is not None and length > limit:
            raise ValueError(
                f"{self._owner}: a prompt and a title have {length} tokens, but the model has {limit} positions. "
                f"Lower max_history_items ({self.max_history_items}) or max_title_words ({self.max_title_words})."
            )

    @classmethod
    def check_spec(cls, spec: Mapping[str, Any]) -> None:
        if not isinstance(spec.get("model"), str):
            raise ValueError("model must name the language model that reads the titles, for example its folder.")
        _check_options(**spec)

    @classmethod
    def needs(cls, spec: Mapping[str, Any]) -> set[str]:
        return {"titles", "language_model"}

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
    """Compute the log-probability of every token of several continuations per prompt. Each prompt is read once.

    Args:
        model: a causal language model.
        prompts: left-padded `{"input_ids": (B, P), "attention_mask": (B, P)}`.
        titles: `(B, C, T)` token ids, padded with -1 on the right.
        chunk: continuations of a prompt per forward pass. Each one sees the prompt and itself, but not the others.

    Returns:
        `(B, C, T)`, 0 on padding. Equal to scoring every full sequence separately.
    """
    decoder = CausalDecoder(model, prompts)
    first = decoder.root_logits[:, :, None].log_softmax(-1)
    batch, width, device = len(titles), titles.shape[2] - 1, titles.device
    chunks = []
    for part in titles.split(chunk, 1):
        count, tokens = part.shape[1], part.clamp(min=0)
        log_probs = first.expand(-1, count, -1, -1).gather(-1, tokens[:, :, :1, None]).squeeze(-1)
        if width:
            # The last token of a title predicts nothing, so it is not an input.
            visible = separate_branches(count, width, device).expand(batch, -1, -1)
            steps = torch.arange(width, device=device).repeat(count)
            logits = decoder.feed(tokens[:, :, :-1].reshape(batch, -1), visible, steps)
            logits = logits.view(batch, count, width, -1)
            decoder.restart()
            chosen = logits.gather(-1, tokens[:, :, 1:, None]).squeeze(-1).float()
            log_probs = torch.cat([log_probs, chosen - logits.float().logsumexp(-1)], 2)
        chunks.append(log_probs.masked_fill(part < 0, 0.0))
    return torch.cat(chunks, 1)


def _check_options(**options: Any) -> None:
    """Check options of `TitleLikelihoodReward` before a model is loaded. Missing options have valid defaults.

    Raises:
        ValueError: an option is invalid.
    """
    template = options.get("template", TEMPLATE)
    if "{history}" not in template:
        raise ValueError(f"The template of TitleLikelihoodReward is {template!r}; it must contain {{history}}.")
    for name in ("max_history_items", "max_title_words", "batch_size"):
        check_number(f"{name} of TitleLikelihoodReward", options.get(name, 1), COUNT)
    check_choice("normalize", options.get("normalize", "mean"), ("mean", "sum"))


def _pad(rows: Sequence[Sequence[int]], side: str = "right") -> Tensor:
    return pad_sequence([torch.tensor(row, dtype=torch.long) for row in rows], True, -1, side)
