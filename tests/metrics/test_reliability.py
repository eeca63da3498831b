"""The reliability diagram, compared with sums computed by hand."""

import pytest
import torch

from gflowtrl.metrics import binned_by_target, reliability_curve


EDGES = torch.tensor([0.01, 0.1, 0.5, 1.0], dtype=torch.double)
TARGET = torch.tensor([[0.6, 0.3, 0.1, 0.0], [0.5, 0.2, 0.2, 0.1]], dtype=torch.double)
PROBS = torch.tensor([[0.4, 0.1, 0.3, 0.2], [0.1, 0.5, 0.3, 0.1]], dtype=torch.double)


def test_bins_include_their_lower_edge_and_the_values_outside_the_edges():
    binned = binned_by_target(PROBS, TARGET, EDGES)
    assert binned["leaves"].tolist() == [[1, 2, 1], [0, 3, 1]]  # 0.1 and 0.5 are lower edges; 0 is below the first
    torch.testing.assert_close(binned["target"], torch.tensor([[0, 0.4, 0.6], [0, 0.5, 0.5]], dtype=torch.double))
    torch.testing.assert_close(binned["policy"], torch.tensor([[0.2, 0.4, 0.4], [0, 0.9, 0.1]], dtype=torch.double))


def test_the_curve_is_the_mean_over_the_leaves_of_a_bin():
    curve = reliability_curve(binned_by_target(PROBS, TARGET, EDGES))
    assert curve["leaves"] == [1, 5, 2]
    assert curve["target"] == pytest.approx([0, 0.9 / 5, 1.1 / 2])
    assert curve["policy"] == pytest.approx([0.2, 1.3 / 5, 0.5 / 2])


def test_the_target_gives_the_diagonal_and_empty_bins_are_dropped():
    target = torch.randn(50, 400, dtype=torch.double, generator=torch.Generator().manual_seed(0)).mul(3).softmax(1)
    curve = reliability_curve(binned_by_target(target, target))
    assert curve["policy"] == curve["target"] == sorted(curve["target"])
    assert sum(curve["leaves"]) == 50 * 400 and 0 not in curve["leaves"] and len(curve["leaves"]) > 9
    # Each mean is in its bin, which spans a third of a power of ten.
    steps = torch.tensor(curve["target"]).log10().diff()
    assert steps.min() > 0 and len(set((3 * torch.tensor(curve["target"]).log10()).floor().tolist())) == len(steps) + 1
