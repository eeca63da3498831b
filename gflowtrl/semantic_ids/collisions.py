"""Collisions, items with equal codes: reassigned, resolved by an additional level, or kept."""

import logging
from collections import Counter
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from gflowtrl.catalog.rows import sorted_rows
from gflowtrl.checks import check_choice

from .residual import ResidualQuantizer


logger = logging.getLogger(__name__)
POLICIES = ("reassign", "level", "keep")


def colliding(codes: Tensor) -> Tensor:
    """Return which rows of codes (N, levels) occur more than once, bool (N,)."""
    _, row, counts = codes.unique(dim=0, return_inverse=True, return_counts=True)
    return counts[row] > 1


def resolve_collisions(
    codes: Tensor,
    vectors: Tensor | np.ndarray,
    quantizer: ResidualQuantizer,
    how: str = "reassign",
    taken: Tensor | None = None,
) -> Tensor:
    """Make codes unique, or keep and count the collisions.

    Args:
        codes: long (N, levels).
        vectors: (N, D), the vectors that were encoded.
        quantizer: the fitted quantizer, which defines the distances between codes.
        how: `"reassign"`: among items with the same id, the item nearest to it keeps it. The others, nearest first,
            move to the nearest free code of the last level or, if that level is full below their prefix, to the
            nearest code one level up that is not full, and so on. `"level"`: an additional level numbers the items of
            each id from 0 (TIGER, arXiv 2305.05065, section 3.1); all items get it. `"keep"`: codes do not change, and
            the number of collisions is logged.
        taken: codes in use by other items, in the form that this function returns. Not used by `"keep"`.

    Returns:
        Codes, long (N, levels), or (N, levels + 1) for `"level"`. They are unique and not in `taken`, except for
        `"keep"`.

    Raises:
        ValueError: for an unknown policy, or if there are more items than ids.
    """
    check_choice("collisions", how, POLICIES)
    if how == "keep":
        if number := int(colliding(codes).sum()):
            logger.warning("%d of %d items share their semantic id with another one.", number, len(codes))
        return codes
    if taken is None:
        taken = codes.new_empty((0, codes.shape[1] + (how == "level")))
    return _append_level(codes, taken) if how == "level" else _reassign(codes, vectors, quantizer, taken)


def check_room(num_items: int, quantizer: ResidualQuantizer) -> None:
    """Raise a ValueError if a quantizer, fitted or not, has too few ids for unique ones."""
    ids = quantizer.num_codes**quantizer.num_levels
    if num_items > ids:
        raise ValueError(
            f"{num_items} items cannot have unique ids with {quantizer.num_levels} levels of {quantizer.num_codes} "
            f"codes, which give {ids} ids. Add a level or codes, or choose collisions='level'."
        )


class _TakenCodes:
    """Codes in use (N, levels), sorted, so that prefixes of a million items are found by binary search."""

    def __init__(self, taken: Tensor):
        ordered = sorted_rows(taken)[0] if len(taken) else taken
        self.columns = [column.contiguous().numpy() for column in ordered.unbind(1)]
        self.size = len(taken)

    def range(self, prefix: tuple[int, ...]) -> tuple[int, int]:
        """Return where the rows with a prefix begin and end."""
        begin, end = 0, self.size
        for code, column in zip(prefix, self.columns, strict=False):
            part = column[begin:end]
            begin, end = begin + int(part.searchsorted(code)), begin + int(part.searchsorted(code, "right"))
        return begin, end

    def count(self, prefix: tuple[int, ...]) -> int:
        """Return the number of rows with a prefix."""
        begin, end = self.range(prefix)
        return end - begin

    def next_number(self, prefix: tuple[int, ...]) -> int:
        """Return the smallest number above the last codes of all rows with a prefix of all other levels."""
        begin, end = self.range(prefix)
        return int(self.columns[-1][end - 1]) + 1 if end > begin else 0


def _append_level(codes: Tensor, taken: Tensor) -> Tensor:
    """Append the number of each row among equal rows, starting after the numbers in `taken`."""
    in_use, next_number = _TakenCodes(taken), {}
    numbers = []
    for path in map(tuple, codes.tolist()):
        number = next_number.get(path, in_use.next_number(path))
        numbers.append(number)
        next_number[path] = number + 1
    return torch.cat([codes, torch.tensor(numbers, dtype=torch.long)[:, None]], dim=1)


def _reassign(codes: Tensor, vectors: Tensor | np.ndarray, quantizer: ResidualQuantizer, taken: Tensor) -> Tensor:
    check_room(len(codes) + len(taken), quantizer)
    latents = quantizer.latents(vectors)
    errors = (latents - quantizer.quantized(codes)).norm(dim=1)
    paths = [tuple(path) for path in codes.tolist()]
    in_use = _TakenCodes(taken)
    used: Counter[tuple[int, ...]] = Counter()  # number of new ids below each prefix

    def use(path: Sequence[int]) -> None:
        used.update(tuple(path[:depth]) for depth in range(len(path) + 1))

    def number_in_use(prefix: tuple[int, ...]) -> int:
        return used[prefix] + in_use.count(prefix)

    def is_full(prefix: tuple[int, ...]) -> bool:
        return number_in_use(prefix) >= quantizer.num_codes ** (quantizer.num_levels - len(prefix))

    moving = []
    for row in errors.argsort(stable=True).tolist():
        if number_in_use(paths[row]):
            moving.append(row)
        else:
            use(paths[row])
    for row in moving:  # in a second pass, so that no item moves to the id that another item keeps
        paths[row] = _nearest_free(latents[row], paths[row], quantizer, is_full)
        use(paths[row])
    return torch.tensor(paths, dtype=torch.long).reshape(codes.shape)


def _nearest_free(
    latent: Tensor, path: tuple[int, ...], quantizer: ResidualQuantizer, is_full: Callable[[tuple[int, ...]], bool]
) -> tuple[int, ...]:
    """Return a free id with the longest possible prefix of `path`, then the nearest codes that are not full."""
    prefix = path[:-1]
    while is_full(prefix):
        prefix = prefix[:-1]
    while len(prefix) < len(path):
        residual = latent - quantizer.quantized(torch.tensor([prefix], dtype=torch.long))
        distances = (residual - quantizer.codebooks[len(prefix)]).norm(dim=1)
        nearest = distances.argsort(stable=True).tolist()
        prefix = next((*prefix, code) for code in nearest if not is_full((*prefix, code)))
    return prefix
