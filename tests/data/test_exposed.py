"""Exposed items and impressions: reading, writing, filtering, rows."""

import json
from itertools import pairwise

import pytest
import torch

from gflowtrl.catalog import ItemCatalog
from gflowtrl.data import (
    Exposed,
    ExposedCollator,
    InteractionData,
    PromptEncoder,
    build_tokenizer,
    exposed_rows,
    has_exposed_rows,
    k_core,
    leave_one_out,
    prepare,
    read_folder,
    reordered,
    write_folder,
)


EXPOSED = {1: Exposed([10, 14, 13], [0, 1, 1]), 3: Exposed([12], [1]), 9: Exposed([10, 11], [0, 0])}


def make_data(**changes) -> InteractionData:
    fields = {
        "name": "tiny",
        "users": [1, 2, 3],
        "sequences": [[10, 11, 12], [12, 11, 10, 13], [12]],
        "items": [10, 11, 12, 13, 14],
        "semantic_ids": {item: (f"<a_{item % 2}>", f"<b_{item}>") for item in range(10, 15)},
        "exposed": EXPOSED,
        "impressions": {10: 5, 11: 7, 12: 1},
    }
    return InteractionData(**fields | changes)


def test_a_folder_keeps_exposed_items_and_impressions(tmp_path):
    write_folder(make_data(), tmp_path)
    assert read_folder(tmp_path) == make_data()
    write_folder(make_data(exposed=None, impressions=None), tmp_path)
    found = read_folder(tmp_path)
    assert found.exposed is None and found.impressions is None


def test_ids_may_be_text(tmp_path):
    data = InteractionData(
        "t", ["u"], [["a", "b", "c"]], ["a", "b", "c"], exposed={"u": Exposed(["c"], [1])}, impressions={"a": 3}
    )
    write_folder(data, tmp_path)
    assert read_folder(tmp_path) == data


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        (
            "exposed.jsonl",
            '{"user": 1, "items": [10, 11], "liked": [1]}',
            "line 1: 'liked' must hold 0 or 1 for each of the 2",
        ),
        ("exposed.jsonl", '{"user": 1, "items": [10], "liked": [true]}', "must hold 0 or 1"),
        ("exposed.jsonl", '{"user": 1, "items": [10, 10], "liked": [1, 0]}', "item 10 occurs twice"),
        (
            "exposed.jsonl",
            '{"user": 1, "items": [99], "liked": [1]}',
            "item 99 in the exposed items of user 1 is not in the catalog",
        ),
        ("exposed.jsonl", '{"user": 1, "items": [], "liked": []}', "user 1 has no items"),
        ("exposed.jsonl", "", "is empty"),
        ("impressions.json", '{"10": -1}', "impressions of item 10 are -1"),
        ("impressions.json", '{"10": 1.5}', "whole number"),
        ("impressions.json", '{"10": 0}', "no item has an impression"),
        ("impressions.json", '{"77": 2}', "impressions of item 77, which is not in the catalog"),
        ("impressions.json", '{"x": 2}', "'x' is not an item"),
    ],
)
def test_broken_files_are_named(tmp_path, file, content, message):
    write_folder(make_data(exposed=None, impressions=None), tmp_path)
    (tmp_path / file).write_text(content)
    with pytest.raises(ValueError, match=message):
        read_folder(tmp_path)


def test_rows_hold_the_whole_log_and_no_own_items():
    found = exposed_rows(make_data().users, make_data().sequences, EXPOSED)
    assert found.rows[:] == {
        "row_id": [0], "user": [1], "history": [[10, 11, 12]], "candidates": [[14, 13]], "liked": [[1, 1]]
    }  # fmt: skip
    assert (found.own_items, found.users_without_log) == (2, 1)  # user 3 has one exposed item, an own one
    assert "2 exposed items that are in the user's own log, 1 users without a log" in str(found)
    with pytest.warns(UserWarning, match="fewer than 3"):
        assert has_exposed_rows(found.rows) and not has_exposed_rows(leave_one_out(make_data()).test)


def test_data_without_a_usable_exposed_item_raise():
    with pytest.raises(ValueError, match="No user has both a log and exposed items"):
        exposed_rows([1], [[10]], {1: Exposed([10], [1]), 2: Exposed([11], [1])})
    with pytest.raises(ValueError, match="exposed users are like '1', but users are like 1"):
        make_data(exposed={"1": Exposed([10], [1])})
    assert k_core(make_data(sequences=[[10, 11, 12]] * 3, exposed={1: Exposed([13], [1])}), 3).exposed is None


