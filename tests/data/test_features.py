"""Features of items: cleaned, renamed, and prices as numbers."""

import json
from decimal import Decimal

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from gflowtrl.data import Columns, prepare, read_folder
from gflowtrl.data.formats.cleaning import clean_features, parse_price
from gflowtrl.data.formats.registry import find_files
from tests.data.raw_files import write, write_lines


def test_features_are_cleaned():
    row = {
        "title": "Salt &amp;amp; \n Pepper",
        "categories": [["Home", "Bath &amp; Body"], ["Home", "Soap"]],
        "description": ["<p>One &amp;lt;b&amp;gt;two&lt;/b&gt;", "three</p>"],
        "price": ".a-box{width:10px}",
        "weight": float("nan"),
        "brand": None,
    }
    expected = {"title": "Salt & Pepper", "categories": "Home, Bath & Body, Soap", "description": "One two"}
    assert clean_features(row, max_description_characters=7) == expected
    assert clean_features(row, max_description_characters=10)["description"] == "One two"
    assert clean_features(row, max_description_characters=None)["description"] == "One two three"
    assert clean_features({"description": "abcdef"}, max_description_characters=3) == {"description": "abc"}


def test_decimals_become_numbers(tmp_path):
    decimals = pa.array([Decimal("12.50"), None], pa.decimal128(10, 2))
    pq.write_table(pa.table({"item_id": ["x", "y"], "price": decimals, "weight": decimals}), tmp_path / "i.parquet")
    pq.write_table(pa.table({"user_id": ["a", "a"], "item_id": ["x", "y"]}), tmp_path / "l.parquet")
    files = tmp_path / "l.parquet", tmp_path / "i.parquet"
    data, _ = prepare("parquet", *files, tmp_path / "out", columns=Columns(time=None), k_core=None)
    assert data.item_features == {"x": {"price": 12.5, "weight": 12.5}} and read_folder(tmp_path / "out") == data


def test_a_feature_called_item_is_renamed(tmp_path):
    log = write_lines(tmp_path / "log.csv", ["user_id,sku,timestamp", "a,5,1", "a,6,2"])
    items = write_lines(tmp_path / "items.csv", ["sku,item,item_name,color", "5,green chair,,green", "6,lamp,L6,red"])
    data, _ = prepare("csv", log, items, tmp_path / "out", columns=Columns(item="sku"), k_core=None)
    assert data.item_features == {
        5: {"item_name_": "green chair", "color": "green"},
        6: {"item_name_": "lamp", "item_name": "L6", "color": "red"},
    }
    assert read_folder(tmp_path / "out") == data
    assert clean_features({"item": "lamp"}, None) == {"item_name": "lamp"}
    assert clean_features({"price": 10**400, "size": [10**400, 10**18]}, None) == {"size": [10**18]}


def test_half_characters_are_not_written(tmp_path):
    log = write(tmp_path / "log.jsonl", '{"u": "a", "i": "x"}\n{"u": "a", "i": "\\ud83d"}\n')
    items = write(tmp_path / "items.jsonl", '{"i": "x", "title": "Cut \\ud83d"}\n')
    columns = Columns("u", "i", time=None)
    data, report = prepare("jsonl", log, items, tmp_path / "o", columns=columns, k_core=None, max_malformed=0.5)
    assert data.sequences == [["x"]] and report.malformed == 1
    assert read_folder(tmp_path / "o") == data and data.item_features == {"x": {"title": "Cut ?"}}


def test_names_of_csv_columns_are_used_literally(tmp_path):
    log = write_lines(tmp_path / "log.csv", ["user:id, item,t", "a,x,1"])
    items = write_lines(tmp_path / "items.csv", [",item,title,size:cm", "0,x,1984,5"])
    data, _ = prepare("csv", log, items, columns=Columns("user:id", "item", "t"), k_core=None)
    assert data.item_features == {"x": {"title": "1984", "size:cm": "5"}}


