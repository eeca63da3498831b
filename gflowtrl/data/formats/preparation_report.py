"""The report of a preparation."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from .log import InteractionLog
from .source import Source


@dataclass
class Preparation:
    """Report of `prepare`; `preparation.json` has the same content.

    Attributes:
        name: name of the data.
        format: the raw format.
        files: the files that were read, interactions first.
        settings: settings of the filters.
        lines: number of lines of interactions.
        malformed: number of malformed lines, which were left out.
        malformed_lines: the first few malformed lines of each file, with the reason.
        below_min_rating: number of interactions with too low a rating.
        duplicates: number of interactions of a user with an item that the user had taken before.
        tied_share: share of adjacent interactions of a user with the same time, which keep the order of the file; 1 if
            the file has no times.
        steps: numbers of interactions, users and items after each step.
        item_lines: number of lines of items.
        malformed_items: number of malformed lines of items, which were left out.
        malformed_item_lines: the first few of them in each file, with the reason.
        repeated_items: number of lines for an item that an earlier line described.
        unreadable_items: number of items of the result whose features contain bytes that are invalid in the encoding.
        items_without_metadata: number of items of the result that no line describes.
        items_without_title: number of items of the result without a title, including those without metadata.
        exposed_users: number of users of the log with exposed items.
        exposed_left_out: number of exposed items that are not in the catalog.
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
    exposed_users: int = 0
    exposed_left_out: int = 0

    def summary(self) -> str:
        """Return a few lines for a terminal: the counts after each step, and what was left out."""
        steps = [
            f"{step['step']:>18}: {step['interactions']:>13,} interactions {step['users']:>11,} users "
            f"{step['items']:>10,} items"
            for step in self.steps
        ]
        notes = [
            f"{self.malformed:,} of {self.lines:,} lines malformed",
            f"{self.below_min_rating:,} rated too low",
            f"{self.duplicates:,} duplicates",
            f"{self.tied_share:.0%} of adjacent interactions at the same time"
            if self.tied_share < 1
            else "times are equal or missing, so interactions keep the order of the file",
            f"{self.items_without_metadata:,} items without metadata, {self.items_without_title:,} without a title",
        ]
        if self.exposed_users:
            notes.append(
                f"{self.exposed_users:,} users with exposed items, {self.exposed_left_out:,} exposed items of no item "
                f"of the catalog left out"
            )
        if self.unreadable_items:
            notes.append(f"{self.unreadable_items:,} items with unreadable text, probably in another encoding")
        own_columns = self.format in ("csv", "jsonl", "parquet", "table") and self.item_lines > 0
        if own_columns and self.items_without_title == self.steps[-1]["items"]:
            notes.append("no item has a title: give the title column with --title_column, or Columns(title=...)")
        return "\n".join([f"{self.name} ({self.format})", *steps, "; ".join(notes), *self.malformed_lines])

    def take_interactions(self, sources: Sequence[Source]) -> None:
        """Record the lines and malformed lines of the interactions files."""
        self.lines, self.malformed, self.malformed_lines = _malformed(sources)

    def take_items(self, sources: Sequence[Source]) -> None:
        """Record the lines and malformed lines of the items files."""
        self.item_lines, self.malformed_items, self.malformed_item_lines = _malformed(sources)

    def count(self, step: str, log: InteractionLog) -> None:
        """Record the counts after `step`."""
        self.steps.append({"step": step, **log.counts()})


def _malformed(sources: Sequence[Source]) -> tuple[int, int, list[str]]:
    """Return the numbers of lines and of malformed lines, and the first few of these, with the file name if needed."""
    named = [
        f"{source.path}, {line}" if len(sources) > 1 else line for source in sources for line in source.malformed_lines
    ]
    return sum(source.lines for source in sources), sum(source.malformed for source in sources), named
