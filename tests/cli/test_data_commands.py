"""`gflowtrl prepare` and `gflowtrl tokenize`: from a raw dump to data for training."""

import gzip
import json
import shutil
import sys
from pathlib import Path

import pytest

from gflowtrl.catalog import ItemCatalog
from gflowtrl.cli import main
from gflowtrl.cli.common import make_parser, parse
from gflowtrl.data import InteractionData, SyntheticShop, build_tokenizer, read_interactions, write_folder
from gflowtrl.semantic_ids import RQVAE, ItemTokenizer, default_num_codes, item_texts
from tests.data.raw_files import TITLES, WRITERS, write_lines


@pytest.fixture(scope="module")
def dump(tmp_path_factory) -> Path:
    """Reviews and metadata of a synthetic shop in the format of Amazon 2014; one line of the reviews is malformed."""
    root = tmp_path_factory.mktemp("dump")
    data = SyntheticShop(
        n_users=150, n_items=60, departments=3, shelves=4, interests=3, min_users_shown=40
    ).generate()[0]
    reviews, time = ["{broken"], 1_400_000_000
    for user, sequence in zip(data.users, data.sequences, strict=True):
        for item in sequence:
            time += 86_400
            row = {"reviewerID": f"U{user}", "asin": f"B{item:03}", "unixReviewTime": time, "overall": 4.0}
            reviews.append(json.dumps(row))
    reviews[0], reviews[1] = reviews[1], reviews[0]  # the format is recognized by the first line
    metas = [repr({"asin": f"B{i:03}", **data.item_features[i], "brand": "x &amp; y"}) for i in data.items]
    for name, lines in (("reviews", reviews), ("meta", metas)):
        with gzip.open(root / f"{name}.json.gz", "wt") as file:
            file.write("\n".join(lines) + "\n")
    (root / "count").write_text(str(len(reviews) - 1))
    return root


@pytest.fixture(scope="module")
def prepared(dump) -> Path:
    files = ["--reviews", str(dump / "reviews.json.gz"), "--meta", str(dump / "meta.json.gz")]
    assert main(["prepare", "--format", "amazon-2014", *files, "--out", str(dump / "data"), "--k_core", "3"]) == 0
    words = ["--data_dir", str(dump / "data"), "--levels", "2", "--codes", "16"]
    assert main(["tokenize", *words]) == 0
    return dump / "data"


def test_a_dump_becomes_data_with_ids(prepared, dump):
    data = read_interactions(prepared)
    report = json.loads((prepared / "preparation.json").read_text())
    assert report["malformed"] == 1 and report["lines"] == int((dump / "count").read_text()) + 1
    assert all(
        data.item_features[item]["brand"] == "x & y" and data.item_features[item]["title"] for item in data.items
    )
    assert len(set(data.semantic_ids.values())) == len(data.items)  # no collisions
    assert all(len(ids) == 2 for ids in data.semantic_ids.values())
    catalog = ItemCatalog.from_semantic_ids(data.semantic_ids, build_tokenizer(data.semantic_ids))
    assert catalog.tree.num_leaves == len(data.items)


