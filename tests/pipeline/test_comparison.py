"""Which results make one row of `gflowtrl compare`: written by hand, as `run` writes them."""

import json

import pytest
import torch
from safetensors.torch import save_file

from gflowtrl.cli import main
from gflowtrl.pipeline.comparison import compared_rows, difference, find_results

from .micro import micro_recipe


METRICS = ("item_recall", "item_ndcg", "unseen_item_recall", "unseen_item_ndcg", "coverage", "gini", "dgu", "mgu")


@pytest.fixture
def keep(tmp_path):
    """Writes the results of a run into a folder; its figures are its seed's, its folders' names follow `stage`."""

    def keep(seed: int, run: str, folder: str = "out", stage: dict | None = None, users: int = 6, **changes) -> None:
        recipe = micro_recipe(tmp_path / folder, seed=seed, **changes).as_dict()
        methods = {}
        for method in ("teacher", "sft", "control", "gflownet"):
            place = tmp_path / folder / f"test-{method}-{(stage or {}).get(method, run)}"
            place.mkdir(parents=True, exist_ok=True)
            names = [f"{name}@5" for name in METRICS]
            save_file({name: torch.full((users,), seed / 10) for name in names}, place / "per_user.safetensors")
            methods[method] = {"metrics": dict.fromkeys(names, seed / 10), "folder": str(place)}
            if method != "teacher":
                methods[method] |= {"steps": 4, "rows_per_step": 32}
        content = {"recipe": recipe, "data": {"fingerprint": "f", "test_users": users}, "methods": methods}
        (tmp_path / folder / f"report-{run}").mkdir()
        (tmp_path / folder / f"report-{run}" / "results.json").write_text(json.dumps(content))

    return keep


def seeds_of(rows) -> dict[str, list[int]]:
    return {row.title: list(row.entries) for row in rows}


FLOW = {"loss_type": ["exact_flow"], "num_generations": 3, "max_steps": 4}
CONTROL = "SFT continued (control), 4 steps"


def test_a_row_is_one_setting_in_whatever_order_the_runs_come(keep, tmp_path):
    """Two learning rates and two seeds in one folder, the rates in another order for each seed."""
    for run, seed, rate in (("a", 1, 2e-3), ("b", 1, 2e-1), ("c", 3, 2e-1), ("d", 3, 2e-3)):
        stage = {method: f"seed{seed}" for method in ("teacher", "sft", "control")}  # which these share
        keep(seed, run, stage=stage, gflownet=FLOW | {"learning_rate": rate})
    rows = compared_rows(find_results([tmp_path / "out"]))
    both = [1, 3]
    assert seeds_of(rows) == {
        "Teacher": both, "SFT": both, CONTROL: both, "GFlowNet: micro": both, "GFlowNet: micro'": both
    }  # fmt: skip
    folders = [[entry["folder"].rpartition("-")[2] for entry in row.entries.values()] for row in rows[-2:]]
    assert folders == [["a", "d"], ["b", "c"]]
    assert difference(rows[-1], rows[-2], "item_ndcg@5")["mean_difference"] == 0


@pytest.mark.parametrize(
    ("changes", "apart"),
    [
        ({"teacher": {"type": "sasrec"}}, {"Teacher", "GFlowNet: micro"}),
        ({"sft": {"num_train_epochs": 5}}, {"SFT", CONTROL, "GFlowNet: micro"}),
        ({"model": {"hidden_size": 8, "num_attention_heads": 2}}, {"SFT", CONTROL, "GFlowNet: micro"}),
        ({"data_dir": "elsewhere", "data": {}}, {"Teacher", "SFT", CONTROL, "GFlowNet: micro"}),
        ({"control": {"learning_rate": 1e-3}}, {CONTROL}),
        ({"gflownet": FLOW | {"per_device_train_batch_size": 16}}, {CONTROL, "GFlowNet: micro"}),
        ({"gflownet": FLOW | {"num_generations": 4}}, {"GFlowNet: micro"}),
        ({"rewards": [{"type": "ground_truth"}]}, {"GFlowNet: micro"}),
        ({"gflownet": FLOW | {"logging_steps": 1}, "stages": ["gflownet"]}, set()),  # these change no figure
    ],
)
def test_methods_are_apart_where_they_depend_on_what_differs(keep, tmp_path, changes, apart):
    keep(42, "a", gflownet=FLOW)
    keep(43, "b", folder="other", **{"gflownet": FLOW, **changes})
    rows = seeds_of(compared_rows(find_results([tmp_path / "out", tmp_path / "other"])))
    expected = {}
    for title in ("Teacher", "SFT", CONTROL, "GFlowNet: micro"):
        expected |= {title: [42], f"{title}'": [43]} if title in apart else {title: [42, 43]}
    assert rows == expected and list(rows) == list(expected)


def test_what_begins_untrained_is_a_row_of_its_own(keep, tmp_path, capsys):
    """Which no setting of SFT divides; results of earlier versions began from SFT."""
    for seed, run, sft in ((1, "a", {"max_steps": 1}), (2, "b", {"max_steps": 2})):
        keep(seed, run, start="untrained", control={"num_train_epochs": 3}, gflownet=FLOW, sft=sft)
    untrained = "Cross entropy (control), 4 steps"
    rows = seeds_of(compared_rows(find_results([tmp_path / "out"])))
    assert rows[untrained] == [1, 2] and rows["GFlowNet: micro"] == [1, 2] and rows["SFT'"] == [2]
    assert main(["compare", str(tmp_path / "out"), "--k", "5"]) == 0
    assert f"item NDCG@5 - {untrained}" in capsys.readouterr().out
    for seed, run in ((3, "c"), (4, "d")):
        keep(seed, run, gflownet=FLOW)
    file = tmp_path / "out" / "report-c" / "results.json"
    content = json.loads(file.read_text())
    del content["recipe"]["start"]
    file.write_text(json.dumps(content))
    rows = seeds_of(compared_rows(find_results([tmp_path / "out"])))
    assert rows[CONTROL] == rows["GFlowNet: micro'"] == [3, 4] and rows[untrained] == rows["GFlowNet: micro"] == [1, 2]


