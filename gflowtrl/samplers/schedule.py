"""Numbers that change while the training goes on, as a function of its progress alone."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np


class Schedule:
    """Piecewise linear in the progress of the training: the first value before the first point, the last one after.

    Args:
        points: pairs of progress, ascending in [0, 1], and value: a number, or several (equally many at each point).
            Two points of one progress make a jump, at which the later one counts.
        owner: who is named in errors.
    """

    def __init__(self, points: Sequence[tuple[float, float | Sequence[float]]], owner: str):
        try:
            self.progress = [float(progress) for progress, _ in points]
            self.values = np.array([np.atleast_1d(np.asarray(value, dtype=float)) for _, value in points])
        except (TypeError, ValueError):
            raise ValueError(
                f"The schedule of {owner} must be a list of pairs [progress, value], got {points!r}."
            ) from None
        steps = [0.0, *self.progress, 1.0]
        if not self.progress or any(not a <= b for a, b in pairwise(steps)):
            raise ValueError(
                f"The progress of the points in the schedule of {owner} must ascend within 0 to 1, got "
                f"{self.progress}."
            )

    def at(self, progress: float) -> np.ndarray:
        """The value at this progress, the share of the training that is done, in [0, 1): `(n,)` float64."""
        after = int(np.searchsorted(self.progress, progress, side="right"))
        if after in (0, len(self.progress)):
            return self.values[min(after, len(self.progress) - 1)]
        start, end = self.progress[after - 1 : after + 1]
        share = (progress - start) / (end - start)
        return (1 - share) * self.values[after - 1] + share * self.values[after]
