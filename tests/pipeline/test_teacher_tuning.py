"""Teachers of recipes that need texts or validation rows, and the tuning of their distributions."""

import json
from types import SimpleNamespace

import pytest
import torch
import yaml

from gflowtrl.cli import main
from gflowtrl.data import Step, SyntheticShop, write_folder
from gflowtrl.metrics import item_ranking_metrics, mean_and_error
from gflowtrl.pipeline import Recipe
from gflowtrl.pipeline.build import check_needs, fit_teacher
from gflowtrl.pipeline.run_data import RunData, prepare
from gflowtrl.pipeline.stage import RunContext
from gflowtrl.pipeline.teacher_tuning import CORRECTIONS, TEMPERATURES, Setting, choose, tune_teacher
from gflowtrl.rewards import CollaborativeReward
from gflowtrl.teachers import ItemText, SASRec, Transitions

from .micro import micro_recipe, micro_settings


@pytest.fixture
def mixture(tmp_path):
    parts = [
        {"type": "transitions", "smoothing": 3.0, "weight": "learned"},
        {"type": "item_knn", "neighbors": 10, "weight": "learned"},
        {"type": "text", "weight": "learned"},
    ]
    recipe = micro_recipe(tmp_path, teacher={"type": "mixture", "parts": parts})
    data, context = prepare(recipe), RunContext(tmp_path, quiet=True)
    return SimpleNamespace(
        recipe=recipe, data=data, context=context, teacher=fit_teacher(context, data, recipe.teacher)
    )


def test_a_mixture_of_a_recipe_learns_its_weights_from_validation(mixture, tmp_path):
    teacher, rows = mixture.teacher, mixture.data.splits.validation
    assert len(list(tmp_path.glob("teacher-*"))) == 3
    assert [type(part).__name__ for part in teacher.parts] == ["Transitions", "ItemKNN", "ItemText"]
    histories = [history[-6:] for history in rows["history"]]
    targets = torch.tensor([teacher.items.index(item) for item in rows["target"]])[:, None]
    probs = torch.cat([part.score(histories).softmax(1).gather(1, targets) for part in teacher.parts], 1).double()
    weights = torch.tensor(teacher.weights, dtype=torch.double)
    gain = (probs / (probs @ weights)[:, None]).mean(0)  # 1 for the parts in use, less for others, at the maximum
    assert (gain <= 1 + 1e-3).all() and torch.allclose(gain[weights > 1e-3], torch.ones(1).double(), atol=1e-3)
    again = fit_teacher(mixture.context, mixture.data, mixture.recipe.teacher)
    assert again.weights == teacher.weights


def test_a_teacher_of_texts_depends_on_them_and_needs_some(tmp_path):
    recipe = micro_recipe(tmp_path, teacher={"type": "text"})
    data = prepare(recipe)
    check_needs(data)
    teacher = fit_teacher(RunContext(tmp_path, quiet=True), data, recipe.teacher)
    assert isinstance(teacher, ItemText) and len(teacher.vectors.unique(dim=0)) > 3
    first = data.interactions.items[0]
    data.interactions.item_features[first]["title"] += " and another word"
    fit_teacher(RunContext(tmp_path, quiet=True), data, recipe.teacher)
    assert len(list(tmp_path.glob("teacher-*"))) == 2
    data.interactions.item_features.clear()
    with pytest.raises(ValueError, match=r"teacher reads the texts of items, but no item"):
        check_needs(data)


def test_a_recipe_may_set_what_sasrec_reads(tmp_path):
    spec = {"type": "sasrec", "epochs": 1, "width": 8}
    recipe = micro_recipe(tmp_path, teacher={**spec, "max_history_items": 9})
    data, context = prepare(recipe), RunContext(tmp_path, quiet=True)
    own, default = fit_teacher(context, data, recipe.teacher), fit_teacher(context, data, spec)
    assert isinstance(own, SASRec) and isinstance(default, SASRec)
    assert (own.max_history_items, own.full_history) == (9, True)
    assert (default.max_history_items, default.full_history) == (6, False)


