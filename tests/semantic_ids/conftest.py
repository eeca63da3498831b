"""Fixtures: a catalog of artificial items with texts, and clustered vectors."""

import pytest
import torch

from gflowtrl.data import InteractionData


KINDS = ("lamp", "desk", "chair", "pen", "ink", "paper", "folder", "stapler")
COLORS = ("red", "blue", "green", "black", "white")


@pytest.fixture(scope="session")
def catalog() -> InteractionData:
    """120 items (8 kinds in 5 colors, 3 equal items each), one without text; each user takes items of one kind."""
    items = list(range(120))
    features = {
        item: {"title": f"{COLORS[item % 5]} {KINDS[item % 8]}", "categories": [["office", f"{KINDS[item % 8]}s"]]}
        for item in items
    }
    features[119] = {"title": "", "categories": None}
    sequences = [[kind + 8 * ((user + step) % 14) for step in range(6)] for user in range(14) for kind in range(8)]
    return InteractionData("artificial", list(range(len(sequences))), sequences, items, features)


@pytest.fixture(scope="session")
def vectors() -> torch.Tensor:
    """(200, 12): twenty clusters of ten."""
    generator = torch.Generator().manual_seed(0)
    centers = torch.randn(20, 12, generator=generator)
    return centers.repeat(10, 1) + 0.3 * torch.randn(200, 12, generator=generator)
