import json
import os
from dataclasses import replace
from pathlib import Path

import pytest

from gflowtrl.data import (
    InteractionData,
    k_core,
    leave_one_out,
    read_folder,
    read_interactions,
    read_letter,
    write_folder,
)


SEQUENCES = [{"user": 0, "items": [3, 1, 2]}, {"user": 1, "items": [1, 3, 10]}]
IDS = {"1": ["<a_0>", "<b_0>"], "2": ["<a_0>", "<b_1>"], "3": ["<a_1>"], "10": ["<a_0>", "<b_1>"], "11": ["<a_2>"]}


def write(folder, sequences=SEQUENCES, **files):
    lines = sequences if isinstance(sequences, str) else "\n".join(map(json.dumps, sequences))
    (folder / "sequences.jsonl").write_text(lines)
    for name, content in files.items():
        file = folder / (f"{name}.json" if name in ("semantic_ids", "dataset") else f"{name}.jsonl")
        file.write_text(content if isinstance(content, str) else json.dumps(content))
    return folder


def test_folder(tmp_path):
    items = '{"item": 1, "title": "Lamp"}\n\n{"item": 10, "title": ""}\n'
    data = read_interactions(write(tmp_path, items=items, semantic_ids=IDS))
    assert (data.name, data.synthetic, data.users) == (tmp_path.name, False, [0, 1])
    assert data.sequences == [[3, 1, 2], [1, 3, 10]]
    assert data.items == [1, 2, 3, 10, 11]  # sorted by number, with item 11, which has no interactions
    assert data.item_features == {1: {"title": "Lamp"}, 10: {"title": ""}}
    assert list(data.semantic_ids) == data.items and data.semantic_ids[10] == ("<a_0>", "<b_1>")
    assert "2 users, 5 items, 6 interactions; 3 to 3" in data.summary()


def test_string_items(tmp_path):
    data = read_folder(write(tmp_path, [{"user": "u", "items": ["B0", "7"]}], semantic_ids={"B0": ["x"], "7": ["y"]}))
    assert data.items == ["7", "B0"] and data.semantic_ids == {"7": ("y",), "B0": ("x",)}


def test_letter(tmp_path):
    (tmp_path / "Toy.inter.json").write_text('{"0": [3, 1, 2], "1": [1, 3]}')
    (tmp_path / "Toy.index.json").write_text('{"1": ["<a_0>"], "2": ["<a_1>"], "3": ["<a_2>"]}')
    (tmp_path / "Toy.item.json").write_text('{"2": {"title": "Ball"}}')
    for path in (tmp_path, tmp_path / "Toy"):
        data = read_letter(path)
        assert (data.name, data.users, data.sequences) == ("Toy", [0, 1], [[3, 1, 2], [1, 3]])
        assert data.items == [1, 2, 3] and data.semantic_ids[3] == ("<a_2>",)
        assert data.item_features == {2: {"title": "Ball"}}
    (tmp_path / "Other.inter.json").write_text("{}")
    with pytest.raises(ValueError, match="several data sets"):
        read_interactions(tmp_path)


def test_a_written_folder_is_read_unchanged(tmp_path, small_shop):
    data, _ = small_shop
    write_folder(data, tmp_path)
    assert read_folder(tmp_path) == data
    assert "SYNTHETIC" in read_folder(tmp_path).summary()


def test_writing_removes_files_of_earlier_data(tmp_path, small_shop):
    shop, _ = small_shop
    write_folder(replace(shop, semantic_ids={item: (f"<a_{item}>",) for item in shop.items}), tmp_path)
    bare = replace(shop, semantic_ids=None, events=None)
    write_folder(bare, tmp_path)
    assert read_folder(tmp_path) == bare


def test_a_feature_called_item_does_not_overwrite_the_id(tmp_path):
    data = InteractionData("toy", [0], [[1]], [1, 2], {1: {"item": "green chair", "color": "green"}})
    write_folder(data, tmp_path)
    assert read_folder(tmp_path) == replace(data, item_features={1: {"color": "green"}})


def test_letter_users_beyond_64_bits_are_strings(tmp_path):
    (tmp_path / "Toy.inter.json").write_text(f'{{"7": [3, 1], "{2**63}": [1, 3]}}')
    assert read_letter(tmp_path).users == ["7", str(2**63)]


def test_the_largest_ids_can_be_split(tmp_path):
    smallest, largest = -(2**63), 2**63 - 1
    data = read_folder(write(tmp_path, [{"user": largest, "items": [smallest, 0, largest]}]))
    row = leave_one_out(data).test[0]
    assert (row["user"], row["target"], row["history"]) == (largest, largest, [smallest, 0])


