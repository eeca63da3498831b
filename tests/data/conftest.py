"""Fixtures of small data for the tests of gflowtrl.data."""

import pytest

from gflowtrl.data import SyntheticShop


SMALL_SHOP = SyntheticShop(
    n_users=120, n_items=60, departments=4, shelves=4, interests=4, mean_sessions=6.0, min_users_shown=20
)


@pytest.fixture(scope="session")
def small_shop():
    """(InteractionData, ShopTruth) of a small synthetic shop."""
    return SMALL_SHOP.generate()
