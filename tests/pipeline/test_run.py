"""The whole pipeline on a micro shop."""

import json
import shutil
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, TrainerCallback

from gflowtrl import Recommender
from gflowtrl.cli.train import main
from gflowtrl.data import SyntheticShop, leave_one_out, write_folder
from gflowtrl.metrics import popularity_groups
from gflowtrl.pipeline import run
from gflowtrl.pipeline.evaluation import earlier_items
from gflowtrl.pipeline.run import _plan
from gflowtrl.pipeline.run_data import files_fingerprint, prepare
from gflowtrl.pipeline.run_report import table
from gflowtrl.pipeline.training import _sft_trainer
from gflowtrl.trainer.resume import last_checkpoint
from tests.tiny import tiny_model

from .micro import micro_recipe, micro_settings


METHODS = ["teacher", "sft", "control", "gflownet"]


class Interrupt(TrainerCallback):
    """Ctrl-C at a step of the n-th trainer."""

    def __init__(self, stage: str, step: int):
        self.stage, self.step = stage, step

    def on_step_end(self, args, state, control, **kwargs):
        if Path(args.output_dir).parent.name.startswith(self.stage) and state.global_step == self.step:
            raise KeyboardInterrupt


class Forbidden(TrainerCallback):
    """No trainer may run."""

    def on_train_begin(self, args, state, control, **kwargs):
        raise AssertionError("a finished stage was trained again")


def weights(folder: str) -> dict[str, torch.Tensor]:
    return load_file(Path(folder, "model.safetensors"))


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    recipe = micro_recipe(tmp_path_factory.mktemp("pipeline"))
    return recipe, run(recipe, quiet=True)


def test_results_hold_what_a_reader_needs(finished):
    recipe, results = finished
    assert json.loads(Path(recipe.output_dir, "results.json").read_text()) == results
    assert list(results["methods"]) == METHODS
    for entry in results["methods"].values():
        metrics = entry["metrics"]
        for kind in ("recall", "item_recall", "unseen_recall", "unseen_item_recall"):
            assert 0 <= metrics[f"{kind}@3"] <= metrics[f"{kind}@5"] <= 1
        assert {"ndcg@5", "coverage@5", "entropy@5", "gini@5", "long_tail@5", "unseen_liked_mass"} <= metrics.keys()
        assert 0 < metrics["total_variation"] < 1
    for name in ("item_recall@5", "item_ndcg@5", "unseen_item_recall@5", "unseen_item_ndcg@5"):
        interval = results["gflownet_minus_control"][name]
        flow, control = (results["methods"][method]["metrics"][name] for method in ("gflownet", "control"))
        assert interval["mean_difference"] == pytest.approx(flow - control, abs=1e-6)
        assert interval["low"] <= interval["mean_difference"] <= interval["high"]
    assert results["data"]["synthetic"] and "SYNTHETIC" in results["data"]["summary"]
    assert results["recipe"]["seed"] == 7
    assert {name.rpartition("-")[0] for name in results["seconds"]} == {
        "teacher", "sft", "control", "gflownet", "calibration", *(f"test-{method}" for method in METHODS)
    }  # fmt: skip
    assert {"torch", "transformers", "trl", "python"} <= results["versions"].keys()
    report = Path(recipe.output_dir, "report.md").read_text()
    assert "SYNTHETIC" in report and "item Recall@5, seen removed | item NDCG@5, seen removed" in report
    for name in ("accuracy_vs_coverage", "metrics", "recall_by_popularity", "training", "calibration"):
        assert Path(recipe.output_dir, f"{name}.png").stat().st_size > 5000, name
    assert [line.split("|")[1].strip() for line in table(results).splitlines()[2:]] == [
        "Teacher", "SFT", "SFT continued (control)", "GFlowNet"
    ]  # fmt: skip


def test_recall_by_popularity_is_that_of_the_targets_groups(finished):
    recipe, results = finished
    run_data = prepare(recipe)
    groups = popularity_groups(run_data.item_counts)
    targets = run_data.test["target"]
    for entry in results["methods"].values():
        recall = load_file(Path(entry["folder"], "per_user.safetensors"))["item_recall@5"]
        found = {}
        for target, value in zip(targets, recall.tolist(), strict=True):
            found.setdefault(int(groups[run_data.interactions.items.index(target)]), []).append(value)
        expected = [sum(found[g]) / len(found[g]) if g in found else None for g in range(int(groups.max()) + 1)]
        assert entry["recall_by_popularity"] == pytest.approx(expected)