def test_users_with_fewer_than_three_items_are_measured_but_not_trained_on():
    exposed = EXPOSED | {3: Exposed([14], [1])}
    with pytest.warns(UserWarning, match="1 of 3 users have fewer than 3 items"):
        splits = leave_one_out(make_data(exposed=exposed))
    for rows in (splits.train, splits.validation, splits.test):
        assert set(rows["user"]) <= {1, 2}
    assert len(splits.test) == 2 and splits.train_sequences == [[10], [12, 11], []]
    assert splits.item_counts.tolist() == [1, 1, 1, 0, 0]
    assert exposed_rows([1, 2, 3], make_data().sequences, exposed).rows["user"][:] == [1, 3]
    with pytest.raises(ValueError, match="user 3 has 1 items"):
        leave_one_out(make_data(exposed=None))


def test_splits_do_not_depend_on_what_was_exposed(recwarn):
    flipped = {user: Exposed(items, [1 - like for like in liked]) for user, (items, liked) in EXPOSED.items()}
    one, other = leave_one_out(make_data()), leave_one_out(make_data(exposed=flipped))
    for name in ("train", "validation", "test"):
        assert getattr(one, name)[:] == getattr(other, name)[:]
    assert one.train_sequences == other.train_sequences


def test_impressions_are_the_propensity():
    with pytest.warns(UserWarning):
        assert leave_one_out(make_data()).impression_counts.tolist() == [5, 7, 1, 0, 0]


def test_the_core_keeps_only_its_items():
    sequences = [[10, 11, 12], [10, 11, 12, 13], [10, 11, 12]]
    core = k_core(make_data(sequences=sequences), 3)
    assert core.items == [10, 11, 12]
    assert core.exposed == {1: Exposed([10], [0]), 3: Exposed([12], [1]), 9: Exposed([10, 11], [0, 0])}
    assert core.impressions == {10: 5, 11: 7, 12: 1}


def test_batches_are_padded():
    data = make_data()
    tokenizer = build_tokenizer(data.semantic_ids)
    catalog = ItemCatalog.from_semantic_ids(data.semantic_ids, tokenizer)
    rows = [
        {"row_id": 4, "history": [10, 11], "candidates": [14], "liked": [1]},
        {"row_id": 5, "history": [12], "candidates": [13, 10], "liked": [0, 1]},
    ]
    batch = ExposedCollator(PromptEncoder(catalog, tokenizer))(rows)
    position = {item: place for place, item in enumerate(catalog.items)}
    assert batch["candidates"].tolist() == [[position[14], -1], [position[13], position[10]]]
    assert batch["liked"].tolist() == [[1, -100], [0, 1]] and batch["row_ids"].tolist() == [4, 5]
    assert len(batch["prompts"]["input_ids"]) == 2


def test_other_orders_are_permutations_that_depend_on_the_row():
    histories = [list(range(9)), list(range(9))]
    assert reordered(histories, [3, 4], 0) == histories
    orders = [reordered(histories, [3, 4], number) for number in (1, 2)]
    found = [order for both in orders for order in both]
    assert all(sorted(order) == list(range(9)) for order in found)
    assert all(one != other for one, other in pairwise(found)) and orders[0] == reordered(histories, [3, 4], 1)
    assert reordered(histories[1:], [4], 1) == orders[0][1:]


def test_prepare_adds_exposed_items_and_leaves_out_those_of_dropped_items(tmp_path):
    log = "".join(f"{user},{item},{time}\n" for user in range(1, 4) for time, item in enumerate((10, 11, 12)))
    (tmp_path / "log.csv").write_text("user_id,item_id,timestamp\n" + log + "1,13,9\n")
    exposed, impressions = tmp_path / "e.jsonl", tmp_path / "i.json"
    exposed.write_text('{"user": 1, "items": [12, 13], "liked": [0, 1]}\n{"user": 2, "items": [13], "liked": [1]}\n')
    impressions.write_text(json.dumps({"10": 4, "13": 2}))
    options = {"out": tmp_path / "out", "k_core": 3, "exposed": exposed, "impressions": impressions}
    data, report = prepare("csv", tmp_path / "log.csv", **options)
    assert data.exposed == {1: Exposed([12], [0])} and data.impressions == {10: 4}
    assert (report.exposed_users, report.exposed_left_out) == (1, 2)
    assert read_folder(tmp_path / "out").exposed == data.exposed
    copied, _ = prepare("folder", tmp_path / "out", out=tmp_path / "copy", k_core=None)
    assert copied.exposed == data.exposed and copied.impressions == data.impressions
    exposed.write_text('{"user": 1, "items": ["x"], "liked": [1]}\n')
    with pytest.raises(ValueError, match="No item of .*e.jsonl is in the catalog"):
        prepare("csv", tmp_path / "log.csv", k_core=3, exposed=exposed)


def test_histories_of_a_batch_may_have_any_item_type():
    rows = exposed_rows(["a"], [["x", "y"]], {"a": Exposed(["z"], [1])}).rows
    assert rows["history"][:] == [["x", "y"]] and torch.tensor(rows["liked"][0]).sum() == 1