def test_license_and_source_are_kept(tmp_path):
    data = InteractionData("toy", [0], [[1]], [1], license="CC BY 4.0", source="our shop, May 2024")
    write_folder(data, tmp_path)
    assert read_folder(tmp_path) == data and k_core(data, 1).license == "CC BY 4.0"
    about = {"name": None, "license": None}
    data = read_folder(write(tmp_path, dataset=about))
    assert (data.name, data.license, data.source) == (tmp_path.name, None, None)
    with pytest.raises(ValueError, match=r"dataset\.json: 'source' must be text, but it is \['a'\]\. Correct it"):
        read_folder(write(tmp_path, dataset={"source": ["a"]}))


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (
            {"sequences": '{"user": 0, "items": [1]}\n{"user": 1, "items": [1,}'},
            r"sequences\.jsonl, line 2: .*invalid JSON",
        ),
        ({"sequences": '{"user": 0, "items": [1]}\n\n[1]'}, r"sequences\.jsonl, line 3: expected a JSON object"),
        ({"sequences": ""}, "empty"),
        ({"sequences": [{"user": 0, "items": []}]}, "user 0 has no items"),
        ({"sequences": [{"user": 7}]}, "user 7 has no items"),
        ({"sequences": [{"items": [1]}]}, "line 1: 'user' must be"),
        ({"sequences": [{"user": 0, "items": [1, True]}]}, "user 0: 'item' must be .* True"),
        (
            {"sequences": [{"user": 0, "items": [1, 2**63]}]},
            r"sequences\.jsonl, line 1: user 0: item 9223372036854775808 ",
        ),
        ({"sequences": [{"user": -(2**63) - 1, "items": [1]}]}, r"sequences\.jsonl, line 1: user -9.* as strings"),
        ({"items": json.dumps({"item": 2**64})}, r"items\.jsonl, line 1: item 18446744073709551616 does not fit"),
        ({"sequences": [{"user": 0, "items": [1, "a"]}]}, "whole numbers or all strings"),
        ({"sequences": [SEQUENCES[0], SEQUENCES[0]]}, "line 2: user 0 is on an earlier line already"),
        ({"items": '{"item": 1}\n{"item": 1}'}, r"items\.jsonl, line 2: item 1 is on an earlier"),
        ({"items": '{"title": "Lamp"}'}, "line 1: 'item' must be"),
        ({"semantic_ids": {key: IDS[key] for key in ("1", "2", "10")}}, "1 of 4 items have no semantic id.* item 3"),
        ({"semantic_ids": {**IDS, "1": "<a_0>"}}, "semantic id of item 1 must be a list"),
        ({"semantic_ids": {**IDS, "x": ["<a_0>"]}}, "'x' is not an item"),
        ({"semantic_ids": '{"1": ["<a_0>"],\n "1": ["<a_1>"]}'}, r"semantic_ids\.json: the key '1' occurs twice"),
        ({"semantic_ids": '{"1": ["<a_0>"],\n "2": [}'}, r"semantic_ids\.json: invalid JSON .*line 2"),
        ({"events": '{"user": 5, "sessions": [], "items": [], "levels": []}'}, "user 5 has events but no line"),
        ({"events": '{"user": 0, "sessions": [0], "items": [3], "levels": []}'}, "line 1: .* of the same length"),
        ({"events": '{"user": 0, "sessions": [0], "items": [3], "levels": [7]}'}, "line 1: a level must be"),
        ({"events": '{"user": 0, "sessions": [0], "items": [3], "levels": [1]}'}, "events of user 0 are not"),
        (
            {"events": '{"user": 0, "sessions": [0], "items": [[1]], "levels": [0]}'},
            r"events\.jsonl, line 1: 'item' must be a whole number or a string, but it is \[1\]",
        ),
        ({"events": '{"user": 0, "sessions": [{}], "items": [1], "levels": [0]}'}, r"line 1: 'session' must be"),
        ({"sequences": '{"user": 0, "items": ' + 99_999 * "["}, r"sequences\.jsonl, line 1: JSON that is nested too"),
        ({"semantic_ids": 99_999 * "["}, r"semantic_ids\.json: JSON that is nested too deeply"),
        (
            {"items": '{"item": 1}\n{"item": 2, "title": NaN}'},
            r"items\.jsonl, line 2: NaN is not a number in JSON; write",
        ),
        ({"items": '{"item": 1, "title": ["a", "b"]}'}, r"items\.jsonl, line 1: 'title' must be text, but .*'a', 'b'"),
        ({"items": '{"item": 1, "title": 7}'}, r"items\.jsonl, line 1: 'title' must be text, but it is 7"),
        ({"items": '{"item": 1, "title": "pen \\ud83d"}'}, r"items\.jsonl, line 1: \\ud83d is half a character"),
        ({"items": '{"item": 1, "a": {"\\uDC00": 1}}'}, r"items\.jsonl, line 1: \\udc00 is half a character"),
        ({"sequences": [{"user": "a\ud83d", "items": [1]}]}, r"sequences\.jsonl, line 1: \\ud83d is half"),
        ({"semantic_ids": {**IDS, "1": ["<a_\udfff>"]}}, r"semantic_ids\.json: \\udfff is half a character"),
        (
            {"items": '{"item": 1, "price": 1' + 400 * "0" + "}"},
            r"line 1: 'price' is a number of 401 digits, which exceeds a float",
        ),
        (
            {"items": '{"item": 1, "a": [{"b": -1e400}]}'},
            r"items\.jsonl, line 1: 'a' is -inf, which exceeds a float",
        ),
        (
            {"dataset": '{"synthetic": "false"}'},
            r"dataset\.json: 'synthetic' must be true or false, but it is 'false'",
        ),
        ({"exposed": "[1]"}, r"^\S*exposed\.jsonl, line 1: expected a JSON object"),
        ({"dataset": '{"synthetic": Infinity}'}, r"dataset\.json: Infinity is not a number in JSON"),
    ],
)
def test_errors_name_the_bad_file(tmp_path, files, message):
    with pytest.raises(ValueError, match=message):
        read_folder(write(tmp_path, **files))


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ('{"title": NaN}', "NaN is not a number in JSON"), ('{"title": ["a"]}', "item 2: 'title' must be text"),
        ('{"title": "\\ud83d"}', "half a character"), ('{"price": 1e999}', "item 2: 'price' is inf"),
    ],
)  # fmt: skip
def test_errors_name_bad_features_of_a_letter_triple(tmp_path, row, message):
    (tmp_path / "Toy.inter.json").write_text('{"0": [3, 1, 2]}')
    (tmp_path / "Toy.item.json").write_text('{"1": {"title": "Ball"}, "2": ' + row + "}")
    with pytest.raises(ValueError, match=rf"Toy\.item\.json: .*{message}"):
        read_letter(tmp_path)


