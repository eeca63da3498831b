"""Control and GFlowNet that begin from the untrained model, without a stage SFT."""

import json
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from transformers import TrainerCallback

from gflowtrl import Recommender
from gflowtrl.cli.train import main
from gflowtrl.pipeline import run
from gflowtrl.pipeline.dry_run import dry_run
from gflowtrl.pipeline.models import build_model
from gflowtrl.pipeline.plots import titles_of
from gflowtrl.pipeline.recipe import STAGES
from gflowtrl.pipeline.run_data import prepare
from gflowtrl.pipeline.run_report import text

from .micro import micro_recipe, micro_settings
from .test_run import Forbidden, Interrupt, weights


METHODS = ["teacher", "control", "gflownet"]


class Seen(TrainerCallback):
    """The weights that each training begins with, by the stage's name."""

    def __init__(self):
        self.weights = {}

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        name = Path(args.output_dir).parent.name.rpartition("-")[0]
        self.weights[name] = {key: value.clone() for key, value in model.state_dict().items()}


def untrained(folder, **changes):
    return micro_recipe(folder, **({"start": "untrained"} | changes))


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    recipe, seen = untrained(tmp_path_factory.mktemp("untrained")), Seen()
    return recipe, run(recipe, quiet=True, callbacks=[seen]), seen.weights


def test_there_is_no_sft(finished):
    recipe, results, _ = finished
    assert list(results["methods"]) == METHODS and results["recipe"]["start"] == "untrained"
    assert {name.rpartition("-")[0] for name in results["seconds"]} == {
        *METHODS, "calibration", *(f"test-{method}" for method in METHODS)
    }  # fmt: skip
    assert not list(Path(recipe.output_dir).glob("*sft*"))
    control, flow = (results["methods"][name] for name in METHODS[1:])
    assert control["steps"] == flow["steps"] > 0 and control["rows_per_step"] == flow["rows_per_step"]
    assert list(results["calibration"]["methods"]) == METHODS[1:] and "gflownet_minus_control" in results
    for name in ("accuracy_vs_coverage", "metrics", "recall_by_popularity", "training", "calibration"):
        assert Path(recipe.output_dir, f"{name}.png").stat().st_size > 5000, name


def test_the_control_is_not_called_sft_continued(finished):
    recipe, results, _ = finished
    report = text(results)
    assert report.count("| Cross entropy (control)") == 2 and "SFT" not in report  # two tables
    assert titles_of(recipe.as_dict())["control"] == "Cross entropy (control)"
    assert titles_of({})["control"] == titles_of({"start": "sft"})["control"] == "SFT continued (control)"


def test_both_begin_with_the_weights_of_the_seed(finished):
    recipe, _, seen = finished
    expected = build_model(prepare(recipe)).state_dict()
    assert list(seen) == METHODS[1:]
    for begun in seen.values():
        assert all(torch.equal(begun[name], value) for name, value in expected.items())


def test_models_are_recommenders_with_cards(finished):
    recipe, results, _ = finished
    history = prepare(recipe).splits.test["history"][0]
    for method in METHODS[1:]:
        folder = results["methods"][method]["model"]
        assert len(Recommender.from_pretrained(folder).recommend([history], k=5)[0]) == 5
        card = ModelCard.load(Path(folder, "README.md"))
        assert card.data.model_name == f"micro-{method}" and "Training started from" not in card.text


def test_an_interrupted_run_ends_like_an_undisturbed_one(finished, tmp_path):
    _, results, _ = finished
    again, steps = untrained(tmp_path, stages=["gflownet"]), results["methods"]["gflownet"]["steps"]
    with pytest.raises(KeyboardInterrupt):
        run(again, callbacks=[Interrupt("gflownet", step=steps // 2 + 1)], quiet=True)
    resumed = run(again, quiet=True)["methods"]["gflownet"]
    first, second = weights(results["methods"]["gflownet"]["model"]), weights(resumed["model"])
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_finished_run_is_skipped_whatever_sft_says(finished):
    recipe, results, _ = finished
    again = run(untrained(recipe.output_dir, sft={"num_train_epochs": 9}), callbacks=[Forbidden()], quiet=True)
    assert again["methods"] == results["methods"] and again["calibration"] == results["calibration"]


@pytest.mark.parametrize(
    "changes",
    [
        {"seed": 8},
        {"model": micro_settings(".")["model"] | {"num_hidden_layers": 2}},
        {"data": micro_settings(".")["data"] | {"max_history_items": 5}},
    ],
    ids=lambda changes: next(iter(changes)),
)
@pytest.mark.parametrize("stage", METHODS[1:])
def test_other_beginnings_are_other_stages(finished, stage, changes):
    recipe, _, _ = finished
    with pytest.raises(AssertionError, match="was trained again"):
        run(untrained(recipe.output_dir, stages=[stage], **changes), callbacks=[Forbidden()], quiet=True)


def test_sft_may_be_a_method_to_compare_with(finished):
    """The other stages start from the same model as without it, and are not trained again."""
    recipe, results, _ = finished
    seen = Seen()
    both = run(untrained(recipe.output_dir, stages=list(STAGES)), callbacks=[seen], quiet=True)
    assert list(both["methods"]) == list(STAGES) and list(seen.weights) == ["sft"]
    assert list(both["calibration"]["methods"]) == list(STAGES[1:])
    for method in METHODS:
        assert both["methods"][method] == results["methods"][method]


def test_the_control_may_have_its_own_length(tmp_path):
    settings = micro_settings(tmp_path)
    flow = settings["gflownet"] | {"max_steps": 2}
    evaluation = settings["evaluation"] | {"calibration_rows": 0, "users": 5}
    recipe = untrained(tmp_path, control={"max_steps": 3}, gflownet=flow, evaluation=evaluation)
    methods = run(recipe, quiet=True)["methods"]
    assert [methods[name]["steps"] for name in METHODS[1:]] == [3, 2]


def test_a_likelihood_of_the_policy_needs_no_sft(tmp_path):
    settings = micro_settings(tmp_path)
    flow = settings["gflownet"] | {"loss_type": ["vargrad"], "max_steps": 1}
    rewards = [{"type": "likelihood", "of": "policy"}, {"type": "ground_truth"}]
    recipe = untrained(tmp_path, stages=["gflownet"], gflownet=flow, rewards=rewards, sampler="on_policy")
    assert list(run(recipe, quiet=True)["methods"]) == ["gflownet"]


def test_only_what_is_trained_is_tried_and_done_again(finished, tmp_path, capsys):
    recipe, results, _ = finished
    with pytest.raises(ValueError, match=r"control\.lr_scheduler_type"):
        dry_run(prepare(untrained(tmp_path, control={"lr_scheduler_type": "cosine_with_min_lr"})))
    dry_run(prepare(untrained(tmp_path, sft={"lr_scheduler_type": "cosine_with_min_lr"})))
    file = tmp_path / "recipe.yaml"
    file.write_text(json.dumps(micro_settings(recipe.output_dir, start="untrained")))
    assert main(["--config", str(file), "--redo", "sft"]) == 2
    assert "There is no stage 'sft'" in capsys.readouterr().err
    assert main(["--config", str(file), "--redo", "gflownet"]) == 0
    printed = capsys.readouterr().out
    assert "[gflownet] finished" in printed and "[control] finished" not in printed
    assert "GFlowNet training from the untrained model" in printed
    again = json.loads(Path(recipe.output_dir, "results.json").read_text())["methods"]["gflownet"]
    assert again["best_step"] == results["methods"]["gflownet"]["best_step"]
