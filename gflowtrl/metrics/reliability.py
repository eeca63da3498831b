"""Reliability diagrams: the probabilities of a policy, binned by the probabilities of its target distribution."""

import torch
from torch import Tensor


#: Three bins per power of ten. Target probabilities below 1e-12 are in the first bin.
LOG_EDGES = torch.logspace(-12, 0, 37, dtype=torch.double)


def binned_by_target(probs: Tensor, target: Tensor, edges: Tensor = LOG_EDGES) -> dict[str, Tensor]:
    """Sum the probabilities of the leaves in each bin of target probabilities.

    Args:
        probs: `(..., N)`, probabilities of the leaves under the policy.
        target: `(..., N)`, target probabilities of the leaves.
        edges: `(bins + 1,)`, ascending. A bin includes its lower edge and excludes its upper edge. The first and the
            last bin also contain the values outside the edges.

    Returns:
        Tensors `(..., bins)`: `"leaves"`, the number of leaves; `"target"` and `"policy"`, their probability mass.
    """
    bins = torch.bucketize(target, edges[1:-1].to(target), right=True)
    empty = target.new_zeros(*target.shape[:-1], len(edges) - 1)
    values = {"leaves": torch.ones_like(target), "target": target, "policy": probs.to(target)}
    return {name: empty.scatter_add(-1, bins, value) for name, value in values.items()}


def reliability_curve(binned: dict[str, Tensor]) -> dict[str, list[float]]:
    """Compute a reliability diagram: the means over the leaves of each bin in all rows. Empty bins are dropped.

    Args:
        binned: result of `binned_by_target`, tensors `(rows, bins)`.

    Returns:
        `"target"` and `"policy"`, the mean probabilities, which are equal if the policy equals the target; `"leaves"`,
        the number of leaves in each bin.
    """
    sums = {name: values.sum(0) for name, values in binned.items()}
    filled = sums["leaves"] > 0
    leaves = sums["leaves"][filled]
    means = {name: (sums[name][filled] / leaves).tolist() for name in ("target", "policy")}
    return {**means, "leaves": leaves.long().tolist()}
