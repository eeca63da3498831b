"""The reward of a run for a new history, against the formula and against the pipeline's own reward."""

import inspect
import json

import pytest
import torch

from gflowtrl import GFlowNetConfig, Recommender
from gflowtrl.data import Step
from gflowtrl.demo.run_reward import DONE_FILE, INPUTS_FILE, OPTIONS, copy_reward, read_run_reward
from gflowtrl.pipeline import run, stage
from gflowtrl.pipeline.run_data import prepare
from gflowtrl.rewards import CollaborativeReward, CompositeReward
from tests.demo.world import COUNTS, HISTORY, ITEMS, REWARDS, WEIGHTS, make_recommender, write_stage
from tests.pipeline.micro import micro_recipe


@pytest.fixture(scope="module")
def recommender():
    return make_recommender()


def all_leaves(recommender, reward, history=HISTORY) -> torch.Tensor:
    return reward.of(history)(recommender.catalog.tree.leaf_nodes())


def test_the_target_is_the_formula_of_the_parts_that_do_not_need_the_training(recommender, tmp_path):
    reward = read_run_reward(write_stage(tmp_path), recommender)
    assert reward.names == ["collaborative", "uniform"] and reward.left_out == [
        "ground_truth (it needs the logged target)"
    ]
    scores = recommender.teacher.score([HISTORY])[0] - 0.25 * torch.log1p(COUNTS.float())
    values = 0.7 * torch.softmax(scores / 0.5, 0) + 0.1 / len(ITEMS)
    leaves = torch.zeros(recommender.catalog.tree.num_leaves).index_add(0, recommender.catalog.item_leaf, values)
    log_rewards = 0.5 * torch.maximum(leaves, 1e-2 * leaves.mean()).log()
    assert torch.allclose(all_leaves(recommender, reward), log_rewards.log_softmax(0), atol=1e-5)


def test_the_target_without_retired_items(recommender, tmp_path):
    before, gone = read_run_reward(write_stage(tmp_path), recommender), [ITEMS[0], "i222"]
    smaller = recommender.retire_items(gone)  # HISTORY contains one of them
    after = read_run_reward(tmp_path / "model", smaller)
    assert after.left_out == before.left_out
    scores = recommender.teacher.score([HISTORY])[0] - 0.25 * torch.log1p(COUNTS.float())
    kept = [row for row, item in enumerate(ITEMS) if item not in gone]
    values = 0.7 * torch.softmax(scores[kept] / 0.5, 0) + 0.1 / len(kept)
    leaves = torch.zeros(smaller.catalog.tree.num_leaves).index_add(0, smaller.catalog.item_leaf, values)
    log_rewards = 0.5 * torch.maximum(leaves, 1e-2 * leaves.mean()).log()
    assert torch.allclose(all_leaves(smaller, after), log_rewards.log_softmax(0), atol=1e-5)


def test_the_target_of_a_real_run_is_that_of_its_stage(tmp_path):
    rewards = [{"type": "ground_truth", "weight": 0.0}, {"type": "collaborative", "weight": 0.7, "temperature": 0.2}]
    options = {"loss_type": ["exact_flow"], "max_steps": 1, "per_device_train_batch_size": 8}
    recipe = micro_recipe(
        tmp_path,
        stages=["gflownet"],
        start="untrained",
        rewards=rewards,
        sampler=None,
        gflownet=options,
        evaluation={"num_beams": 5, "ks": [3], "users": 4, "calibration_rows": 0, "bootstrap_samples": 10},
    )
    run(recipe, quiet=True)
    (folder,) = tmp_path.glob("gflownet-*/model")
    recommender = Recommender.from_pretrained(folder)
    reward = read_run_reward(folder, recommender)
    data = prepare(recipe)
    history = data.test[0]["history"]
    own = CompositeReward(
        CollaborativeReward(recommender.teacher, temperature=0.2), recommender.catalog, weights=[0.7]
    )
    step = Step.of({}, torch.zeros(1, dtype=torch.long), {"history": [history[-6:]]}, recommender.catalog)
    expected = own.dense(step).result.log_rewards[0].log_softmax(0)
    assert reward.left_out == [] and torch.allclose(all_leaves(recommender, reward, history), expected, atol=1e-5)


def test_names_of_files_and_defaults_are_those_of_the_pipeline():
    assert stage.DONE_FILE == DONE_FILE and f'"{INPUTS_FILE}"' in inspect.getsource(stage.Stage.run)
    parameters = inspect.signature(CompositeReward).parameters
    for name, (argument, _) in OPTIONS.items():
        assert GFlowNetConfig.__dataclass_fields__[name].default == parameters[argument].default


