"""Pictures of what is at the edge of being drawable."""

import pytest

from gflowtrl.pipeline.plots import plot_differences


def test_an_interval_beside_its_mean_is_drawn_up_to_the_mean():
    """One resample of the users is its own interval, above or below what was measured."""
    from matplotlib.figure import Figure

    axes = Figure().subplots()
    above = {"mean_difference": 0.1, "low": 0.2, "high": 0.2}
    below = {"mean_difference": 0.1, "low": -0.3, "high": -0.3}
    plot_differences(axes, {"above": above, "below": below})
    drawn = [end for bars in axes.collections for end in bars.get_segments()[0][:, 0]]
    assert drawn == pytest.approx([0.1, 0.2, -0.3, 0.1])
