"""benchmarks/quality/office.py on a micro shop written to a folder."""

import importlib.util
import json
from pathlib import Path

import pytest
import torch
import yaml

from gflowtrl.data import SyntheticShop, write_folder

from .micro import micro_settings


@pytest.fixture
def office(monkeypatch, tmp_path):
    file = Path(__file__).parents[2] / "benchmarks" / "quality" / "office.py"
    spec = importlib.util.spec_from_file_location("office", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "KEPT", tmp_path / "kept")
    return module


def test_runs_are_kept_tabulated_and_not_repeated(office, tmp_path, monkeypatch, capsys):
    shop = SyntheticShop(n_users=40, n_items=30, departments=3, shelves=3, interests=3, min_users_shown=15)
    write_folder(shop.generate()[0], tmp_path / "data")
    recipe = micro_settings(tmp_path, data={}, evaluation={}) | {
        "gflownet": {"loss_type": "exact_flow", "max_steps": 3}
    }
    (tmp_path / "base.yaml").write_text(yaml.safe_dump({**recipe, "sft": {"max_steps": 3}}))
    (tmp_path / "one.yaml").write_text("base: base.yaml\nname: one")
    (tmp_path / "two.yaml").write_text("base: base.yaml\nname: two\nrewards: [{type: collaborative}]")
    recipes = [str(tmp_path / f"{name}.yaml") for name in ("one", "two")]
    monkeypatch.chdir(tmp_path)
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
    values = [json.loads(file.read_text())["methods"]["gflownet"]["metrics"]["recall@10"] for file in kept[:2]]
    assert office.spread(values) in printed[-2]

    monkeypatch.setattr(office, "run", lambda recipe: pytest.fail("a kept run was repeated"))
    office.main()
    assert capsys.readouterr().out.splitlines()[-6:] == printed[-6:]


def test_gains_follow_from_ranks(office):
    gains = office.gains(torch.tensor([0, 1, 3, 10, 11], dtype=torch.uint8))
    assert gains["recall@10"].tolist() == [0, 1, 1, 1, 0]
    torch.testing.assert_close(gains["ndcg@10"][:3], torch.tensor([0, 1, 0.5], dtype=torch.double))
