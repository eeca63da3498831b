"""Prompt encoding, collators and SFT rows. This module alone defines the plain prompt format.

A plain prompt is `[bos]` and the tokens of the last `max_history_items` items. Supervised training, fine-tuning,
decoding and evaluation all use `item_tokens`, so their prompts cannot differ.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from datasets import Dataset
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from gflowtrl.catalog import Item, ItemCatalog
from gflowtrl.checks import COUNT, check_number, check_text, check_type, short_repr

from .interactions import flatten
from .sequences import ranges
from .splits import ragged
from .windows import RowWindows, Windows, window_bounds


IGNORED_LABEL = -100
WINDOWS_AT_ONCE = 1 << 16  # that are tokenized at a time


def item_tokens(
    catalog: ItemCatalog, histories: Sequence[Sequence[Item]], table: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Concatenate the tokens of all items of all histories, with one gather and no loop over tokens.

    Args:
        catalog: the catalog of the items.
        histories: lists of items.
        table: `(history items, W)` tokens of each item, right-padded with -1; by default the semantic ids.

    Returns:
        tokens (T,), the row of each token (T,), and the position of its item in that row (T,); all long, on the CPU.

    Raises:
        ValueError: for an item that is neither in the catalog nor retired; the message names its row.
    """
    try:
        items = catalog.history_index_of(list(chain.from_iterable(histories)))
    except ValueError as error:
        row = catalog.readable_items(histories)[1][0][0]
        raise ValueError(f"The history in row {row} cannot be read. {error}") from None
    lengths = torch.tensor([len(history) for history in histories], dtype=torch.long)
    return tokens_of((catalog.history_token_ids if table is None else table)[items], lengths)