@pytest.mark.parametrize(
    ("raw", "price"),
    [
        ("$12.99", 12.99),
        ("$1,299.00", 1299.0),
        ("€ 7", 7.0),
        ("$5.50 - $9.00", 5.5),
        ("from 3.20", 3.2),
        (4, 4.0),
        ("EUR 12.50", 12.5),
        ("US$3", 3.0),
        ("12,99", None),
        (".99", 0.99),
        ("$.99", 0.99),
        ("USD .99", 0.99),
        ("$1,234,567.89", 1234567.89),
        ("12.99EUR", 12.99),
        ("12 zł", 12.0),
        ("Rs. 500", 500.0),
        ("&pound;5.99", 5.99),
        ("$50-100", 50.0),
        ("5–9 €", 5.0),
        ("$5 $100", 5.0),
        ("5.00/lb", 5.0),
        ("0", 0.0),
        (Decimal("12.50"), 12.5),
        ("1.299,00", None),
        ("1,299,00", None),
        (",99", None),
        ("1 299,00 €", None),
        ("1 299.00", None),
        ("1\u00a0299", None),
        ("1\u202f299 €", None),
        ("1 299 000", None),
        ("1'299.00", None),
        ("1\u2019299", None),
        ("1_299", None),
        ("Rs.500", None),
        ("-5.00", None),
        ("$-5.00", None),
        ("-$5.00", None),
        ("\u22125", None),
        ("(5.00)", None),
        (-5.0, None),
        ("2.5.6", None),
        ("1e5", None),
        ("5k", None),
        ("99p", None),
        ("50¢", None),
        ("50 %", None),
        ("2 for $5", None),
        ("2/$5", None),
        ("2 x 5.00", None),
        ("10-pack $5", None),
        (Decimal("NaN"), None),
        (10**400, None),
        (True, None),
        ("—", None),
        ("None", None),
        ("", None),
        (None, None),
        (float("inf"), None),
    ],
)
def test_prices(raw, price):
    assert parse_price(raw) == price


def test_attributes_of_s3rec(tmp_path):
    log = write(tmp_path / "Toy.txt.gz", "1 5 6 7\n2 7 5 6\n")
    attributes = {"5": [3, "Lamp"], "6": [], "7": [12], "9": [3]}
    write(tmp_path / "Toy_item2attributes.json", json.dumps(attributes), encoding="utf-8-sig", packed=True)
    data, report = prepare("s3rec", log, k_core=None)
    assert data.item_features == {5: {"attributes": ["attribute_3", "Lamp"]}, 7: {"attributes": ["attribute_12"]}}
    assert (report.item_lines, report.items_without_metadata, len(report.files)) == (4, 0, 2)
    assert find_files("s3rec", write(tmp_path / "Toy.txt.zst", ""), None)[1] == [tmp_path / "Toy_item2attributes.json"]
    other = write(tmp_path / "other.json", json.dumps({"5": [1]}))
    data, _ = prepare("s3rec", log, other, k_core=None)  # a given file takes precedence over a found one
    assert data.item_features == {5: {"attributes": ["attribute_1"]}}
    for content, message in (
        ("[1]", "expected a JSON object, not list"),
        ('{"5": 3, "6": [1]}', r"line 1 .*expected a list of attributes, not 3"),
        ("", r"other\.json contains no data"),
        ("{", r"other\.json, line 1 .*invalid JSON"),
    ):
        with pytest.raises(ValueError, match=message):
            prepare("s3rec", log, write(other, content), k_core=None)


def test_other_names_of_recbole(tmp_path):
    log = write_lines(tmp_path / "s.inter", ["user_id:token\tproduct_id:token\ttimestamp:float", "a\t1\t5", "a\t2\t4"])
    head = "id:token\tapp_name:token\tgenres:token_seq\ttitle:token"
    items = write_lines(tmp_path / "s.item", [head, "1\tapp\tAction Indie\tGame"])
    data, _ = prepare("recbole", log, items, k_core=None)
    assert data.sequences == [[2, 1]]
    assert data.item_features == {1: {"app_name": "app", "categories": "Action Indie", "title": "Game"}}
    items = write_lines(tmp_path / "s.item", ["item_id:token\tname:token_seq", "1\tGame"])
    assert prepare("recbole", log, items, k_core=None)[0].item_features == {1: {"title": "Game"}}
    write_lines(log, ["user_id:token\tthing:token", "a\t1"])
    with pytest.raises(ValueError, match="header lacks item_id; it has user_id, thing"):
        prepare("recbole", log, k_core=None)


def test_features_of_complete_formats_are_cleaned(tmp_path):
    write(tmp_path / "Toy.inter.json", json.dumps({"0": [1, 2]}))
    item = {"title": "Salt &amp; Pepper", "description": "one two three", "price": "$5"}
    write(tmp_path / "Toy.item.json", json.dumps({"1": item}))
    data, _ = prepare("letter", tmp_path, out=tmp_path / "out", k_core=None, max_description_characters=8)
    assert data.item_features == {1: {"title": "Salt & Pepper", "description": "one two", "price": 5.0}}
    assert read_folder(tmp_path / "out") == data
