"""benchmarks/quality/office.py, audit.py and comparison.py on a micro shop written to a folder."""

import importlib.util
import json
import sys
from argparse import Namespace
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from gflowtrl.data import SyntheticShop, write_folder
from gflowtrl.losses import LOSSES, registry
from gflowtrl.pipeline import load_recipe
from gflowtrl.pipeline.recipe import SCHEDULE

from .micro import micro_recipe, micro_settings


QUALITY = Path(__file__).parents[2] / "benchmarks" / "quality"


def script(name: str, monkeypatch, kept: Path):
    spec = importlib.util.spec_from_file_location(name, QUALITY / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(registry, "LOSSES", dict(registry.LOSSES))  # audit.py registers one
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "KEPT", kept)
    return module


@pytest.fixture
def office(monkeypatch, tmp_path):
    return script("office", monkeypatch, tmp_path / "kept")


@pytest.fixture
def base(tmp_path, monkeypatch) -> Path:
    """A recipe on data in a folder, in the working directory."""
    shop = SyntheticShop(n_users=40, n_items=30, departments=3, shelves=3, interests=3, min_users_shown=15)
    write_folder(shop.generate()[0], tmp_path / "data")
    recipe = micro_settings(tmp_path, data={}, evaluation={}) | {
        "gflownet": {"loss_type": "exact_flow", "max_steps": 3}
    }
    (tmp_path / "base.yaml").write_text(yaml.safe_dump({**recipe, "sft": {"max_steps": 3}}))
    monkeypatch.chdir(tmp_path)
    return tmp_path / "base.yaml"


def test_records_from_before_there_was_a_start_are_of_the_same_recipe(office, tmp_path):
    now = micro_recipe(tmp_path).as_dict()
    before = {name: value for name, value in now.items() if name != "start"}
    assert office.settings(now) == office.settings(before)
    assert office.settings(micro_recipe(tmp_path, start="untrained").as_dict()) != office.settings(before)


def test_the_recipes_of_the_audit_start_from_one_checkpoint_and_train_equally_long():
    """Every method of docs/rivals.md. Other ids (LETTER) need a checkpoint of their own."""
    files = sorted((QUALITY / "recipes" / "audit").glob("*.yaml"))
    recipes = {file.stem: load_recipe(file) for file in files}
    first = recipes["cross_entropy"].as_dict()
    shared = (
        "output_dir",
        "seed",
        "start",
        "stages",
        "data",
        "model",
        "prompt",
        "peft",
        "teacher",
        "sft",
        "evaluation",
    )
    for name, recipe in recipes.items():
        assert recipe.name == name and recipe.start == "sft"
        ours = recipe.as_dict()
        different = [section for section in shared if ours[section] != first[section]]
        assert different == (["data"] if name == "letter" else []), name
        schedule = [ours["gflownet"].get(entry) == first["gflownet"].get(entry) for entry in SCHEDULE]
        assert all(schedule), name
    used = {loss for recipe in recipes.values() for loss in recipe.training_arguments("gflownet", Path("x")).losses}
    assert used == set(LOSSES) - {"contrastive_balance", "subtrajectory_balance"}


@pytest.mark.slow
def test_runs_are_kept_tabulated_and_not_repeated(office, base, tmp_path, monkeypatch, capsys):
    (tmp_path / "one.yaml").write_text("base: base.yaml\nname: one")
    (tmp_path / "two.yaml").write_text("base: base.yaml\nname: two\nrewards: [{type: collaborative}]")
    recipes = [str(tmp_path / f"{name}.yaml") for name in ("one", "two")]
    arguments = ["office.py", "--data_dir", "data", "--seeds", "1", "2", "--recipes", *recipes]
    monkeypatch.setattr("sys.argv", arguments)
    office.main()
    printed = capsys.readouterr().out.splitlines()
    rows = [line.split("|")[1].strip() for line in printed[-6:] if line.startswith("|")]
    assert rows[-5:] == ["Teacher", "SFT", "SFT continued (control)", "GFlowNet: one", "GFlowNet: two"]
    kept = sorted((tmp_path / "kept").glob("*.json"))
    assert [file.name for file in kept] == [
        f"office-{name}-seed{seed}.json" for name in ("one", "two") for seed in (1, 2)
    ]
    assert str(tmp_path) not in kept[0].read_text()
    values = [json.loads(file.read_text())["methods"]["gflownet"]["metrics"]["item_recall@10"] for file in kept[:2]]
    assert office.spread(values) in printed[-2]
    record, ranks = json.loads(kept[0].read_text()), load_file(kept[0].with_suffix(".safetensors"))
    for name, prefix in (("gflownet", ""), ("gflownet, seen removed", "unseen_")):
        mean = office.gains(ranks[name])["ndcg@10"].mean()
        assert mean == pytest.approx(record["methods"]["gflownet"]["metrics"][f"{prefix}ndcg@10"], abs=1e-6)

    monkeypatch.setattr(office, "run", lambda recipe: pytest.fail("a kept run was repeated"))
    office.main()
    assert capsys.readouterr().out.splitlines()[-6:] == printed[-6:]


