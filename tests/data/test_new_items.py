"""Held-out items: in nothing but test targets."""

from dataclasses import replace

import pytest

from gflowtrl.data import InteractionData, SyntheticShop, hold_out_items, leave_one_out
from tests.pipeline.micro import micro_settings


ITEMS = list(range(40))


def make_data() -> InteractionData:
    sequences = [[(user * 7 + step * 3) % 40 for step in range(3 + user % 6)] for user in range(30)]
    return InteractionData("tiny", list(range(30)), sequences, ITEMS)


def test_new_items_are_in_nothing_but_test_targets():
    data = make_data()
    found, new = hold_out_items(data, 0.2, seed=1)
    assert len(new) == 8 and found.items == ITEMS and hold_out_items(data, 0.2, seed=1)[1] == new
    original = dict(zip(data.users, data.sequences, strict=True))
    for user, sequence in zip(found.users, found.sequences, strict=True):
        assert not new & set(sequence[:-1]) and sequence[-1] == original[user][-1]
        assert sequence[:-1] == [item for item in original[user][:-1] if item not in new] and len(sequence) >= 3
    splits = leave_one_out(found)
    for rows in (splits.train, splits.validation):
        assert not new & {*rows["target"]} and not new & {item for row in rows["history"] for item in row}
    assert not new & {item for row in splits.test["history"] for item in row}
    assert 0 < sum(target in new for target in splits.test["target"]) < len(splits.test)
    assert all(splits.item_counts[ITEMS.index(item)] == 0 for item in new)


def test_impressions_of_new_items_are_unknown_and_dropped_users_are_counted():
    data = replace(make_data(), impressions={item: 3 for item in ITEMS})
    with pytest.warns(UserWarning, match="of 30 users have fewer than three items left without 8 new items"):
        found, new = hold_out_items(data, 0.2, seed=1)
    assert found.impressions.keys() == {*ITEMS} - new
    with pytest.raises(ValueError, match="less than one of 40 items"):
        hold_out_items(data, 0.01)


def test_other_seeds_choose_others_and_no_share_none():
    data = make_data()
    assert hold_out_items(data, 0.2, seed=1)[1] != hold_out_items(data, 0.2, seed=2)[1]
    same, new = hold_out_items(data, 0.0)
    assert not new and same.sequences == data.sequences


def test_bad_input_raises():
    with pytest.raises(ValueError, match="share is 1"):
        hold_out_items(make_data(), 1.0)
    with pytest.raises(ValueError, match="no user with three items left"):
        hold_out_items(make_data(), 0.99)
    shop, _ = SyntheticShop(**micro_settings("")["data"]["shop"]).generate()
    with pytest.raises(ValueError, match="has events"):
        hold_out_items(shop, 0.1)
