"""Exposed items in a run: what is measured, and that nothing of the truth reaches what is trained."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from gflowtrl import Recommender
from gflowtrl.cli import main
from gflowtrl.data import SyntheticShop, exposed_rows, write_folder
from gflowtrl.data.interactions import Exposed
from gflowtrl.metrics import exposed_metrics
from gflowtrl.pipeline import run
from gflowtrl.pipeline.exposed import exposure_penalty, rank_exposed, system_scorer
from gflowtrl.pipeline.run_data import prepare

from .micro import micro_recipe, micro_settings


METHODS = ["teacher", "sft", "control", "gflownet"]


def make_folder(path: Path, flip: bool = False) -> Path:
    """The micro shop as a folder, in which each user was shown six items at random and likes those that end in 0-4."""
    data, _ = SyntheticShop(**micro_settings("")["data"]["shop"]).generate()
    generator = torch.Generator().manual_seed(0)
    exposed = {}
    for user in data.users[::2]:
        items = [data.items[i] for i in torch.randperm(len(data.items), generator=generator)[:6].tolist()]
        exposed[user] = Exposed(items, [int((data.items.index(item) % 10 < 5) != flip) for item in items])
    impressions = {item: 1 + 3 * place for place, item in enumerate(data.items)}
    sequences = [data.sequences[0][:1], *data.sequences[1:]]  # the first user is too short for training
    write_folder(
        replace(data, sequences=sequences, events=None, synthetic=False, exposed=exposed, impressions=impressions),
        path,
    )
    return path


def settings(folder: Path) -> dict:
    changes = micro_settings("", data_dir=str(folder), data={"max_history_items": 6})
    changes["evaluation"] |= {"calibration_rows": 0}
    for section in ("sft", "gflownet"):
        changes[section] |= {"num_train_epochs": 1}
    return {name: value for name, value in changes.items() if name != "output_dir"}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("exposed")
    recipe = micro_recipe(folder / "out", **settings(make_folder(folder / "data")))
    with pytest.warns(UserWarning, match="1 of 40 users have fewer than 3 items"):
        return recipe, run(recipe, quiet=True)


def test_all_methods_are_measured(finished):
    recipe, results = finished
    found = results["exposed"]
    assert list(found["methods"]) == METHODS and found["users"] == 19 and found["correction"] == 0.5
    for entry in found["methods"].values():
        assert (
            {"ndcg@5", "recall@5", "auc", "corrected_auc"}
            <= entry["metrics"].keys()
            == entry["standard_errors"].keys()
        )
    interval = found["gflownet_minus_control"]["auc"]
    flow, control = (found["methods"][method]["metrics"]["auc"] for method in ("gflownet", "control"))
    assert interval["mean_difference"] == pytest.approx(flow - control)
    report = Path(recipe.output_dir, "report.md").read_text()
    assert "Items that 19 users were shown at random" in report and "GFlowNet - control, AUC, corrected:" in report
    metrics = results["methods"]["gflownet"]["metrics"]
    assert {"snips_item_ndcg@5", "ips_item_recall@5"} <= metrics.keys()


def test_the_figures_are_those_of_the_saved_model(finished):
    recipe, results = finished
    from gflowtrl.data import read_interactions

    data = read_interactions(recipe.data_dir)
    rows = exposed_rows(data.users, data.sequences, data.exposed).rows
    model = Recommender.from_pretrained(results["methods"]["gflownet"]["model"])
    scores, liked = [], []
    for history, candidates, likes in zip(rows["history"], rows["candidates"], rows["liked"], strict=True):
        (log_probs,) = model.policy.leaf_log_probs(model.prompts([history]))
        leaves = model.catalog.leaf_of(candidates)
        scores.append((log_probs[leaves] - model.catalog.leaf_sizes[leaves].log()).tolist())
        liked.append(likes)
    width = max(map(len, liked))
    pad = lambda rows, value: torch.tensor([row + [value] * (width - len(row)) for row in rows])  # noqa: E731
    corrected = [
        [
            s - 0.5 * torch.log1p(torch.tensor(float(data.impressions[i]))).item()
            for s, i in zip(row, items, strict=True)
        ]
        for row, items in zip(scores, rows["candidates"], strict=True)
    ]
    record = results["exposed"]["methods"]["gflownet"]
    kept = load_file(Path(record["folder"], "per_user.safetensors"))
    for prefix, values in (("", scores), ("corrected_", corrected)):
        for name, expected in exposed_metrics(pad(values, 0.0), pad(liked, -100)).items():
            assert torch.allclose(kept[f"{prefix}{name}"], expected, equal_nan=True), name
            assert record["metrics"][f"{prefix}{name}"] == pytest.approx(float(expected.nanmean()))


def test_nothing_of_the_truth_reaches_what_is_trained(finished, tmp_path):
    recipe, results = finished
    with pytest.warns(UserWarning):
        other = run(micro_recipe(tmp_path / "out", **settings(make_folder(tmp_path / "data", flip=True))), quiet=True)
    flipped = other["exposed"]["methods"]["gflownet"]["metrics"]
    assert flipped["auc"] == pytest.approx(1 - results["exposed"]["methods"]["gflownet"]["metrics"]["auc"])
    assert other["data"]["fingerprint"] == results["data"]["fingerprint"]
    for method in METHODS:
        assert other["methods"][method]["metrics"] == results["methods"][method]["metrics"], method
        if "model" in other["methods"][method]:
            one, two = (load_file(Path(r["methods"][method]["model"], "model.safetensors")) for r in (results, other))
            assert all(torch.equal(one[name], two[name]) for name in one)


def test_several_orders_are_averaged(finished):
    recipe, results = finished
    from gflowtrl.data import read_interactions, reordered

    data = read_interactions(recipe.data_dir)
    rows = exposed_rows(data.users, data.sequences, data.exposed).rows
    model = Recommender.from_pretrained(results["methods"]["sft"]["model"])
    score = system_scorer(model)
    found = rank_exposed(score, rows, model.catalog, orders=3, batch_size=7, progress=False)
    for row in range(0, len(rows), 5):
        candidates = model.catalog.index_of(rows[row]["candidates"])[None]
        views = [reordered([rows[row]["history"]], [rows[row]["row_id"]], number) for number in range(3)]
        expected = torch.stack([score(view, candidates).double().exp() for view in views]).mean(0).log()
        assert torch.allclose(found[row, : candidates.shape[1]], expected[0], atol=1e-5)


def test_the_command_reports_exposed_items(finished, tmp_path, capsys):
    recipe, results = finished
    folder, output = results["methods"]["gflownet"]["model"], tmp_path / "metrics.json"
    options = ["--data_dir", recipe.data_dir, "--ks", "3", "5", "--num_beams", "5", "--output", str(output)]
    assert main(["evaluate", "--model", folder, *options]) == 0
    assert "19 users with exposed items" in capsys.readouterr().out
    found, expected = json.loads(output.read_text())["exposed"]["metrics"], results["exposed"]["methods"]["gflownet"]
    assert found == pytest.approx(expected["metrics"])
    assert main(["evaluate", "--model", folder, folder, *options]) == 0  # an ensemble of one and the same model
    assert json.loads(output.read_text())["exposed"]["metrics"] == pytest.approx(expected["metrics"])
    assert main(["evaluate", "--model", folder, *options, "--exposed_orders", "0"]) == 2


def test_new_items_are_measured_apart(tmp_path):
    settings_of = settings(make_folder(tmp_path / "data"))
    settings_of["data"] |= {"new_items": 0.2}
    settings_of |= {"stages": ["teacher", "gflownet"], "start": "untrained"}
    results = run(micro_recipe(tmp_path / "out", **settings_of), quiet=True)
    found = results["new_items"]
    assert found["items"] == 6 and 0 < found["users"] < results["data"]["test_users"]
    for method, groups in found["methods"].items():
        of_new, of_others = (groups[group]["item_recall@5"][0] for group in ("new", "others"))
        share = found["users"] / results["data"]["test_users"]
        mean = results["methods"][method]["metrics"]["item_recall@5"]
        assert share * of_new + (1 - share) * of_others == pytest.approx(mean, abs=1e-6)
    assert "New items: 6 items do not occur in training" in Path(tmp_path, "out", "report.md").read_text()


def test_a_run_may_be_split_by_time(tmp_path):
    changes = micro_settings("", start="untrained", stages=["teacher", "gflownet"])
    changes["data"] |= {"split": "temporal", "validation_share": 0.2, "test_share": 0.2}
    changes["gflownet"] |= {"num_train_epochs": 1}
    changes["evaluation"] |= {"calibration_rows": 0}
    recipe = micro_recipe(tmp_path / "out", **{name: value for name, value in changes.items() if name != "output_dir"})
    data = prepare(recipe)
    counts = dict(zip(data.splits.items, data.item_counts.tolist(), strict=True))
    assert data.new_items == {item for item, count in counts.items() if not count}
    results = run(recipe, data, quiet=True)
    assert results["data"]["test_users"] == len(data.splits.test)
    assert "their first items after a point in time" in Path(tmp_path, "out", "report.md").read_text()


def test_the_penalty_grows_with_the_logarithm_of_the_count():
    assert exposure_penalty(torch.tensor([0, 9]), 0.5).tolist() == pytest.approx([0.0, 0.5 * 2.302585])
