"""`gflowtrl sft`: the stage `sft` of a recipe."""

from __future__ import annotations

from collections.abc import Sequence

from . import train


def main(arguments: Sequence[str]) -> int:
    return train.main(arguments, "sft")