def test_new_items_get_ids_and_old_ones_keep_theirs(prepared, capsys):
    before = read_interactions(prepared).semantic_ids
    twin = read_interactions(prepared).item_features["B001"]
    with (prepared / "items.jsonl").open("a") as file:
        file.write(json.dumps({"item": "C001", **twin}) + "\n")
    with (prepared / "sequences.jsonl").open("a") as file:
        file.write(json.dumps({"user": "newcomer", "items": ["C001", "B001", "C001"]}) + "\n")
    assert main(["tokenize", "--data_dir", str(prepared), "--add", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"new_items": 1}
    after = read_interactions(prepared).semantic_ids
    assert {item: ids for item, ids in after.items() if item != "C001"} == before
    assert after["C001"] not in before.values() and after["C001"][0] == before["B001"][0]  # the same text
    assert ItemTokenizer.from_pretrained(prepared / "item_tokenizer").semantic_ids == after


def shop(items: list, feature: str = "title") -> InteractionData:
    """Users with five consecutive items each. The feature of the i-th item is two words that depend on i."""
    users = range(len(items))
    features = {item: {feature: f"{'abc'[i % 3]}1 {'defg'[i % 4]}2"} for i, item in enumerate(items)}
    sequences = [[items[(user + step) % len(items)] for step in range(5)] for user in users]
    return InteractionData("small", list(users), sequences, sorted(items), features)


def tokenized(folder: Path, items: list, *options: str, feature: str = "title") -> dict:
    """Write a folder of such data, run `gflowtrl tokenize` on it and return the ids."""
    write_folder(shop(items, feature), folder)
    words = ["--data_dir", str(folder), "--levels", "2", "--codes", "4", "--collisions", "keep"]
    assert main(["tokenize", *words, *options]) == 0
    return read_interactions(folder).semantic_ids


def error_of(words: list[str], capsys) -> str:
    capsys.readouterr()
    try:
        code = main(words)
    except SystemExit as stop:  # raised by argparse
        code = stop.code
    error = capsys.readouterr().err
    assert code == 2 and error.startswith("error: ") and error.count("\n") == 1, error
    return error


def test_new_items_use_the_features_of_the_saved_tokenizer(tmp_path, capsys):
    before = tokenized(tmp_path, list(range(20)), "--features", "name", feature="name")
    write_folder(shop(list(range(24)), "name"), tmp_path)
    add = ["tokenize", "--data_dir", str(tmp_path), "--add"]
    error = error_of([*add, "--features", "title"], capsys)
    assert "--features is title, but the item tokenizer in" in error and "was made with name" in error
    assert main(add) == 0 and main([*add, "--features", "name"]) == 0
    after = read_interactions(tmp_path).semantic_ids
    assert len(after) == 24 and after.items() >= before.items() and after[21] == before[9]  # the same words
    file = tmp_path / "item_tokenizer" / "item_tokenizer.json"
    assert json.loads(file.read_text())["features"] == ["name"]


def test_ids_are_kept_when_numeric_items_become_strings(tmp_path, capsys):
    before = tokenized(tmp_path, list(range(1, 21)))
    write_folder(shop([*map(str, range(1, 21)), "A21"]), tmp_path)
    capsys.readouterr()
    assert main(["tokenize", "--data_dir", str(tmp_path), "--add", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"new_items": 1}
    after = read_interactions(tmp_path).semantic_ids
    assert after.pop("A21") and after == {str(item): ids for item, ids in before.items()}
    write_folder(shop(list(range(1, 21))), tmp_path)
    assert "Item 1 is of type int" in error_of(["tokenize", "--data_dir", str(tmp_path), "--add"], capsys)


def test_an_overwritten_folder_keeps_its_item_tokenizer(tmp_path, capsys):
    def prepare(items: list[str]) -> str:
        rows = [
            f"{user},{items[(user + step) % len(items)]},{step}" for user in range(len(items)) for step in range(5)
        ]
        write_lines(tmp_path / "log.csv", ["user_id,item_id,timestamp", *rows])
        write_lines(
            tmp_path / "items.csv", ["item_id,title", *(f"{i},{'abc'[int(i) % 3]}1 x{int(i) % 4}" for i in items)]
        )
        files = ["--interactions", str(tmp_path / "log.csv"), "--items", str(tmp_path / "items.csv")]
        files += ["--out", str(data)]
        capsys.readouterr()
        assert main(["prepare", "--format", "csv", *files, "--k_core", "0", "--overwrite"]) == 0
        return capsys.readouterr().out

    data = tmp_path / "data"
    printed = prepare([str(item) for item in range(20)])
    assert f"Next: gflowtrl tokenize --data_dir {data}\n" in printed
    words = ["tokenize", "--data_dir", str(data), "--levels", "2", "--codes", "4", "--collisions", "keep"]
    assert main(words) == 0
    assert main([*words, "--tokenizer", str(data / "other")]) == 2  # the ids exist
    before = read_interactions(data).semantic_ids
    shutil.copytree(data / "item_tokenizer", data / "second")  # another tokenizer, as if from --tokenizer
    (data / "notes").touch()
    printed = prepare([str(item) for item in range(22)])
    assert "was kept" in printed and f"Next: gflowtrl tokenize --data_dir {data} --add" in printed
    assert (data / "second" / "item_tokenizer.safetensors").is_file() and not (data / "notes").exists()
    assert "item_tokenizer.json exists. Use --add" in error_of(words, capsys)  # not replaced by mistake
    assert main(["tokenize", "--data_dir", str(data), "--add"]) == 0
    after = read_interactions(data).semantic_ids
    assert len(after) == 22 and after.items() >= before.items()

    shutil.rmtree(data / "item_tokenizer")
    assert f"--data_dir {data} --tokenizer {data / 'second'} --add" in prepare([str(item) for item in range(22)])


def test_the_tokenizer_of_other_data_is_not_replaced(tmp_path, capsys):
    folder = ["--tokenizer", str(tmp_path / "t")]
    tokenized(tmp_path / "a", list(range(20)), *folder)
    before = (tmp_path / "t" / "item_tokenizer.json").read_text()
    write_folder(shop(list(range(30))), tmp_path / "b")
    words = ["tokenize", "--data_dir", str(tmp_path / "b"), *folder, "--levels", "2", "--codes", "4"]
    assert "t/item_tokenizer.json exists" in error_of(words, capsys)
    assert (tmp_path / "t" / "item_tokenizer.json").read_text() == before
    assert main([*words, "--collisions", "keep", "--overwrite"]) == 0


@pytest.mark.parametrize("options", [[], ["--add"], ["--overwrite"]])
def test_a_letter_triple_is_refused_because_its_readers_ignore_new_ids(tmp_path, options, capsys):
    (tmp_path / "toy.inter.json").write_text(json.dumps({"1": [1, 2, 3], "2": [3, 2, 1]}))
    (tmp_path / "toy.item.json").write_text(json.dumps({str(i): {"title": f"a b c {i}"} for i in (1, 2, 3)}))
    before = sorted(tmp_path.iterdir())
    for path in (tmp_path, tmp_path / "toy"):
        error = error_of(["tokenize", "--data_dir", str(path), *options], capsys)
        assert "LETTER triple" in error and f"gflowtrl prepare --format letter --interactions {path}" in error
        assert sorted(tmp_path.iterdir()) == before


def test_a_missing_package_is_an_error_of_one_line(prepared, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "sentence_transformers", None)
    words = ["tokenize", "--data_dir", str(prepared), "--overwrite", "--embedder", "someone/some-model"]
    assert "pip install gflowtrl[text]" in error_of(words, capsys)


def test_a_file_of_options_may_hold_positional_arguments(tmp_path, capsys):
    def parsed(*words: str):
        parser = make_parser("compare", "x")
        parser.add_argument("runs", nargs="+")
        parser.add_argument("--k", type=int, default=10)
        return parse(parser, words)

    file = str(tmp_path / "cmp.yaml")
    Path(file).write_text("runs: [a, b]\nk: 5")
    assert (parsed("--config", file).runs, parsed("--config", file).k) == (["a", "b"], 5)
    assert parsed("c", "--config", file).runs == ["c"]  # the command line wins
    assert (parsed("--config", file, "--k", "3", "c", "d").runs, parsed("c").k) == (["c", "d"], 10)
    assert "unrecognized arguments: --conf" in error_of(["compare", "a", "--conf", file], capsys)
    assert "the following arguments are required: runs" in error_of(["compare"], capsys)
    assert "a has no results.json" in error_of(["compare", "--config", file], capsys)


def test_json_output_has_null_instead_of_nan(tmp_path, capsys):
    data = shop(list(range(20)))
    data.item_features = {item: {"title": "one two three"} for item in data.items}
    write_folder(data, tmp_path)
    capsys.readouterr()
    words = ["--levels", "1", "--codes", "4", "--collisions", "keep", "--json"]
    assert main(["tokenize", "--data_dir", str(tmp_path), *words]) == 0
    printed = capsys.readouterr().out
    assert json.loads(printed)["relative_mse"] is None and "NaN" not in printed


@pytest.mark.parametrize(
    "options", [["--collaborative", "1"], ["--collaborative", "0.5"], ["--quantizer", "balanced"]]
)
def test_collaborative_vectors_and_balanced_codes(prepared, options, capsys):
    words = ["tokenize", "--data_dir", str(prepared), "--levels", "2", "--codes", "16", "--overwrite", "--json"]
    assert main([*words, *options]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["colliding_items"] == 0 and report["items"] == len(read_interactions(prepared).items)


def test_letters_ids_are_aligned_with_interactions(prepared, monkeypatch, capsys):
    seen, fit = [], RQVAE.fit_encode

    def briefly(self, vectors, collaborative):
        self.steps = 10
        seen.append((self.alignment, self.diversity, tuple(collaborative.shape)))
        return fit(self, vectors, collaborative)

    monkeypatch.setattr(RQVAE, "fit_encode", briefly)
    words = ["tokenize", "--data_dir", str(prepared), "--levels", "2", "--codes", "16", "--overwrite", "--json"]
    assert main([*words, "--quantizer", "rqvae", "--alignment", "0.1", "--diversity", "0.01"]) == 0
    (alignment, diversity, shape), items = seen[0], json.loads(capsys.readouterr().out)["items"]
    assert (alignment, diversity) == (0.1, 0.01) and shape == (items, min(64, items - 1))


@pytest.mark.parametrize("case", [case for case in WRITERS if case != "table"])  # which no command can name
def test_item_texts_have_the_features_of_every_format(tmp_path, case):
    format, writer = WRITERS[case]
    log, items = writer(tmp_path, packed=False)
    out = str(tmp_path / "out")
    words = ["prepare", "--format", format, "--k_core", "0", "--interactions", str(log), "--out", out]
    assert main(words if items is None else [*words, "--items", str(items)]) == 0
    texts = dict(zip((data := read_interactions(out)).items, item_texts(data), strict=True))
    assert texts[10] == ("attribute_3, attribute_17" if format == "s3rec" else f"{TITLES[10]}\nComedy, Drama")


def test_several_tables_without_a_header(tmp_path, capsys):
    for name, rows in (("a", ["u,x,5,1", "u,y,4,3"]), ("b", ["u,z,3,2", "u,x,3,9"])):
        write_lines(tmp_path / f"{name}.csv", rows)
    files = ["--reviews", str(tmp_path / "a.csv"), str(tmp_path / "b.csv"), "--out", str(tmp_path / "out")]
    about = ["--license", "CC0", "--source", "made up", "--header", "user_id", "item_id", "rating", "timestamp"]
    assert main(["prepare", "--format", "csv", *files, *about, "--k_core", "0", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["lines"], report["duplicates"], len(report["files"])) == (4, 1, 2)
    data = read_interactions(tmp_path / "out")
    assert (data.sequences, data.license, data.source) == ([["x", "z", "y"]], "CC0", "made up")

    options = {
        "reviews": files[1:3],
        "format": "csv",
        "header": about[5:],
        "k_core": 0,
        "out": str(tmp_path / "again"),
    }
    (tmp_path / "prepare.yaml").write_text(json.dumps(options))  # JSON is YAML
    assert main(["prepare", "--config", str(tmp_path / "prepare.yaml")]) == 0
    assert read_interactions(tmp_path / "again").sequences == data.sequences


def test_a_download_records_its_source(tmp_path, monkeypatch):
    log, items = WRITERS["movielens dat"][1](tmp_path, packed=False)
    names = []
    monkeypatch.setattr("gflowtrl.data.download", lambda name, raw: names.append(name) or ("movielens", log, items))
    words = ["prepare", "--download", "ml-1m", "--k_core", "0", "--out"]
    assert main([*words, str(tmp_path / "out")]) == 0
    assert read_interactions(tmp_path / "out").source.startswith("ml-1m, https://files.grouplens.org/")
    assert main([*words, str(tmp_path / "copy"), "--source", "a copy"]) == 0
    assert read_interactions(tmp_path / "copy").source == "a copy"
    assert main([*words, str(tmp_path)]) == 2 and len(names) == 2  # an existing folder is an error before the download


def test_ids_from_attributes_alone(tmp_path):
    """Attributes may be numbers of one digit, which the embedder must not drop as it drops words of one letter."""
    sequences = [f"{user} {' '.join(str(1 + (user + step) % 40) for step in range(9))}" for user in range(1, 81)]
    write_lines(tmp_path / "Toy.txt", sequences)
    attributes = {str(item): [item % 8, item % 5] for item in range(1, 41)}
    (tmp_path / "Toy_item2attributes.json").write_text(json.dumps(attributes))
    out = str(tmp_path / "out")
    assert main(["prepare", "--format", "s3rec", "--interactions", str(tmp_path / "Toy.txt"), "--out", out]) == 0
    assert main(["tokenize", "--data_dir", out, "--levels", "2", "--codes", "8", "--collisions", "keep"]) == 0
    ids = read_interactions(out).semantic_ids
    assert len(ids) == 40 and len(set(ids.values())) > 8


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["prepare"], "are required: --out. Run gflowtrl prepare --help"),
        (["prepare", "--out", "x"], "--format is missing. Formats are amazon-2014"),
        (["prepare", "--out", "x", "--format", "amazon", "--reviews", "r"], "There is no format 'amazon'"),
        (["prepare", "--out", "x", "--format", "csv", "--reviews", "nowhere.csv"], "nowhere.csv is not a file"),
        (["prepare", "--out", "x", "--download", "ml-1m", "--format", "csv"], "leave --format and the files out"),
        (["prepare", "--k_core", "many"], "--k_core: invalid int value: 'many'. Run gflowtrl prepare --help"),
        (["tokenize"], "are required: --data_dir. Run gflowtrl tokenize --help"),
        (["tokenize", "--data_dir", "DATA"], "semantic_ids.json exists. Use --add"),
        (["tokenize", "--data_dir", "DATA", "--overwrite", "--collaborative", "2"], "a number from 0 to 1"),
        (["tokenize", "--data_dir", "DATA", "--overwrite", "--alignment", "0.1"], "--alignment is set, but quantizer"),
        (
            ["tokenize", "--data_dir", "DATA", "--overwrite", "--codes", "500"],
            "Choose num_codes (--codes) well",
        ),
        (["tokenize", "--data_dir", "DATA", "--overwrite", "--features", "color"], "color; available features"),
        (["tokenize", "--data_dir", "/no/where"], "There is no folder /no/where. Check the path"),
    ],
)
def test_errors_are_one_line(prepared, words, message, capsys):
    before = (prepared / "semantic_ids.json").read_text()
    try:
        code = main([str(prepared) if word == "DATA" else word for word in words])
    except SystemExit as stop:  # raised by argparse
        code = stop.code
    assert code == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and message in error, error
    assert (prepared / "semantic_ids.json").read_text() == before


HUGE_PRICE = b'{"item": 0, "price": 1' + 400 * b"0" + b"}"
DEEP = b'{"user": 0, "items": ' + 99_999 * b"["
LIST_ITEM = b'{"user": 0, "sessions": [0], "items": [[1]], "levels": [0]}'


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("items.jsonl", HUGE_PRICE, "items.jsonl, line 1: 'price' is a number of 401 digits, which exceeds a float"),
        ("sequences.jsonl", DEEP, "sequences.jsonl, line 1: JSON that is nested too deeply"),
        ("events.jsonl", LIST_ITEM, "events.jsonl, line 1: 'item' must be a whole number or a string"),
        ("v.npy", b"", "v.npy cannot be read as an array of numbers in numpy's .npy format (it ends too early"),
        ("v.npy", b"\x93NUMPY\x01\x00\x0a\x00{'shape': (", "v.npy cannot be read as an array"),
        ("v.safetensors", 99 * b"\xff", "v.safetensors cannot be read as a .safetensors file (Error while"),
    ],
)
def test_malformed_files_are_named_in_one_line(tmp_path, file, content, message, capsys):
    folder = tmp_path / "data"
    write_folder(shop(list(range(20))), folder)
    (folder / file).write_bytes(content)
    tokenize, prepare = ["tokenize", "--data_dir", str(folder)], ["prepare", "--format", "folder", "--k_core", "0"]
    commands = [[*prepare, "--interactions", str(folder), "--out", str(tmp_path / "out")], tokenize]
    if file.startswith("v."):
        commands = [[*tokenize, "--vectors", str(folder / file)]]
    for words in commands:
        capsys.readouterr()
        assert main(words) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ") and error.count("\n") == 1 and f"{folder}/{message}" in error, error


@pytest.mark.parametrize("items", [4, 7, 8, 60, 320, 1023, 1024, 5000])
def test_small_catalogs_have_fewer_codes(items):
    codes = default_num_codes(items)
    assert 4 * codes <= max(items, 8) and codes & (codes - 1) == 0
    assert codes == 256 or 8 * codes > items