def test_surrogate_pairs_and_missing_titles_are_read(tmp_path):
    lines = (
        '{"item": 1, "title": "pen \\ud83d\\ude00"}', '{"item": 2, "title": null, "price": 1e300}',
        '{"item": 3, "a": "\\\\ud83d"}',
    )  # fmt: skip
    assert read_folder(write(tmp_path, items="\n".join(lines))).item_features == {
        1: {"title": "pen \U0001f600"}, 2: {"title": None, "price": 1e300}, 3: {"a": "\\ud83d"},
    }  # fmt: skip


@pytest.mark.parametrize(
    "name",
    ["items.jsonl", "items.parquet", "semantic_ids.json", "events.jsonl", "exposed.jsonl", "impressions.json",
     "dataset.json"],
)  # fmt: skip
def test_an_optional_file_that_cannot_be_read_is_an_error(tmp_path, name):
    """A link to a disk that is not mounted must not read as data without that file."""
    write(tmp_path)
    assert read_folder(tmp_path).num_interactions == 6
    (tmp_path / name).symlink_to(tmp_path / "unmounted")
    with pytest.raises((OSError, ValueError), match=name):
        read_folder(tmp_path)
    (tmp_path / name).unlink()
    (tmp_path / name).mkdir()
    with pytest.raises((OSError, ValueError), match=name):
        read_folder(tmp_path)


def test_errors_name_missing_files(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"sequences\.jsonl is missing"):
        read_folder(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"neither sequences\.jsonl nor X\.inter\.json"):
        read_interactions(tmp_path)
    with pytest.raises(FileNotFoundError, match="There is no folder .*nowhere.*gflowtrl prepare"):
        read_interactions(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"users": [0]}, "1 users but 2 sequences"),
        ({"users": [0, 0]}, "user 0 is given twice"),
        ({"items": [1, 2, 2]}, "item 2 is given twice"),
        ({"items": [1]}, "item 2 in the sequence of user 1 is not in the catalog"),
        ({"semantic_ids": {1: ("a",), 2: ("b",), 3: ("c",)}}, "id for item 3, which is not in the catalog"),
        ({"users": [0, "1"]}, "all whole numbers or all strings"),
        ({"item_features": {2: {"title": float("nan")}}}, "toy: the title of item 2 must be text, but it is nan"),
        ({"item_features": {2: {"title": "a\ud83d"}}}, "toy: the title of item 2 holds half a character"),
    ],
)
def test_contradictions_raise_errors(changes, message):
    with pytest.raises(ValueError, match=message):
        InteractionData(**{"name": "toy", "users": [0, 1], "sequences": [[1], [2, 1]], "items": [1, 2]} | changes)


@pytest.mark.skipif("GFLOWTRL_TEST_DATA" not in os.environ, reason="GFLOWTRL_TEST_DATA names no folder of real data")
def test_real_folder():
    data = read_interactions(Path(os.environ["GFLOWTRL_TEST_DATA"]) / "office")
    assert (len(data.users), len(data.items), data.num_interactions) == (4905, 2420, 53258)
    assert len(data.items) - len(set(data.semantic_ids.values())) == 5
