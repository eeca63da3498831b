"""Values that change with the progress of the training."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np


class Schedule:
    """A piecewise linear function of training progress, constant before the first point and after the last one.

    Args:
        points: pairs [progress, value]. The progress must ascend within [0, 1]. A value is a number or a list of
            numbers of the same length at each point. Two points with the same progress make a jump to the later one.
        owner: name of the sampler in errors.

    Raises:
        ValueError: `points` is not a list of pairs, or the progress does not ascend.
    """

    def __init__(self, points: Sequence[tuple[float, float | Sequence[float]]], owner: str):
        try:
            self.progress = [float(progress) for progress, _ in points]
            self.values = np.array([np.atleast_1d(np.asarray(value, dtype=float)) for _, value in points])
        except (TypeError, ValueError):
            raise ValueError(f"The schedule of {owner} is {points!r}; it must list pairs [progress, value].") from None
        if not self.progress or any(not a <= b for a, b in pairwise([0.0, *self.progress, 1.0])):
            raise ValueError(
                f"The progress in the schedule of {owner} is {self.progress}; it needs at least one point and must "
                f"ascend within [0, 1]."
            )

    def at(self, progress: float) -> np.ndarray:
        """Return the value at a progress, the finished share of the training in [0, 1): `(n,)` float64."""
        return np.array([np.interp(progress, self.progress, column) for column in self.values.T])