def test_gains_follow_from_ranks(office):
    gains = office.gains(torch.tensor([0, 1, 3, 10, 11], dtype=torch.uint8))
    assert gains["recall@10"].tolist() == [0, 1, 1, 1, 0]
    torch.testing.assert_close(gains["ndcg@10"][:3], torch.tensor([0, 1, 0.5], dtype=torch.double))


def test_records_of_older_versions_are_tabulated(office):
    """They have no figures with seen items removed; their cells are empty."""
    files = sorted((QUALITY.parent / "results" / "quality").glob("office-gflowgr_office_llama-seed4?.json"))
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in office.table({"main": files}).splitlines()]
    rows = {line[0]: dict(zip(lines[0], line, strict=True)) for line in lines[2:]}
    metrics = [json.loads(file.read_text())["methods"]["sft"]["metrics"] for file in files]
    assert rows["SFT"]["item Recall@10"] == office.spread([one["item_recall@10"] for one in metrics])
    unseen = [one.get("unseen_item_ndcg@10") for one in metrics]
    assert rows["SFT"]["item NDCG@10, seen removed"] == ("" if None in unseen else office.spread(unseen))


@pytest.mark.slow
def test_a_study_of_the_audit_is_run_kept_and_tabulated(office, base, tmp_path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(QUALITY)
    audit = script("audit", monkeypatch, tmp_path / "kept")
    from studies import ALL, Row

    study = {
        "first": Row("one", base, (), ALL),
        "second": Row("two", base, ["--gflownet.max_steps", "2"]),
        "third": Row("three", base, ["--gflownet.max_steps", "3"]),
    }
    monkeypatch.setattr(audit, "STUDIES", {"micro": study})
    given = Namespace(data_dir="data", output_dir="runs")
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "audit-micro-third-seed1.begun").touch()  # as after an interruption
    for name in study:
        assert not audit.is_done("micro", name, 1)
        audit.run_cell("micro", name, 1, given, [])
        assert audit.is_done("micro", name, 1)
    assert not audit.is_done("micro", "second", 1, ["--gflownet.max_steps", "1"])  # another recipe

    rows = {line["method"]: line for line in audit.table("micro", [1])}
    titles = audit.SHARED
    assert sorted(rows) == sorted([*titles.values(), "one", "three", "two"])
    costs = {name: (bool(row["minutes"]), bool(row["GiB"])) for name, row in rows.items()}
    assert costs["two"] == (True, True) and costs["three"] == (False, False) and costs["one"] == (True, False)
    assert not list((tmp_path / "runs").glob("*.begun"))
    ndcg = [float(row["NDCG@10"]) for row in rows.values()]
    assert ndcg == sorted(ndcg, reverse=True)
    records = {name: json.loads((tmp_path / "kept" / f"audit-micro-{name}-seed1.json").read_text()) for name in study}
    measured = [("one", "first", "gflownet"), ("two", "second", "gflownet"), (titles["sft"], "first", "sft")]
    for title, name, method in measured:
        metrics, survival = records[name]["methods"][method]["metrics"], records[name]["survival"][method]
        assert rows[title]["Recall@10, seen removed"] == f"{metrics['unseen_item_recall@10']:.4f}"
        assert rows[title]["kept"] == f"{survival['survival@2']:.3f}"
        # The last prefix is the whole id: where it survives the beam of 20, it is a hit among 20.
        assert survival["survival@3"] == pytest.approx(metrics["recall@20"])
    assert rows[titles["control"]]["Recall@10 minus control"] == "" and "[" in rows["two"]["Recall@10 minus control"]
    with pytest.raises(SystemExit, match="The row first of the study micro, which has the control, is not finished"):
        audit.table("micro", [1, 2])