def test_the_second_column_ranks_without_what_the_user_has_had(finished):
    """Brute force for all methods: the policies' exact distribution, the teacher's scores."""
    recipe, results = finished
    run_data = prepare(recipe)
    catalog, rows = run_data.catalog, run_data.test
    assert earlier_items(run_data.interactions, rows) == list(rows["history"])
    short = leave_one_out(run_data.interactions, 2).test
    assert earlier_items(run_data.interactions, short) == list(rows["history"]) != list(short["history"])
    for method in METHODS:
        entry = results["methods"][method]
        users = load_file(Path(entry["folder"], "per_user.safetensors"))
        for number, row in enumerate(rows):
            left = [i for i in catalog.items if i not in row["history"] or i == row["target"]]
            leaves = users["unseen_leaves"][number].tolist()
            members = [[i for i in left if leaf >= 0 and i in catalog.items_of(leaf)] for leaf in leaves]
            assert all(members) and len(set(leaves)) == len(leaves)
            target = int(catalog.leaf_of([row["target"]]))
            rank = leaves.index(target) if target in leaves else 99
            assert users["unseen_recall@5"][number] == (rank < 5)
            before, size = sum(map(len, members[:rank])), len([i for i in left if catalog.leaf_of([i]) == target])
            inside = min(size, max(0, 5 - before)) if rank < 99 and method != "teacher" else size * (rank < 5)
            assert users["unseen_item_recall@5"][number] == pytest.approx(inside / size)
        for name in ("recall@3", "item_ndcg@5", "mrr@5"):
            assert entry["metrics"][f"unseen_{name}"] == pytest.approx(float(users[f"unseen_{name}"].mean()))
    sft = results["methods"]["sft"]
    policy, found = (
        Recommender.from_pretrained(sft["model"]).policy,
        load_file(Path(sft["folder"], "per_user.safetensors")),
    )
    seen = catalog.seen_items(rows["history"], rows["target"])
    for column, excluded in (("leaves", None), ("unseen_leaves", seen.leaves)):
        searched = policy.beam_search(run_data.encoder(rows["history"]), 5, excluded=excluded)[0]
        assert (searched == found[column]).float().mean() > 0.99  # another batch may swap leaves that are as probable


def test_control_and_gflownet_take_equal_steps_on_equal_rows(finished):
    control, flow = (finished[1]["methods"][name] for name in ("control", "gflownet"))
    assert control["steps"] == flow["steps"] > 0
    assert control["rows_per_step"] == flow["rows_per_step"] == 32


def test_a_finished_run_is_skipped_and_gives_the_same(finished):
    recipe, results = finished
    again = run(recipe, callbacks=[Forbidden()], quiet=True)
    assert again["methods"] == results["methods"] and again["calibration"] == results["calibration"]


def test_a_variant_shares_what_it_has_in_common(finished):
    recipe, results = finished
    before = {path.name for path in Path(recipe.output_dir).iterdir()}
    changed = run(micro_recipe(recipe.output_dir, name="variant", rewards=recipe.rewards[:1]), quiet=True)
    new = {path.name.split("-")[0] for path in Path(recipe.output_dir).iterdir() if path.name not in before}
    assert new == {"gflownet", "test", "calibration", "report"}
    assert changed["methods"]["control"] == results["methods"]["control"]
    assert changed["methods"]["gflownet"]["metrics"] != results["methods"]["gflownet"]["metrics"]


def test_trained_models_are_recommenders(finished):
    recipe, results = finished
    recommender = Recommender.from_pretrained(results["methods"]["gflownet"]["model"])
    history = prepare(recipe).splits.test["history"][0]
    assert len(recommender.recommend([history], k=5)[0]) == 5


def test_model_cards_say_what_was_measured(finished):
    """Front matter that huggingface_hub reads, with the test's metrics as in results.json, and the validation's."""
    recipe, results = finished
    for method in METHODS[1:]:
        entry = results["methods"][method]
        card = ModelCard.load(Path(entry["model"], "README.md"))
        measured = {(found.dataset_split, found.metric_name): found.metric_value for found in card.data.eval_results}
        shown = {name for name in entry["metrics"] if name.split("@")[0] in ("recall", "ndcg", "coverage")}
        assert {name for split, name in measured if split == "test"} == shown
        log = json.loads((Path(entry["model"]).parent / "done.json").read_text())["log"]
        best = next(one for one in log if one["step"] == entry["best_step"] and "eval_ndcg@5" in one)
        for name in shown:
            assert measured["test", name] == entry["metrics"][name]
            assert measured["validation", name] == best[f"eval_{name}"]
            assert f"| {name} | {best[f'eval_{name}']:.4f} | {entry['metrics'][name]:.4f} |" in card.text
        assert card.data.model_name == f"micro-{method}" and card.data.library_name == "gflowtrl"
        assert card.data.base_model is None and "Training started from" not in card.text
        assert "synthetic_shop (SYNTHETIC" in card.text and "| users | 40 |" in card.text
        assert f"validation at step {entry['best_step']} | test, 40 users" in card.text
        assert ("gflownet" in card.data.tags) == ("arXiv 2506.16114" in card.text) == (method == "gflownet")
        loaded = AutoModelForCausalLM.from_pretrained(entry["model"])  # as the card says
        assert "AutoModelForCausalLM.from_pretrained" in card.text and type(loaded).__name__ in card.text
    assert not list(Path(recipe.output_dir).glob("*/model/.*"))  # nothing half written