def test_another_number_of_rows_in_a_step_and_the_same_seed_again_are_other_rows(keep, tmp_path):
    for run, seed in (("a", 1), ("b", 1), ("c", 2)):
        keep(seed, run, gflownet=FLOW)
    results = find_results([tmp_path / "out"])
    results[2]["methods"]["gflownet"]["rows_per_step"] = 64  # of two processes
    rows = seeds_of(compared_rows(results))
    assert rows["SFT"] == [1, 2] and rows["SFT'"] == [1]
    assert [rows[f"GFlowNet: micro{marks}"] for marks in ("", "'", "''")] == [[1], [1], [2]]


@pytest.mark.parametrize(
    ("name", "changes", "users"),
    [
        ("evaluation.num_beams", {"num_beams": 9, "ks": [3, 5]}, 6),
        ("evaluation.ks", {"num_beams": 5, "ks": [5]}, 6),
        ("evaluation.users", {"num_beams": 5, "ks": [3, 5], "users": 4}, 4),
    ],
)
def test_runs_measured_differently_are_refused_by_their_files(keep, tmp_path, capsys, name, changes, users):
    keep(1, "a")
    keep(2, "b", evaluation=changes, users=users)
    assert main(["compare", str(tmp_path / "out"), "--k", "5"]) == 2
    error = capsys.readouterr().err
    files = [str(tmp_path / "out" / f"report-{run}" / "results.json") for run in "ab"]
    assert error.count("\n") == 1 and f"{files[0]} and {files[1]} differ in {name}" in error
    bare = [{key: value for key, value in one.items() if key != "file"} for one in find_results([tmp_path / "out"])]
    with pytest.raises(ValueError, match="'micro' of seed 1 and 'micro' of seed 2 differ in"):
        compared_rows(bare)


def test_results_without_the_second_column_are_compared_by_the_first(keep, tmp_path, capsys):
    """Those of versions before it, alone and together with newer ones."""
    keep(1, "a")
    keep(2, "b")
    keep(3, "c", rewards=[{"type": "ground_truth"}])
    file = tmp_path / "out" / "report-b" / "results.json"
    content = json.loads(file.read_text())
    for entry in content["methods"].values():
        old = {name: value for name, value in entry["metrics"].items() if not name.startswith("unseen_")}
        entry["metrics"] = old
        save_file({name: torch.full((6,), 0.2) for name in old}, f"{entry['folder']}/per_user.safetensors")
    file.write_text(json.dumps(content))
    assert main(["compare", str(tmp_path / "out"), "--k", "5", "--json"]) == 0
    rows = {row["title"]: row for row in json.loads(capsys.readouterr().out)}
    mixed, new = rows["GFlowNet: micro"], rows["GFlowNet: micro'"]
    assert mixed["seeds"] == [1, 2] and new["seeds"] == [3]
    assert mixed["metrics"]["item_ndcg@5"] == pytest.approx(0.15) and "unseen_item_ndcg@5" not in mixed["metrics"]
    assert mixed["differences"]["item_ndcg@5"]["mean_difference"] == 0
    assert mixed["differences"]["unseen_item_ndcg@5"] is None
    assert new["metrics"]["unseen_item_ndcg@5"] == 0.3
    assert new["differences"]["unseen_item_ndcg@5"]["mean_difference"] == 0
    assert main(["compare", str(tmp_path / "out"), "--k", "5"]) == 0
    table = [[cell.strip() for cell in line.split("|")] for line in capsys.readouterr().out.splitlines()]
    column = table[0].index("item NDCG@5, seen removed")
    cells = {line[1]: line[column] for line in table[2:]}
    assert cells["GFlowNet: micro"] == "" and cells["GFlowNet: micro'"] == "0.3000"


def test_outputs_that_have_moved_are_found_where_they_are(keep, tmp_path, monkeypatch):
    for seed, run in ((1, "a"), (2, "b")):
        keep(seed, run)
    (tmp_path / "out").rename(tmp_path / "moved")
    monkeypatch.chdir("/")
    rows = {row.title: row for row in compared_rows(find_results([tmp_path / "moved"]))}
    assert difference(rows["SFT"], rows["Teacher"], "item_ndcg@5")["mean_difference"] == 0


def test_mistakes_are_one_line(keep, tmp_path, capsys):
    keep(1, "a")
    for content in ("{}", "[]", "no JSON"):
        (tmp_path / "other.json").write_text(content)
        assert main(["compare", str(tmp_path / "other.json")]) == 2
        assert "other.json is not the results.json of a run" in capsys.readouterr().err
    assert main(["compare", str(tmp_path / "out"), "--k", "5", "--against", "Stf"]) == 2
    error = capsys.readouterr().err
    assert "--against is 'Stf'; it must be the start of a row's title: Teacher, SFT, SFT continued" in error