@pytest.mark.parametrize("exclude", [False, True])
def test_the_table_is_that_of_the_reward(mixture, exclude):
    """Likelihood and ranking of one cell, from the probabilities of `CollaborativeReward`."""
    data, teacher, counts = mixture.data, mixture.teacher, mixture.data.splits.item_counts
    found = tune_teacher(data, teacher, counts, exclude)
    assert len(found.settings) == len(CORRECTIONS) * len(TEMPERATURES) and found.k == 5
    for cell in found.settings[:: len(TEMPERATURES) + 3]:
        reward = CollaborativeReward(teacher, cell.temperature, cell.popularity_correction, counts)
        reward.bind(data.catalog)
        rows = data.validation
        histories = [history[-6:] for history in rows["history"]]
        nothing = torch.full((len(rows),), -1)
        step = Step({}, torch.arange(len(rows)), nothing, {"history": histories})
        probs = reward.score_items(step)
        if exclude:
            for row, history in enumerate(rows["history"]):
                probs[row, data.catalog.index_of(history)] = 0
            probs = probs / probs.sum(1, keepdim=True)
        targets = data.catalog.index_of(rows["target"])
        logs = probs.gather(1, targets[:, None]).log()
        assert cell.log_likelihood == pytest.approx(float(logs[logs.isfinite()].mean()), abs=1e-3)
        top = probs.topk(5).indices
        metrics = item_ranking_metrics(top, targets, [5])
        assert (cell.ndcg, cell.ndcg_error) == pytest.approx(mean_and_error(metrics["ndcg@5"]))
        assert cell.recall == pytest.approx(float(metrics["recall@5"].mean()))
        assert cell.coverage == pytest.approx(len(top.unique()) / len(data.catalog.items))


def test_the_choice_is_the_broadest_of_equally_good_rankings():
    def cell(temperature, correction, likelihood, ndcg):
        return Setting(temperature, correction, likelihood, ndcg, 0.01, 0.0, 0.0)

    cells = [cell(1.0, 0.0, -3.0, 0.100), cell(0.5, 0.2, -5.0, 0.095), cell(1.0, 0.2, -4.0, 0.095)]
    worse = [cell(1.0, 0.5, -1.0, 0.089)]
    assert choose(cells + worse) == cells[2]
    assert choose(cells[:1]) == cells[0]


# --------------------------------------------------------------------------------------------------------- the command
@pytest.fixture
def folder(tmp_path, monkeypatch):
    shop = SyntheticShop(n_users=40, n_items=30, departments=3, shelves=3, interests=3, min_users_shown=15)
    write_folder(shop.generate()[0], tmp_path / "data")
    settings = micro_settings(tmp_path / "out", data={"max_history_items": 6}, teacher={"type": "transitions"})
    (tmp_path / "micro.yaml").write_text(yaml.safe_dump(settings))
    refuse = property(lambda _: pytest.fail("the test split is read"))
    monkeypatch.setattr(RunData, "test", refuse)
    return tmp_path


def test_the_command_prints_a_section_for_the_recipe_and_reuses_the_teacher(folder, capsys, monkeypatch):
    words = ["teacher", "--tune", "--config", str(folder / "micro.yaml"), "--data_dir", str(folder / "data")]
    assert main(words) == 0
    printed = capsys.readouterr().out
    assert "Items of the history are kept" in printed and "| correction |" in printed
    section = yaml.safe_load(printed.partition("For the recipe:\n\n")[2])
    monkeypatch.setattr(Transitions, "fit", lambda *_, **__: pytest.fail("the teacher is fitted again"))
    assert main([*words, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["rewards"] == section["rewards"]
    best = found["best"]
    assert section["rewards"] == [
        {"type": "ground_truth", "weight": 0.3},
        {
            "type": "collaborative", "weight": 0.7, "temperature": best["temperature"],
            "popularity_correction": best["popularity_correction"],
        },
    ]  # fmt: skip
    Recipe(**micro_settings(folder / "out", rewards=section["rewards"]))
    for flags, excluded in (
        (["--exclude_history"], True),
        (["--gflownet.exclude_history", "yes"], True),
        (["--gflownet.exclude_history", "yes", "--keep_history"], False),
    ):
        assert main([*words, *flags, "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["exclude_history"] is excluded


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--num_processes", "2"], "does not take --num_processes; leave it out"),
        (["--exclude_history", "--keep_history"], "not allowed with argument --exclude_history"),
        (["--teacher.windw", "3"], "Did you mean 'teacher.window'"),
    ],
)
def test_bad_options_of_the_command(folder, capsys, words, message):
    assert main(["teacher", "--tune", "--config", str(folder / "micro.yaml"), *words]) == 2
    assert message in capsys.readouterr().err
