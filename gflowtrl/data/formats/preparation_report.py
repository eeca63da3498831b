"""What a preparation did, in numbers."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from .log import InteractionLog
from .source import Source


@dataclass
class Preparation:
    """What `prepare` did, in numbers; `preparation.json` holds the same.

    Attributes:
        name: name of the data.
        format: the raw format.
        files: the files that were read, interactions first.
        settings: what of the filters was asked for.
        lines: lines of the interactions.
        malformed: how many of them were left out, and `malformed_lines` the first few of each file with the reason.
        below_min_rating: interactions with too low a rating.
        duplicates: interactions of a user with an item that the user had taken before.
        tied_share: share of adjacent interactions of a user with the same time, which keep the file's order; 1 where
            the file has no times.
        steps: interactions, users and items after each step.
        item_lines: lines of the items.
        malformed_items: how many of them were left out, and `malformed_item_lines` the first few of each file.
        repeated_items: lines about an item that an earlier line described.
        unreadable_items: items of the result whose features hold bytes that are no text in the encoding.
        items_without_metadata: items of the result that no line describes.
        items_without_title: items of the result without a title, those without metadata included.
    """

    name: str
    format: str
    files: list[str]
    settings: dict[str, Any]
    lines: int = 0
    malformed: int = 0
    malformed_lines: list[str] = field(default_factory=list)
    below_min_rating: int = 0
    duplicates: int = 0
    tied_share: float = 0.0
    steps: list[dict[str, Any]] = field(default_factory=list)
    item_lines: int = 0
    malformed_items: int = 0
    malformed_item_lines: list[str] = field(default_factory=list)
    repeated_items: int = 0
    unreadable_items: int = 0
    items_without_metadata: int = 0
    items_without_title: int = 0

    def summary(self) -> str:
        """A few lines for a terminal: the counts after each step, and what was left out."""
        steps = [
            f"{step['step']:>18}: {step['interactions']:>13,} interactions {step['users']:>11,} users "
            f"{step['items']:>10,} items"
            for step in self.steps
        ]
        notes = [
            f"{self.malformed:,} of {self.lines:,} lines malformed",
            f"{self.below_min_rating:,} rated too low",
            f"{self.duplicates:,} duplicates",
            f"{self.tied_share:.0%} of adjacent interactions at the same time",
            f"{self.items_without_metadata:,} items without metadata, {self.items_without_title:,} without a title",
        ]
        if self.unreadable_items:
            notes.append(f"{self.unreadable_items:,} items with unreadable text, whose encoding may be another one")
        own_columns = self.format in ("csv", "jsonl", "parquet") and self.item_lines > 0
        if own_columns and self.items_without_title == self.steps[-1]["items"]:
            notes.append("no item has a title: name their column with --title_column, or Columns(title=...)")
        return "\n".join([f"{self.name} ({self.format})", *steps, "; ".join(notes), *self.malformed_lines])

    def take_interactions(self, sources: Sequence[Source]) -> None:
        """Note what was malformed in the files of the interactions."""
        self.lines, self.malformed, self.malformed_lines = _malformed(sources)

    def take_items(self, sources: Sequence[Source]) -> None:
        """Note what was malformed in the files of the items."""
        self.item_lines, self.malformed_items, self.malformed_item_lines = _malformed(sources)

    def count(self, step: str, log: InteractionLog) -> None:
        """Note what is left after `step`."""
        self.steps.append({"step": step, **log.counts()})


def _malformed(sources: Sequence[Source]) -> tuple[int, int, list[str]]:
    """Lines, how many of them are malformed, and the first few of these, of several files each with its name."""
    named = [
        f"{source.path}, {line}" if len(sources) > 1 else line for source in sources for line in source.malformed_lines
    ]
    return sum(source.lines for source in sources), sum(source.malformed for source in sources), named
