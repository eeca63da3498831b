"""Histories to prompts: the one place where the plain prompt format is defined.

It is `[bos]` and the tokens of the last `max_history_items` items. Supervised training, fine-tuning, decoding and
evaluation all come through `item_tokens` and so cannot differ.
"""

from collections.abc import Sequence
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
from gflowtrl.checks import COUNT, check_number

from .splits import ragged, user_windows
from .windows import RowWindows, Windows


IGNORED_LABEL = -100


def item_tokens(
    catalog: ItemCatalog, histories: Sequence[Sequence[Item]], table: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """The tokens of all items of all histories, end to end; one gather, no walk over tokens.

    Args:
        catalog, histories: the items, and lists of them.
        table: `(items, W)` tokens of each item, padded with -1 at the right; by default the semantic ids.

    Returns:
        tokens (T,), the row that each belongs to (T,), and its item's place in that row (T,); all long, on the CPU.

    Raises:
        ValueError: for an item that is not in the catalog, with the row it is in.
    """
    try:
        items = catalog.index_of(list(chain.from_iterable(histories)))
    except ValueError as error:
        row = next(row for row, history in enumerate(histories) if any(item not in catalog for item in history))
        raise ValueError(f"The history in row {row} cannot be read. {error}") from None
    tokens = (catalog.item_token_ids if table is None else table)[items]
    present = tokens >= 0
    lengths = torch.tensor([len(history) for history in histories], dtype=torch.long)
    row = torch.repeat_interleave(lengths)
    place = torch.arange(len(row)) - (lengths.cumsum(0) - lengths)[row]
    per_item = present.sum(1)
    return tokens[present], row.repeat_interleave(per_item), place.repeat_interleave(per_item)


@dataclass(frozen=True)
class PromptFormat:
    """How a history becomes text.

    Attributes:
        template: the prompt, with `{history}` where the items stand.
        item: one item, with `{title}`, `{semantic_id}` or both; items follow each other as they are, so it ends with
            what shall separate them. The semantic id is its tokens, joined by spaces.
        chat: hand the template to the tokenizer's chat template as the user's message; the id is the answer.
        system: the system message of a chat.
        max_title_words: titles are cut to so many words.
        untitled: what stands for a title that is missing; None: that is an error.

    Raises:
        ValueError: a template or item without its place, or a system message without a chat.
    """

    template: str = "Bought, oldest first:\n{history}Next:"
    item: str = "{title} {semantic_id}\n"
    chat: bool = False
    system: str | None = None
    max_title_words: int = 12
    untitled: str | None = None

    def __post_init__(self) -> None:
        if self.template.count("{history}") != 1:
            raise ValueError(f"The template must hold {{history}} once, but it is {self.template!r}.")
        if "{title}" not in self.item and "{semantic_id}" not in self.item:
            raise ValueError(f"item must hold {{title}} or {{semantic_id}}, but it is {self.item!r}.")
        if self.system is not None and not self.chat:
            raise ValueError("system was given, but only a chat has a system message; set chat=True.")
        check_number("max_title_words", self.max_title_words, COUNT)


class PromptEncoder:
    """Turns histories into a left-padded batch of prompts.

    Where the tokenizer has no `bos` token the prompt is the history's tokens alone. Where it has no padding token,
    `eos` or 0 fills the masked places.

    Args:
        catalog: gives the token ids. Prompts are made on the CPU wherever the catalog's tree is.
        tokenizer: gives `bos` and padding.
        max_history_items: how many items of a history, the last ones, are used.

    Attributes:
        format: of prompts in words; None for the plain ones.
        head, tail: the tokens before and after those of the items.
        table: `(items, W)` tokens of each item, padded with -1 at the right.
    """

    def __init__(self, catalog: ItemCatalog, tokenizer: PreTrainedTokenizerBase, max_history_items: int = 20):
        check_number("max_history_items", max_history_items, COUNT)
        self.catalog = catalog
        self.max_history_items = max_history_items
        self.head = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
        self.tail: list[int] = []
        self.table = catalog.item_token_ids
        self.format: PromptFormat | None = None
        self.padding = next((t for t in (tokenizer.pad_token_id, tokenizer.eos_token_id) if t is not None), 0)

    @property
    def largest_token(self) -> int:
        """The largest number of a token that a prompt can hold; the model must embed it."""
        return max([*self.head, *self.tail, self.padding, int(self.table.max())])

    def __call__(self, histories: Sequence[Sequence[Item]]) -> dict[str, Tensor]:
        """Encode B histories.

        Returns:
            `input_ids` and `attention_mask`, long (B, P), padded at the left to the longest prompt.

        Raises:
            ValueError: for no history at all, an empty one or an unknown item; the message names the row.
        """
        _check_filled(histories)
        prompts, _ = self._encode([history[-self.max_history_items :] for history in histories], self.tail)
        return prompts

    def encode_windows(self, windows: Windows) -> dict[str, Tensor]:
        """Encode B prompts as beginnings of U trunks.

        Args:
            windows: of `Windows.pack`: prompts and their targets.

        Returns:
            `input_ids` and `attention_mask`, long (U, T), the trunks, padded at the left; `trunk` and `cut`, long
            (B,), the trunk of each prompt and how many of its tokens it sees (`gflowtrl.policy.Prompts`).

        Raises:
            ValueError: prompts end with text behind the history, so that none is the beginning of another; or an
                unknown item.
        """
        _check_filled(windows.histories)
        if self.tail:
            raise ValueError("Prompts end with text behind the history, so that none is the beginning of another.")
        # A prompt's target is read off the tokens behind it, for which the last one of all is not needed. Where items
        # are more than their ids, nothing can be read off.
        items = windows.items if self.format is None else windows.prompts
        prompts, ends = self._encode(items, [])
        if self.format is None:
            prompts = {name: values[:, :-1] for name, values in prompts.items()}
        return prompts | {"trunk": windows.trunk, "cut": ends[windows.trunk, windows.seen - 1]}

    def _encode(self, histories: Sequence[Sequence[Item]], tail: Sequence[int]) -> tuple[dict[str, Tensor], Tensor]:
        """Whole sequences of items between head and tail; and where each item ends, counted from a row's first token,
        `(B, items)`, padded with 0."""
        tokens, row, place = item_tokens(self.catalog, histories, self.table)
        head, tail_size = len(self.head), len(tail)
        lengths = head + torch.bincount(row, minlength=len(histories)) + tail_size
        columns = torch.arange(int(lengths.max()))
        at = columns - (len(columns) - lengths)[:, None]  # in the prompt; negative in the padding
        input_ids = torch.full(at.shape, self.padding)
        input_ids[(at >= 0) & (at < head)] = torch.tensor(self.head * len(histories), dtype=torch.long)
        input_ids[(at >= head) & (columns < len(columns) - tail_size)] = tokens
        input_ids[:, len(columns) - tail_size :] = torch.tensor(tail, dtype=torch.long)
        sizes = torch.zeros(len(histories), max(map(len, histories)), dtype=torch.long)
        sizes.index_put_((row, place), torch.ones_like(row), accumulate=True)
        return {"input_ids": input_ids, "attention_mask": (at >= 0).long()}, head + sizes.cumsum(1)

    @property
    def max_length(self) -> int:
        """Tokens of the longest prompt of different items (as far as there are as many as a history may hold)."""
        lengths = (self.table >= 0).sum(1).sort(descending=True).values
        items = lengths[torch.arange(self.max_history_items) % len(lengths)]
        return len(self.head) + int(items.sum()) + len(self.tail)

    def longest_histories(self) -> list[list[Item]]:
        """Two histories to try a model with: `max_history_items` of the longest items, from all over the catalog and
        different ones as far as there are as many, and a single item."""
        lengths, count = (self.table >= 0).sum(1), self.max_history_items
        least = lengths.topk(min(count, len(lengths))).values[-1]
        long = (lengths >= least).nonzero().flatten()
        places = torch.linspace(0, len(long) - 1, count).long()
        chosen = [self.catalog.items[place] for place in long[places].tolist()]
        return [chosen, chosen[:1]]


def _check_filled(histories: Sequence[Sequence[Item]]) -> None:
    if not len(histories):
        raise ValueError("There is no history to encode: the batch is empty.")
    for row, history in enumerate(histories):
        if not len(history):
            raise ValueError(f"The history in row {row} is empty. A prompt needs at least one item: drop it.")


@dataclass(frozen=True, eq=False)
class BatchRows:
    """What is known about the rows of a batch. No mapping, so that nobody looks through all histories for tensors to
    move to a device.

    Attributes:
        columns: every column as a list of length B, under its own name.
        windows: the items that the prompts hold.
    """

    columns: dict[str, list[Any]]
    windows: Windows


class GroupCollator:
    """Collates dataset rows into what becomes a `Step`; a row is one prompt, with its group of trajectories to come.

    The batch has `prompts` (separate ones or windows, `gflowtrl.policy.Prompts`), `row_ids` as long (B,), and `rows`,
    the `BatchRows`.

    Args:
        encoder: a `PromptEncoder`, or anything else that turns histories into `input_ids` and `attention_mask`.
        seen: what the prompts of the rows hold; None: the last items of their histories, as many as `encoder` takes.
        shared: compute prompts that begin one window together; the encoder needs a method `encode_windows`.
        max_rows: how many rows begin one trunk at most; attention over a trunk and all that hangs on it grows with its
            square.
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
                    f"A row has no column {column!r} (it has {', '.join(sorted(rows[0]))}). Make rows with "
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
            longest = getattr(self.encoder, "max_history_items", 0)  # 0: all
            windows, prompts = Windows.separate([h[-longest:] for h in histories]), self.encoder(histories)
        return {"prompts": prompts, "row_ids": torch.tensor(row_ids), "rows": BatchRows(columns, windows)}


class TargetCollator:
    """Collates rows `{"history", "target", ...}` for the SFT of encoder-decoders: history in, the target's id out.

    The batch has `input_ids` and `attention_mask` `(B, P)` as `encoder` makes them, and `labels` `(B, L)`, the tokens
    of the target padded with -100 at the right. As ids are read on the tree of items, no end token is needed.
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
    """Rows for TRL's `SFTTrainer`, already tokenized: one a user, more for a long sequence (see `user_windows`).

    A row is the prompt of its items. The labels are the tokens of the items that are targets in this window, and -100
    at `bos`, a user's first item and what an earlier window has covered: each target of each sequence is learned once.
    As ids are read on the tree of items, no end token is needed.

    Returns:
        A dataset with the columns `input_ids` and `labels`.
    """
    windows = user_windows(sequences, max_history_items)
    if not windows:
        raise ValueError("No sequence has two items or more, so there is nothing to predict from a history.")
    tokens, row, place = item_tokens(catalog, [window.items for window in windows])
    first_target = torch.tensor([window.first_target for window in windows])
    labels = torch.where(place >= first_target[row], tokens, IGNORED_LABEL).numpy()
    inputs, lengths = tokens.numpy(), torch.bincount(row, minlength=len(windows)).numpy()
    if tokenizer.bos_token_id is not None:
        starts = lengths.cumsum() - lengths
        inputs, labels = np.insert(inputs, starts, tokenizer.bos_token_id), np.insert(labels, starts, IGNORED_LABEL)
        lengths = lengths + 1
    columns = {"input_ids": inputs, "labels": labels}
    return Dataset(pa.table({name: ragged(pa.array(values), lengths) for name, values in columns.items()}))
