"""Items whose codes are equal: moved apart, told apart by a further level, or kept."""

import logging
from collections import Counter
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from .residual import ResidualQuantizer


logger = logging.getLogger(__name__)
POLICIES = ("reassign", "level", "keep")


def colliding(codes: Tensor) -> Tensor:
    """Which rows of codes (N, levels) stand there more than once: bool (N,)."""
    _, row, counts = codes.unique(dim=0, return_inverse=True, return_counts=True)
    return counts[row] > 1


def resolve_collisions(
    codes: Tensor,
    vectors: Tensor | np.ndarray,
    quantizer: ResidualQuantizer,
    how: str = "reassign",
    taken: Tensor | None = None,
) -> Tensor:
    """Codes without collisions, or with those that are wanted.

    Args:
        codes: long (N, levels).
        vectors: (N, D), what the codes are of.
        quantizer: fitted; says which other codes are near.
        how: `"reassign"`: of the items with one id the one stays that is nearest to it; each other one, the nearest
            first, moves to the nearest free code of the last level, and where that level is full below its prefix, to
            the nearest code of the level before it that has room, and so on. `"level"`: a further level counts the
            items of one id from 0 (TIGER, arXiv 2305.05065, section 3.1); all items have it. `"keep"`: nothing
            changes, and the log counts the collisions.
        taken: codes that others have already and keep, in the form that this function returns. Not for `"keep"`.

    Returns:
        long (N, levels), with `"level"` (N, levels + 1). Unique, also against `taken`, but for `"keep"`.

    Raises:
        ValueError: for an unknown policy, or more items than there are ids.
    """
    if how not in POLICIES:
        raise ValueError(f"Collisions can be handled by {', '.join(POLICIES)}, but {how!r} was given.")
    if how == "keep":
        number = int(colliding(codes).sum())
        if number:
            logger.warning("%d of %d items share their semantic id with another one.", number, len(codes))
        return codes
    if taken is None:
        taken = codes.new_empty((0, codes.shape[1] + (how == "level")))
    return _count(codes, taken) if how == "level" else _reassign(codes, vectors, quantizer, taken)


def _count(codes: Tensor, taken: Tensor) -> Tensor:
    """Codes with their number among equal ones; numbers go on where those of `taken` end."""
    following = {}
    for *path, number in taken.tolist():
        following[tuple(path)] = max(following.get(tuple(path), 0), number + 1)
    numbers = []
    for path in map(tuple, codes.tolist()):
        numbers.append(following.get(path, 0))
        following[path] = numbers[-1] + 1
    return torch.cat([codes, torch.tensor(numbers, dtype=torch.long)[:, None]], dim=1)


def _reassign(codes: Tensor, vectors: Tensor | np.ndarray, quantizer: ResidualQuantizer, taken: Tensor) -> Tensor:
    ids = quantizer.num_codes**quantizer.num_levels
    if len(codes) + len(taken) > ids:
        raise ValueError(
            f"{len(codes) + len(taken)} items cannot have different ids of {quantizer.num_levels} levels with "
            f"{quantizer.num_codes} codes: there are {ids}. Add a level or codes, or choose collisions='level'."
        )
    latents = quantizer.latents(vectors)
    misfit = (latents - quantizer.quantized(codes)).norm(dim=1)
    paths = [tuple(path) for path in codes.tolist()]
    below: Counter[tuple[int, ...]] = Counter()  # ids in use below each prefix

    def use(path: Sequence[int]) -> None:
        below.update(tuple(path[:depth]) for depth in range(len(path) + 1))

    def full(prefix: tuple[int, ...]) -> bool:
        return below[prefix] >= quantizer.num_codes ** (quantizer.num_levels - len(prefix))

    for path in taken.tolist():
        use(path)
    moving = []
    for row in misfit.argsort(stable=True).tolist():
        if paths[row] in below:
            moving.append(row)
        else:
            use(paths[row])
    for row in moving:  # only now: an item must not move to where another one wants to stay
        paths[row] = _nearest_free(latents[row], paths[row], quantizer, full)
        use(paths[row])
    return torch.tensor(paths, dtype=torch.long).reshape(codes.shape)


def _nearest_free(
    latent: Tensor, path: tuple[int, ...], quantizer: ResidualQuantizer, full: Callable[[tuple[int, ...]], bool]
) -> tuple[int, ...]:
    """A free id that shares as long a prefix with `path` as possible, each further level the nearest with room."""
    prefix = path[:-1]
    while full(prefix):
        prefix = prefix[:-1]
    while len(prefix) < len(path):
        left = latent - quantizer.quantized(torch.tensor([prefix], dtype=torch.long))
        distances = (left - quantizer.codebooks[len(prefix)]).norm(dim=1)
        nearest = distances.argsort(stable=True).tolist()
        prefix = next((*prefix, code) for code in nearest if not full((*prefix, code)))
    return prefix