@pytest.mark.slow
def test_the_comparison_measures_prefixes_and_differences(office, base, tmp_path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(QUALITY)
    script("audit", monkeypatch, tmp_path / "kept")
    comparison = script("comparison", monkeypatch, tmp_path / "kept")
    (tmp_path / "ce.yaml").write_text(
        "base: base.yaml\nname: cross_entropy\nrewards: []\nsampler: null\ngflownet: {loss_type: sft}"
    )
    (tmp_path / "two.yaml").write_text("base: base.yaml\nname: two")
    costs = {"method": "two", "seconds_an_epoch": 12.3, "peak_memory": 4.5e6}
    (tmp_path / "costs.json").write_text(json.dumps({"rows": [costs]}))
    recipes = ["--recipes", "ce.yaml", "two.yaml", "--costs", "costs.json"]
    monkeypatch.setattr("sys.argv", ["comparison.py", "--data_dir", "data", "--seeds", "1", *recipes])
    comparison.main()
    table = [[cell.strip() for cell in line.split("|")[1:-1]] for line in capsys.readouterr().out.splitlines()[-7:]]
    by_title = {row[0]: dict(zip(table[0], row, strict=True)) for row in table}
    assert list(by_title)[2:] == [*comparison.SHARED.values(), "cross entropy", "two"]
    assert by_title["two"]["s per epoch"] == "12" and by_title["two"]["peak MB"] == "4"
    assert by_title["cross entropy"]["recall@10 - cross entropy"] == ""
    kept = json.loads((tmp_path / "kept" / "office-two-seed1.json").read_text())["methods"]["gflownet"]["metrics"]
    found = json.loads((tmp_path / "kept" / "office-two-seed1-prefixes.json").read_text())["methods"]["gflownet"]
    # The last prefix is the whole id: where it survives the beam of 20, it is a hit among 20.
    assert found["survival@3"] == pytest.approx(kept["recall@20"])
    assert by_title["two"]["top 20 found"] == f"{found['top_survival']:.3f}"


def test_calibration_is_that_of_the_run_and_kept(office, base, tmp_path, monkeypatch, capsys):
    calibration = script("calibration", monkeypatch, tmp_path / "kept")
    (tmp_path / "kept").mkdir()
    (tmp_path / "one.yaml").write_text("base: base.yaml\nname: one")
    arguments = ["--data_dir", "data", "--seeds", "1", "--recipes", "one.yaml", "--output_dir", "runs", "--rows", "6"]
    monkeypatch.setattr("sys.argv", ["calibration.py", *arguments])
    calibration.main()
    printed = capsys.readouterr().out.splitlines()[-3:]
    kept = json.loads((tmp_path / "kept" / "calibration-one-seed1.json").read_text())
    own = json.loads((tmp_path / "runs" / "results.json").read_text())["calibration"]["methods"]
    assert kept.keys() == {"rows", "leaves", "recipe", "methods"} and kept["rows"] == 6
    for row, (method, title) in zip(printed, calibration.METHODS.items(), strict=True):
        for part in ("training", "test"):
            assert kept["methods"][method][part] == {n: v for n, v in own[method][part].items() if n != "reliability"}
        cells = [cell.strip() for cell in row.split("|")[1:4]]
        assert cells == ["one", title, f"{own[method]['training']['total_variation']:.3f}"]
    monkeypatch.setattr(calibration, "run", lambda *a, **k: pytest.fail("a kept record was made again"))
    calibration.main()
    assert capsys.readouterr().out.splitlines()[-3:] == printed


def test_how_policies_are_compared_is_no_part_of_a_recipe(office):
    kept = micro_recipe("runs").as_dict()
    evaluation = kept["evaluation"] | {"calibration_rows": 5}
    assert office.settings(micro_recipe("elsewhere", evaluation=evaluation).as_dict()) == office.settings(kept)
    assert office.settings(micro_recipe("runs", seed=8).as_dict()) != office.settings(kept)