def tokens_of(tokens: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the tokens of consecutive rows of items as in `item_tokens`.

    Args:
        tokens: `(items of all rows, W)` tokens of each item, right-padded with -1.
        lengths: `(rows,)` items per row.
    """
    present = tokens >= 0
    row = torch.repeat_interleave(lengths)
    position = torch.arange(len(row)) - (lengths.cumsum(0) - lengths)[row]
    per_item = present.sum(1)
    return tokens[present], row.repeat_interleave(per_item), position.repeat_interleave(per_item)


@dataclass(frozen=True)
class PromptFormat:
    """Format of text prompts.

    Attributes:
        template: the prompt, with `{history}` as the placeholder for the items.
        item: one item, with `{title}`, `{semantic_id}` or both. Items are concatenated without a separator, so include
            one at the end. The semantic id is its tokens, joined by spaces.
        chat: whether to pass the template through the tokenizer's chat template as the user message; the semantic id
            is the assistant's answer.
        system: system message of a chat.
        max_title_words: maximum words per title; longer titles are cut.
        untitled: replacement for a missing title; None: a missing title is an error.

    Raises:
        ValueError: if a placeholder is missing, a text is not text, or a system message is given without a chat.
        TypeError: if `chat` is not a truth value.
    """

    template: str = "Bought, oldest first:\n{history}Next:"
    item: str = "{title} {semantic_id}\n"
    chat: bool = False
    system: str | None = None
    max_title_words: int = 12
    untitled: str | None = None

    def __post_init__(self) -> None:
        for name in ("template", "item", "system", "untitled"):
            check_text(name, getattr(self, name), optional=name in ("system", "untitled"))
        check_type("chat", self.chat, bool, "True or False")
        if self.template.count("{history}") != 1:
            raise ValueError(f"template is {self.template!r}; it must contain {{history}} exactly once.")
        if "{title}" not in self.item and "{semantic_id}" not in self.item:
            raise ValueError(f"item is {self.item!r}; it must contain {{title}} or {{semantic_id}}.")
        if self.system is not None and not self.chat:
            raise ValueError("system was given, but only a chat has a system message. Set chat=True.")
        check_number("max_title_words", self.max_title_words, COUNT)


class PromptEncoder:
    """Encode histories as a left-padded batch of prompts.

    If the tokenizer has no `bos` token, a prompt is the tokens of its items alone. If it has no padding token, `eos`
    or 0 fills the masked positions.

    Args:
        catalog: source of the token ids. Prompts are created on the CPU, whatever the device of the catalog's tree.
        tokenizer: source of the `bos` and padding tokens.
        max_history_items: number of most recent items of a history that a prompt contains.

    Attributes:
        format: format of text prompts; None for plain prompts.
        head, tail: tokens before and after those of the items.
        table: `(history items, W)` tokens of each of `catalog.history_items`, right-padded with -1.
    """

    def __init__(self, catalog: ItemCatalog, tokenizer: PreTrainedTokenizerBase, max_history_items: int = 20):
        check_type("catalog", catalog, ItemCatalog, "an ItemCatalog")
        check_type("tokenizer", tokenizer, PreTrainedTokenizerBase, "a tokenizer of transformers")
        check_number("max_history_items", max_history_items, COUNT)
        self.catalog = catalog
        self.max_history_items = max_history_items
        self.head = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
        self.tail: list[int] = []
        self.table = catalog.history_token_ids
        self.format: PromptFormat | None = None
        self.padding = next((t for t in (tokenizer.pad_token_id, tokenizer.eos_token_id) if t is not None), 0)

    @property
    def largest_token(self) -> int:
        """Largest token id that a prompt can contain; the model must have an embedding for it."""
        return max([*self.head, *self.tail, self.padding, int(self.table.max())])

    def __call__(self, histories: Sequence[Sequence[Item]]) -> dict[str, Tensor]:
        """Encode B histories.

        Returns:
            `input_ids` and `attention_mask`, long (B, P), left-padded to the longest prompt.

        Raises:
            ValueError: for an empty batch, an empty history or an unknown item; the message names the row.
        """
        _check_not_empty(histories)
        prompts, _ = self._encode([history[-self.max_history_items :] for history in histories], self.tail)
        return prompts

    def encode_windows(self, windows: Windows) -> dict[str, Tensor]:
        """Encode B prompts as prefixes of U trunks.

        Args:
            windows: prompts and their targets, as `Windows.pack` returns them.

        Returns:
            `input_ids` and `attention_mask`, long (U, T), the left-padded trunks; `trunk` and `cut`, long (B,), the
            trunk of each prompt and how many of its tokens the prompt sees (`gflowtrl.policy.Prompts`).

        Raises:
            ValueError: if the format has text after the history, so that no prompt is a prefix of another, or for an
                unknown item.
        """
        _check_not_empty(windows.histories)
        if self.tail:
            raise ValueError("Text follows the history, so no prompt is a prefix of another. Encode them separately.")
        # The target of a prompt is scored on the trunk tokens after it, so the last token of a trunk is not needed.
        # Text prompts contain more than semantic ids, so their targets cannot be scored on the trunk.
        items = windows.items if self.format is None else windows.prompts
        prompts, ends = self._encode(items, [])
        if self.format is None:
            prompts = {name: values[:, :-1] for name, values in prompts.items()}
        return prompts | {"trunk": windows.trunk, "cut": ends[windows.trunk, windows.seen - 1]}

    def _encode(self, histories: Sequence[Sequence[Item]], tail: Sequence[int]) -> tuple[dict[str, Tensor], Tensor]:
        """Encode all items between head and tail.

        Returns:
            The left-padded prompts, and the end of each item, `(B, items)`, counted from the row's first token.
        """
        tokens, row, position = item_tokens(self.catalog, histories, self.table)
        head, tail_size = len(self.head), len(tail)
        lengths = head + torch.bincount(row, minlength=len(histories)) + tail_size
        columns = torch.arange(int(lengths.max()))
        offset = columns - (len(columns) - lengths)[:, None]  # from the start of the prompt; negative in the padding
        input_ids = torch.full(offset.shape, self.padding)
        input_ids[(offset >= 0) & (offset < head)] = torch.tensor(self.head * len(histories), dtype=torch.long)
        input_ids[(offset >= head) & (columns < len(columns) - tail_size)] = tokens
        input_ids[:, len(columns) - tail_size :] = torch.tensor(tail, dtype=torch.long)
        sizes = torch.zeros(len(histories), max(map(len, histories)), dtype=torch.long)
        sizes.index_put_((row, position), torch.ones_like(row), accumulate=True)
        return {"input_ids": input_ids, "attention_mask": (offset >= 0).long()}, head + sizes.cumsum(1)

    @property
    def max_length(self) -> int:
        """Tokens in the longest prompt of distinct items; items repeat only if the catalog is too small."""
        lengths = (self.table >= 0).sum(1).sort(descending=True).values
        items = lengths[torch.arange(self.max_history_items) % len(lengths)]
        return len(self.head) + int(items.sum()) + len(self.tail)

    def longest_histories(self) -> list[list[Item]]:
        """Return two histories for trying out a model: `max_history_items` long items, and a single item.

        The long items have the most tokens, are spread evenly over the catalog, and repeat only if there are too few.
        """
        lengths, count = (self.table >= 0).sum(1), self.max_history_items
        shortest = lengths.topk(min(count, len(lengths))).values[-1]
        candidates = (lengths >= shortest).nonzero().flatten()
        chosen = candidates[torch.linspace(0, len(candidates) - 1, count).long()]
        history = [self.catalog.history_items[index] for index in chosen.tolist()]
        return [history, history[:1]]


def _check_not_empty(histories: Sequence[Sequence[Item]]) -> None:
    if not hasattr(histories, "__len__"):
        raise TypeError(f"histories is of type {type(histories).__name__}; it must be a list of lists of items.")
    if not len(histories):
        raise ValueError("There is no history to encode: the batch is empty.")
    for row, history in enumerate(histories):
        if isinstance(history, str | Mapping) or not hasattr(history, "__len__"):
            raise TypeError(f"The history in row {row} is {short_repr(history)}; it must be a list of items.")
        if not len(history):
            raise ValueError(f"The history in row {row} is empty. A prompt needs at least one item; drop the row.")


@dataclass(frozen=True, eq=False)
class BatchRows:
    """Columns and windows of the rows of a batch.

    It is not a mapping, so that moving a batch to a device does not search all histories for tensors.

    Attributes:
        columns: dataset columns by name, as lists of length B.
        windows: the items that the prompts contain.
    """

    columns: dict[str, list[Any]]
    windows: Windows


class GroupCollator:
    """Collate dataset rows, one prompt each, into a batch for `Step.from_batch`.

    The batch has `prompts` (separate or windows, see `gflowtrl.policy.Prompts`), `row_ids`, long (B,), and `rows`, a
    `BatchRows`.

    Args:
        encoder: a `PromptEncoder`, or any callable from histories to `input_ids` and `attention_mask`.
        seen: how many items the prompt of each row contains; None: the most recent items of its history, as many as
            `encoder` uses.
        shared: whether prompts of one window share a trunk; the encoder needs a method `encode_windows`.
        max_rows: maximum rows per trunk, because the cost of attention over a trunk and its branches grows
            quadratically.
    """

    def __init__(
        self,
        encoder: PromptEncoder,
        seen: RowWindows | None = None,
        shared: bool = False,
        max_rows: int | None = None,
    ):
        self.encoder, self.seen, self.shared, self.max_rows = encoder, seen, shared, max_rows

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
        for column in ("row_id", "history", "target"):
            if column not in rows[0]:
                raise ValueError(
                    f"The rows have no column {column!r}, only {', '.join(sorted(rows[0]))}. Create rows with "
                    "leave_one_out, and set remove_unused_columns=False in the training arguments."
                )
        columns = {column: [row[column] for row in rows] for column in rows[0]}
        row_ids, histories = columns["row_id"], columns["history"]
        if self.seen is not None:
            seen = self.seen.seen_by(row_ids)
            histories = [history[-count:] for history, count in zip(histories, seen, strict=True)]
        if self.shared:
            windows = Windows.pack(histories, columns["target"], self.max_rows)
            prompts = self.encoder.encode_windows(windows)
        else:
            limit = getattr(self.encoder, "max_history_items", 0)  # 0: no limit
            windows, prompts = Windows.separate([h[-limit:] for h in histories]), self.encoder(histories)
        return {"prompts": prompts, "row_ids": torch.tensor(row_ids), "rows": BatchRows(columns, windows)}


class TargetCollator:
    """Collate rows `{"history", "target", ...}` for the SFT of encoder-decoders, from history to semantic id.

    The batch has `input_ids` and `attention_mask` `(B, P)` as returned by `encoder`, and `labels` `(B, L)`, the tokens
    of the target right-padded with -100. Decoding follows the prefix tree, so no end token is needed.
    """

    def __init__(self, encoder: PromptEncoder):
        self.encoder = encoder

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
        catalog = self.encoder.catalog
        tokens = catalog.item_token_ids[catalog.index_of([row["target"] for row in rows])]
        labels = tokens.masked_fill(tokens < 0, IGNORED_LABEL)
        return {**self.encoder([row["history"] for row in rows]), "labels": labels}


def sft_dataset(
    sequences: Sequence[Sequence[Item]],
    catalog: ItemCatalog,
    tokenizer: PreTrainedTokenizerBase,
    max_history_items: int = 20,
) -> Dataset:
    """Create tokenized rows for TRL's `SFTTrainer`: one row per window of each user's sequence (see `user_windows`).

    A row is the prompt of its items. The labels are the tokens of the items that are targets in this window, and -100
    at `bos`, at a user's first item and at targets of an earlier window, so each target is learned exactly once.
    Decoding follows the prefix tree, so no end token is needed.

    Returns:
        A dataset with the columns `input_ids` and `labels`.
    """
    flat, offsets = flatten(sequences, catalog.items)
    row, starts, first_targets, stops = window_bounds(np.diff(offsets), max_history_items)
    if not len(row):
        raise ValueError("No sequence has two items or more, so there is nothing to predict from a history.")
    parts = []
    for begin in range(0, len(row), WINDOWS_AT_ONCE):
        part = slice(begin, begin + WINDOWS_AT_ONCE)
        lengths = stops[part] - starts[part]
        items = torch.from_numpy(flat[ranges(offsets[row[part]] + starts[part], offsets[row[part]] + stops[part])])
        tokens, window, position = tokens_of(catalog.item_token_ids[items], torch.from_numpy(lengths))
        first_target = torch.from_numpy(first_targets[part] - starts[part])
        labels = torch.where(position >= first_target[window], tokens, IGNORED_LABEL).numpy()
        inputs, lengths = tokens.numpy(), torch.bincount(window, minlength=len(lengths)).numpy()
        if tokenizer.bos_token_id is not None:
            places = lengths.cumsum() - lengths
            inputs = np.insert(inputs, places, tokenizer.bos_token_id)
            labels = np.insert(labels, places, IGNORED_LABEL)
            lengths = lengths + 1
        columns = {"input_ids": inputs, "labels": labels}
        table = {name: ragged(pa.array(values, pa.int32()), lengths) for name, values in columns.items()}
        parts.append(pa.table(table))
    return Dataset(pa.concat_tables(parts))