@pytest.mark.parametrize(
    ("spec", "reason"),
    [
        ({"function": "own.py:reward"}, "a function of the recipe (its code is not in the model's folder)"),
        ({"type": "token_similarity"}, "token_similarity (it needs the logged target)"),
        (
            {"type": "collaborative", "teacher": {"type": "ease"}},
            "collaborative (its own teacher is not in the model's",
        ),
        ({"type": "collaborative", "popularity": "impressions"}, "collaborative (it needs impressions, which only"),
        ({"type": "likelihood"}, "likelihood (it needs sft_model, which only the training has)"),
        ({"type": "likelihood", "of": "policy"}, "likelihood (it needs policy, which only the training has)"),
        ({"type": "title_likelihood", "model": "/x"}, "title_likelihood (it needs language_model, titles, which only"),
    ],
)
def test_what_cannot_be_computed_is_left_out_with_the_reason(recommender, tmp_path, spec, reason):
    folder = write_stage(tmp_path / "run", [{"type": "uniform"}, spec], [1.0, 1.0])
    reward = read_run_reward(folder, recommender)
    assert reward.names == ["uniform"] and len(reward.left_out) == 1 and reward.left_out[0].startswith(reason)
    (tmp_path / "copy").mkdir()
    copy_reward(folder, recommender, tmp_path / "copy")
    copied = read_run_reward(tmp_path / "copy" / "model", recommender)
    assert (copied.names, copied.left_out) == (reward.names, reward.left_out)


def test_parts_of_the_recommender_that_are_missing_are_reasons(tmp_path):
    folder = write_stage(tmp_path)
    assert "the model's folder has no teacher" in read_run_reward(folder, make_recommender(teacher=None)).left_out[1]
    assert "has no item counts" in read_run_reward(folder, make_recommender(item_counts=None)).left_out[1]


@pytest.mark.parametrize(
    "options", [{"ref_weight": 0.5}, {"rewards": REWARDS[:1], "weights": [1.0]}, {"weights": [1.0, 0.0, 0.0]}]
)
def test_no_target_is_shown_if_it_is_not_the_reward(recommender, tmp_path, options):
    assert read_run_reward(write_stage(tmp_path, **options), recommender) is None


def test_a_recommender_alone_or_of_another_stage_has_no_target(recommender, tmp_path):
    assert read_run_reward(tmp_path / "model", recommender) is None
    (tmp_path / "inputs.json").write_text('{"sft": {}}')
    (tmp_path / "done.json").write_text("{}")
    assert read_run_reward(tmp_path / "model", recommender) is None


def test_items_of_the_history_are_excluded_as_in_the_stage(recommender, tmp_path):
    nodes = recommender.catalog.tree.leaf_nodes()[recommender.catalog.leaf_of(HISTORY[:2])]
    shares = {}
    for setting in ("yes", "no", "auto"):
        reward = read_run_reward(write_stage(tmp_path / setting, exclude_history=setting), recommender)
        shares[setting] = float(reward.of(HISTORY)(nodes).exp().sum())
        assert ("exclude_history (auto depends on the training data" in " ".join(reward.left_out)) == (
            setting == "auto"
        )
    assert shares["yes"] < 0.5 * shares["no"] and shares["auto"] == shares["no"]


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("inputs.json", "{"),
        ("inputs.json", '{"gflownet": [], "rewards": []}'),
        ("inputs.json", '{"gflownet": {}, "rewards": [{"type": "nothing"}, {}, {}]}'),
        ("inputs.json", '{"gflownet": {"reward_beta": "much"}, "rewards": [{"type": "uniform"}, {}, {}]}'),
        ("done.json", '{"reward_weights": [1.0]}'),
        ("done.json", '{"reward_weights": ["much", 1, 1]}'),
    ],
)
def test_a_damaged_file_of_the_stage_is_named(recommender, tmp_path, file, content):
    folder = write_stage(tmp_path)
    (tmp_path / file).write_text(content)
    with pytest.raises(ValueError, match=r"inputs\.json|done\.json"):
        read_run_reward(folder, recommender)


def test_a_copy_has_the_reward_and_no_other_options(recommender, tmp_path):
    folder = write_stage(tmp_path / "run", exclude_history="yes")
    (tmp_path / "copy").mkdir()
    copy_reward(folder, recommender, tmp_path / "copy")
    inputs = json.loads((tmp_path / "copy" / INPUTS_FILE).read_text())
    assert inputs.keys() == {"gflownet", "rewards"}
    assert inputs["gflownet"] == {"reward_beta": 0.5, "reward_floor": "1e-2", "exclude_history": "yes"}
    assert json.loads((tmp_path / "copy" / DONE_FILE).read_text()) == {"reward_weights": WEIGHTS}
    first, second = (read_run_reward(one, recommender) for one in (folder, tmp_path / "copy" / "model"))
    assert torch.equal(all_leaves(recommender, first), all_leaves(recommender, second))
