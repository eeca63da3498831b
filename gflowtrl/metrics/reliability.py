"""Do probabilities mean what they should? What a policy gives to the items of which a target wants so and so much."""

import torch
from torch import Tensor


#: Three bins to a power of ten; what a target wants less than 1e-12 of lies in the first one.
LOG_EDGES = torch.logspace(-12, 0, 37, dtype=torch.double)


def binned_by_target(probs: Tensor, target: Tensor, edges: Tensor = LOG_EDGES) -> dict[str, Tensor]:
    """Sums over the leaves whose target probability lies between two edges.

    Args:
        probs: `(..., N)`, a policy's probabilities of the leaves.
        target: `(..., N)`, what they should be.
        edges: `(bins + 1,)`, ascending. A bin holds its lower edge and not its upper one; the first and the last bin
            also hold what lies beyond.

    Returns:
        Each `(..., bins)`: `"leaves"`, how many there are, `"target"` and `"policy"`, the mass that either gives them.
    """
    place = torch.bucketize(target, edges[1:-1].to(target), right=True)
    empty = target.new_zeros(*target.shape[:-1], len(edges) - 1)
    values = {"leaves": torch.ones_like(target), "target": target, "policy": probs.to(target)}
    return {name: empty.scatter_add(-1, place, value) for name, value in values.items()}


def reliability_curve(binned: dict[str, Tensor]) -> dict[str, list[float]]:
    """The reliability diagram: means over the leaves of each bin, all rows together, without the empty bins.

    Args:
        binned: of `binned_by_target`, each `(rows, bins)`.

    Returns:
        `"target"` and `"policy"`, mean probabilities, equal where the policy is the target; `"leaves"`, how many
        there are in the bin.
    """
    sums = {name: values.sum(0) for name, values in binned.items()}
    filled = sums["leaves"] > 0
    leaves = sums["leaves"][filled]
    means = {name: (sums[name][filled] / leaves).tolist() for name in ("target", "policy")}
    return {**means, "leaves": leaves.long().tolist()}
