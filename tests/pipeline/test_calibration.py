"""The last stage of a run: policies against R / Z."""

from pathlib import Path

import pytest
import torch

from gflowtrl.pipeline import calibration, plots, run
from gflowtrl.pipeline.calibration import some
from gflowtrl.pipeline.run_data import prepare
from gflowtrl.pipeline.run_report import text
from gflowtrl.policy import load_backbone, make_policy
from gflowtrl.teachers import load_teacher

from .micro import micro_recipe, micro_settings


METHODS = ["sft", "control", "gflownet"]
SHORT = {"loss_type": ["vargrad"], "num_generations": 3, "max_steps": 2, "per_device_train_batch_size": 8}


def short_recipe(folder, rows=None, rewards=None, sampler="reward", **gflownet):
    """A run of two steps a stage that shares its SFT with the others in `folder`."""
    settings = micro_settings(folder)
    changes = {"evaluation": settings["evaluation"] | {"calibration_rows": rows}, "stages": METHODS}
    return micro_recipe(
        folder, **changes, gflownet=SHORT | gflownet, sft=settings["sft"] | {"num_train_epochs": 1},
        rewards=rewards or [{"type": "likelihood", "of": "sft"}], sampler=sampler,
    )  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("calibration")


def test_distances_are_those_of_the_enumerated_distributions(folder):
    rewards = [{"type": "ground_truth", "weight": 0.3}, {"type": "collaborative", "weight": 0.7}]
    recipe = short_recipe(folder, rows=9, rewards=rewards, reward_floor=0.0)
    results = run(recipe, quiet=True)
    found, run_data = results["calibration"], prepare(recipe)
    assert found["rows"] == 9 and found["target"] == "R / Z" and list(found["methods"]) == METHODS
    teacher = load_teacher(next(Path(recipe.output_dir).glob("teacher-*")) / "model")
    catalog = run_data.catalog
    for method in METHODS:
        policy = make_policy(load_backbone(results["methods"][method]["model"]).eval(), catalog)
        for part, rows in (("training", run_data.splits.train), ("test", run_data.test)):
            expected = []
            for row in some(rows, 9):
                items = 0.7 * teacher.score([row["history"][-6:]])[0].double().softmax(0)
                items[catalog.items.index(row["target"])] += 0.3
                target = torch.zeros(catalog.tree.num_leaves, dtype=torch.double)
                target.index_add_(0, catalog.item_leaf.cpu(), items)
                with torch.no_grad():
                    probs = policy.leaf_log_probs(run_data.encoder([row["history"]]))[0].double().exp()
                expected.append((probs - target).abs().sum().item() / 2)
            own = found["methods"][method][part]
            assert own["total_variation"] == pytest.approx(sum(expected) / 9, rel=1e-4)
            assert sum(own["reliability"]["leaves"]) == 9 * catalog.tree.num_leaves
    report = text(results)
    assert "Distance of each policy to R / Z (all" in report
    values = [
        found["methods"]["gflownet"][p][n] for p in ("training", "test") for n in ("total_variation", "jensen_shannon")
    ]
    assert f"| GFlowNet                | {' | '.join(f'{v:12.4f}' for v in values[:2])} |" in report


def test_a_policy_that_is_r_over_z_lies_on_the_diagonal(folder):
    """R is the SFT model's own probability: SFT is the target, the GFlowNet has nothing to learn, the control leaves
    it. Adam would make steps of the learning rate of what rounding leaves of the gradient."""
    recipe = short_recipe(folder, rows=5, reward_floor=0.0, optim="sgd", learning_rate=0.5)
    found = run(recipe, quiet=True)["calibration"]
    for part in ("training", "test"):
        for method in ("sft", "gflownet"):
            own = found["methods"][method][part]
            assert own["total_variation"] < 1e-5 and own["jensen_shannon"] < 1e-6
            assert own["reliability"]["policy"] == pytest.approx(own["reliability"]["target"], rel=1e-4)
        assert found["methods"]["control"][part]["total_variation"] > 1e-3


def test_the_reference_model_is_a_part_of_the_target(folder):
    """pi_ref^1 R / Z with pi_ref = R = SFT is SFT squared."""
    recipe = short_recipe(folder, rows=3, reward_floor=0.0, ref_weight=1.0)
    results = run(recipe, quiet=True)
    assert results["calibration"]["target"] == "pi_ref^1 R / Z" and "to pi_ref^1 R / Z (all" in text(results)
    run_data = prepare(recipe)
    policy = make_policy(load_backbone(results["methods"]["sft"]["model"]).eval(), run_data.catalog)
    with torch.no_grad():
        log_probs = policy.leaf_log_probs(run_data.encoder(some(run_data.test, 3)["history"])).double()
    expected = (log_probs.exp() - (2 * log_probs).softmax(1)).abs().sum(1).mean() / 2
    assert results["calibration"]["methods"]["sft"]["test"]["total_variation"] == pytest.approx(
        expected.item(), rel=1e-4
    )


def test_it_is_left_out_where_it_is_not_wanted_or_means_nothing(folder, capsys, monkeypatch):
    assert "calibration" not in run(short_recipe(folder, rows=0), quiet=True)
    moving = [{"type": "likelihood", "of": "policy"}, {"type": "ground_truth"}]
    sampled = run(short_recipe(folder, rewards=moving, sampler="on_policy"))
    assert "'likelihood' scores drawn items only" in sampled["calibration"]["left_out"]
    assert "[calibration] Left out: 'likelihood' scores drawn" in capsys.readouterr().out
    assert "Distance to R / Z left out: 'likelihood'" in text(sampled)
    monkeypatch.setattr(calibration, "AFFORDABLE", {"cpu": 1e6, "other": 1e6})
    large = run(short_recipe(folder), quiet=True)["calibration"]
    assert list(large) == ["left_out"] and "Set evaluation.calibration_rows: 40 to compare anyway" in large["left_out"]
    assert run(short_recipe(folder, rows=2), quiet=True)["calibration"]["rows"] == 2
    with pytest.raises(ValueError, match="calibration_rows is .*; it must be a whole number of at least 0 or None"):
        short_recipe(folder, rows=-1)


def test_the_diagram_has_a_line_a_method_and_the_diagonal():
    def curve(*policy):
        return {"total_variation": 0.25, "reliability": {"target": [1e-4, 1e-2], "policy": policy, "leaves": [9, 1]}}

    methods = {"sft": {p: curve(1e-3, 1e-3) for p in ("training", "test")}}
    methods["gflownet"] = {p: curve(1e-4, 1e-2) for p in ("training", "test")}
    figure = plots._calibration({"rows": 5, "leaves": 10, "target": "R / Z", "methods": methods}, plots.TITLES)
    assert len(figure.axes) == 2
    for axes, part in zip(figure.axes, ("training", "test"), strict=True):
        assert axes.get_xscale() == axes.get_yscale() == "log" and f"5 {part} rows" in axes.get_title()
        labels = [entry.get_text() for entry in axes.get_legend().get_texts()]
        assert labels == ["SFT: TV 0.250", "GFlowNet: TV 0.250", "R / Z itself: TV 0"]
        sft, flow, diagonal = axes.get_lines()
        assert list(flow.get_ydata()) == list(flow.get_xdata()) == list(diagonal.get_xdata())
        assert list(diagonal.get_ydata()) == list(diagonal.get_xdata()) and list(sft.get_ydata()) == [1e-3, 1e-3]