def test_each_training_stage_moves_every_parameter(finished):
    sft, control, flow = (weights(finished[1]["methods"][name]["model"]) for name in METHODS[1:])
    for a, b in ((sft, control), (sft, flow), (control, flow)):
        assert not any(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("stage", ["sft", "gflownet"])
def test_an_interrupted_run_ends_like_an_undisturbed_one(finished, tmp_path, stage):
    recipe, results = finished
    steps = results["methods"][stage]["steps"]
    again = micro_recipe(tmp_path, stages=[stage])
    with pytest.raises(KeyboardInterrupt):
        run(again, callbacks=[Interrupt(stage, step=steps // 2 + 2)], quiet=True)
    (folder,) = tmp_path.glob(f"{stage}-*")
    assert last_checkpoint(folder / "checkpoints").endswith(f"checkpoint-{steps // 2}")
    resumed = run(again, quiet=True)
    assert resumed["methods"][stage]["metrics"] == results["methods"][stage]["metrics"]
    first, second = (weights(value["methods"][stage]["model"]) for value in (results, resumed))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not (folder / "checkpoints").exists()


def test_a_run_interrupted_after_its_training_does_not_train_again(finished, tmp_path, monkeypatch, capsys):
    """Checkpoints are given up when the stage is done, not before."""
    _, results = finished
    again = micro_recipe(tmp_path, stages=["sft"])
    with monkeypatch.context() as patched:
        patched.setattr("gflowtrl.pipeline.training.write_card", Mock(side_effect=KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            run(again, quiet=True)
    resumed = run(again, quiet=True)["methods"]["sft"]
    assert f"Continuing from {tmp_path}" in capsys.readouterr().out
    assert resumed["metrics"] == results["methods"]["sft"]["metrics"]
    (folder,) = tmp_path.glob("sft-*")
    assert last_checkpoint(folder / "checkpoints") is None


def test_the_control_takes_the_steps_of_the_gflownet(tmp_path):
    section = micro_settings(tmp_path)["gflownet"] | {"dataloader_drop_last": True, "num_train_epochs": 1}
    sft = micro_settings(tmp_path)["sft"] | {"num_train_epochs": 1}
    methods = run(micro_recipe(tmp_path, gflownet=section, sft=sft), quiet=True)["methods"]
    assert methods["control"]["steps"] == methods["gflownet"]["steps"]


def test_the_order_of_sft_follows_its_options(tmp_path):
    def order(name, **options):
        sft = micro_settings(tmp_path)["sft"] | options
        trainer = _sft_trainer(prepare(micro_recipe(tmp_path / name, stages=["sft"], sft=sft)), tmp_path / name, ())
        return list(trainer._get_train_sampler())

    default = order("a")
    assert default == order("b", data_seed=7) != order("c", data_seed=8)  # 7 is the recipe's seed
    assert order("d", train_sampling_strategy="sequential") == sorted(default) != default


def test_new_titles_reach_models_that_are_done(tmp_path):
    shop = SyntheticShop(**micro_settings(tmp_path)["data"]["shop"]).generate()[0]
    write_folder(shop, tmp_path / "data")
    recipe = micro_recipe(tmp_path / "out", stages=["sft"], data_dir=str(tmp_path / "data"), data={})
    model = run(recipe, quiet=True)["methods"]["sft"]["model"]
    item = shop.items[3]
    shop.item_features[item] |= {"title": "Lamp"}
    write_folder(shop, tmp_path / "data")
    assert run(recipe, quiet=True)["methods"]["sft"]["model"] == model
    assert Recommender.from_pretrained(model).titles[item] == "Lamp"


def test_another_model_in_the_same_folder_is_another_model(tmp_path):
    for name, seed in (("a", 0), ("b", 1)):
        tiny_model(30, seed=seed).save_pretrained(tmp_path / name)
    first, second = (files_fingerprint(tmp_path / name) for name in "ab")
    assert first == files_fingerprint(str(tmp_path / "a")) != second
    assert files_fingerprint("name/on-the-hub") is None


def test_a_damaged_stage_is_done_again_on_request_and_gives_the_same(finished, tmp_path, capsys):
    recipe, results = finished
    shutil.copytree(recipe.output_dir, tmp_path / "out")
    file = tmp_path / "micro.yaml"
    file.write_text(yaml.safe_dump(micro_settings(tmp_path / "out")))
    (model,) = (tmp_path / "out").glob("sft-*/model/model.safetensors")
    model.write_bytes(model.read_bytes()[:1000])
    assert main(["--config", str(file)]) == 2
    told = capsys.readouterr().err
    assert f"The stage sft is finished, but {model} is not a whole safetensors file" in told
    assert "--redo sft" in told
    assert main(["--config", str(file), "--redo", "stf"]) == 2
    assert "There is no stage 'stf'. Did you mean 'sft'?" in capsys.readouterr().err
    assert main(["--config", str(file), "--redo", "sft", "test-sft"]) == 0
    printed = capsys.readouterr().out
    assert "[sft] finished" in printed and "[test-sft] finished" in printed and "[control] finished" not in printed
    again = json.loads((tmp_path / "out" / "results.json").read_text())["methods"]
    assert again["sft"]["metrics"] == results["methods"]["sft"]["metrics"]
    first, second = (weights(found["sft"]["model"]) for found in (results["methods"], again))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_torn_checkpoint_is_passed_over(tmp_path):
    for step, content in ((2, "{}"), (4, '{"global_step": 4}'), (10, '{"global_step": 1')):
        (tmp_path / f"checkpoint-{step}").mkdir()
        (tmp_path / f"checkpoint-{step}" / "trainer_state.json").write_text(content)
    (tmp_path / "checkpoint-12").mkdir()
    assert last_checkpoint(tmp_path).endswith("checkpoint-4")
    assert last_checkpoint(tmp_path / "absent") is None


def test_bad_input_is_one_line_and_exit_code_2(tmp_path, capsys):
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump(micro_settings(tmp_path / "out")))
    assert main(["--config", str(file), "--data_dir", str(tmp_path / "absent")]) == 2
    assert main(["--config", str(file), "--sft.learning_rat", "1"]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2
    assert "absent" in lines[0] and "Did you mean 'sft.learning_rate'" in lines[1]
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "changes",
    [
        {"stages": ["teacher"], "gflownet": {"learning_rate": -1.0, "num_train_epochs": "many"}},
        {"stages": ["sft"], "sft": {"max_steps": 2, "num_train_epochs": 0}},
        {"start": "untrained", "stages": ["control"], "gflownet": {"max_steps": 2, "num_train_epochs": -1}},
    ],
)
def test_a_plan_reads_the_stages_that_run_and_costs_something(changes, tmp_path):
    plan = _plan(micro_recipe(tmp_path, **changes))
    assert plan and all(cost > 0 for cost in plan.values())


def test_ctrl_c_says_how_to_continue(tmp_path, monkeypatch, capsys):
    def interrupted(recipe, redo):
        raise KeyboardInterrupt

    monkeypatch.setattr("gflowtrl.pipeline.run", interrupted)
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump(micro_settings(tmp_path / "out")))
    assert main(["--config", str(file)]) == 130
    assert "run the same command again to continue" in capsys.readouterr().err


def test_a_sample_of_the_users_is_measured(finished, tmp_path):
    """The same users in validation, test and every run; the teacher is fitted as ever."""
    recipe, whole = finished
    settings = micro_settings(tmp_path)
    part = run(micro_recipe(tmp_path, evaluation=settings["evaluation"] | {"users": 11}, seed=8), quiet=True)
    run_data = prepare(micro_recipe(tmp_path, evaluation=settings["evaluation"] | {"users": 11}))
    assert len(set(run_data.test["user"])) == 11 and run_data.test["user"] == run_data.validation["user"]
    assert part["data"]["test_users"] == 11
    every = load_file(Path(whole["methods"]["teacher"]["folder"], "per_user.safetensors"))
    for method in METHODS:
        own = load_file(Path(part["methods"][method]["folder"], "per_user.safetensors"))
        assert own["row_id"].tolist() == run_data.test["row_id"]
        if method == "teacher":
            places = [every["row_id"].tolist().index(row) for row in own["row_id"].tolist()]
            assert torch.equal(own["leaves"], every["leaves"][places])
    with pytest.raises(ValueError, match="it must be a whole number of at least 1"):
        micro_recipe(tmp_path, evaluation={"users": 0})
