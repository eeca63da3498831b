"""Teachers and rewards of a recipe."""

import re
from contextlib import nullcontext

import pytest
import torch

from gflowtrl.data import GroupCollator, Step
from gflowtrl.pipeline import run
from gflowtrl.pipeline.build import (
    build_rewards,
    check_needs,
    final_weights,
    fit_teacher,
    load_function,
    reward_key,
)
from gflowtrl.pipeline.models import build_model
from gflowtrl.pipeline.run_data import prepare
from gflowtrl.pipeline.stage import RunContext
from gflowtrl.rewards import (
    CompositeReward,
    InteractionReward,
    LikelihoodReward,
    TitleLikelihoodReward,
    TokenSimilarityReward,
)
from gflowtrl.teachers import Popularity, without_fold
from tests.rewards.world import text_tokenizer
from tests.tiny import tiny_model

from .micro import micro_recipe


CODE = (
    "def cheap(items, item_features, **columns):\n    return [-item_features[group[0]]['price'] for group in items]\n"
)


def step_of(run_data, rows):
    return Step.from_batch(GroupCollator(run_data.encoder)(rows.to_list()), run_data.catalog)


def test_a_mixture_fits_each_part_once(tmp_path):
    parts = [{"type": "ease", "regularization": 5.0, "weight": 3}, {"type": "popularity"}]
    mixture = {"type": "mixture", "parts": parts}
    recipe = micro_recipe(tmp_path, teacher=mixture)
    run_data, context = prepare(recipe), RunContext(tmp_path, quiet=True)
    teacher = fit_teacher(context, run_data, recipe.teacher)
    ease = fit_teacher(context, run_data, {"type": "ease", "regularization": 5.0})
    popularity = fit_teacher(context, run_data, {"type": "popularity"})
    assert len(list(tmp_path.glob("teacher-*"))) == 2
    histories = run_data.splits.test["history"][:4]
    expected = 0.75 * ease.score(histories).softmax(1) + 0.25 * popularity.score(histories).softmax(1)
    torch.testing.assert_close(teacher.score(histories).softmax(1), expected)


def test_each_fold_is_fitted_once_without_its_users(tmp_path):
    spec = {"type": "popularity", "folds": 3}
    recipe = micro_recipe(tmp_path, teacher={"type": "mixture", "parts": [spec, {"type": "ease"}]})
    run_data, context = prepare(recipe), RunContext(tmp_path, quiet=True)
    teacher = fit_teacher(context, run_data, spec)
    assert len(list(tmp_path.glob("teacher-*"))) == 3
    again = fit_teacher(RunContext(tmp_path, quiet=True), run_data, recipe.teacher)  # reads the three folds
    assert len(list(tmp_path.glob("teacher-*"))) == 4
    sequences, users = run_data.splits.train_sequences, run_data.interactions.users
    for fold, (part, other) in enumerate(zip(teacher.parts, again.parts[0].parts, strict=True)):
        expected = Popularity.fit(without_fold(sequences, users, fold, 3), run_data.interactions.items)
        assert torch.equal(part.counts, expected.counts) and torch.equal(other.counts, expected.counts)


def test_reward_functions_get_item_features_and_their_code_is_part_of_the_key(tmp_path):
    file = tmp_path / "my_rewards.py"
    file.write_text(CODE)
    rewards = [{"function": "my_rewards.py:cheap", "weight": 0.5}]
    recipe = micro_recipe(tmp_path, rewards=rewards, folder=str(tmp_path), gflownet={"reward_transform": "exp"})
    run_data = prepare(recipe)
    (reward,) = build_rewards(RunContext(tmp_path, quiet=True), run_data, None, tmp_path)
    item = run_data.interactions.items[0]
    assert reward(items=[[item]], prompts=[""]) == [-run_data.interactions.item_features[item]["price"]]
    before = reward_key(run_data)
    run_data.interactions.item_features[item] |= {"price": 0.0}
    dearer = reward_key(run_data)
    file.write_text(CODE + "# changed\n")
    assert len({str(key) for key in (before, dearer, reward_key(run_data))}) == 3


CLASS = """
import torch
from gflowtrl.rewards import Reward

class Cheap(Reward):
    provided = {"item_features"}
    reads_target = False

    def __init__(self, item_features, power=1.0):
        super().__init__("cheap")
        self.item_features, self.power = item_features, power

    def score_items(self, step):
        value = torch.tensor([self.item_features[item]["price"] ** -self.power for item in self.catalog.items])
        return value.expand(len(step), -1)

    @classmethod
    def check_spec(cls, spec):
        if spec.get("power", 1.0) <= 0:
            raise ValueError(f"power is {spec['power']}; it must be above 0.")
"""


def test_a_class_of_the_users_is_a_reward_with_options(tmp_path):
    (tmp_path / "cheap.py").write_text(CLASS)
    spec = {"function": "cheap.py:Cheap", "power": 2.0, "weight": 0.5}
    run_data = prepare(micro_recipe(tmp_path, rewards=[spec], folder=str(tmp_path)))
    check_needs(run_data)  # it scores every item, as exact_flow needs it
    (reward,) = build_rewards(RunContext(tmp_path, quiet=True), run_data, None, None)
    prices = [run_data.interactions.item_features[item]["price"] for item in run_data.interactions.items]
    scores = reward.bind(run_data.catalog).score_items(step_of(run_data, run_data.splits.train.select(range(2))))
    torch.testing.assert_close(scores, torch.tensor(prices).pow(-2).expand(2, -1))
    for options, message in (({"power": 0}, "rewards.0.power is 0"), ({"powr": 1}, "Did you mean 'rewards.0.power'")):
        bad = prepare(micro_recipe(tmp_path, rewards=[spec | options], folder=str(tmp_path)))
        with pytest.raises(ValueError, match=re.escape(message)):
            check_needs(bad)
    plain = {"function": f"{tmp_path}/my.py:cheap", "power": 1.0}
    (tmp_path / "my.py").write_text(CODE)
    with pytest.raises(ValueError, match="no field 'rewards.0.power'"):
        check_needs(prepare(micro_recipe(tmp_path, rewards=[plain])))


CLASSES = """
from gflowtrl.rewards import Reward

class Api(Reward):
    def __init__(self, model="small"):
        super().__init__("api")

class Drawn(Reward):
    scores_all_items = False

    def __init__(self):
        super().__init__("drawn")

class Duck:
    def score_items(self, step):
        return None
"""


def test_what_a_class_of_the_users_says_decides_what_is_checked(tmp_path):
    """An option may be called model and not be a folder; drawn items and other classes are reported before a fit."""
    (tmp_path / "my.py").write_text(CLASSES)

    def checked(name, **options):
        rewards = [{"function": "my.py:" + name, **options}]
        run_data = prepare(micro_recipe(tmp_path, rewards=rewards, folder=str(tmp_path)))
        check_needs(run_data)
        return reward_key(run_data)

    assert "model_files" not in checked("Api", model="large")[0]
    with pytest.raises(ValueError, match="scores drawn items only, but the reward of every item is needed by"):
        checked("Drawn")
    with pytest.raises(ValueError, match=r"The class my\.py:Duck is not derived from gflowtrl\.rewards\.Reward"):
        checked("Duck")


REWARDS = [
    {"type": "interaction", "values": [0, 2, 5], "target": 7},
    {"type": "token_similarity", "normalize": True},
    {"type": "collaborative", "normalization": "min_max", "exponent": 4.0},
    {"type": "likelihood"},
    {"type": "likelihood", "of": "policy"},
    {"type": "title_likelihood", "model": "reader", "max_title_words": 4},
]


def test_rewards_named_in_a_recipe_are_those_of_the_library(tmp_path):
    """Options arrive, and the pipeline fills in what it knows: teacher, SFT model, titles, the reader next to the
    recipe."""
    tokenizer = text_tokenizer()
    reader = tiny_model(len(tokenizer))
    reader.save_pretrained(tmp_path / "reader")
    tokenizer.save_pretrained(tmp_path / "reader")
    run_data = prepare(micro_recipe(tmp_path, rewards=REWARDS, folder=str(tmp_path), gflownet={}))
    model = build_model(run_data).eval()
    model.save_pretrained(tmp_path / "sft")
    context = RunContext(tmp_path, quiet=True)
    teacher = fit_teacher(context, run_data, {"type": "ease", "regularization": 5.0})
    built = build_rewards(context, run_data, teacher, tmp_path / "sft")

    titles = {item: features["title"] for item, features in run_data.interactions.item_features.items()}
    expected = [
        InteractionReward((0, 2, 5), 7),
        TokenSimilarityReward(normalize=True),
        built[2],
        LikelihoodReward(model),
        LikelihoodReward(),
        TitleLikelihoodReward(reader, tokenizer, titles, max_title_words=4),
    ]
    rows = run_data.splits.train.select(range(4))
    step = step_of(run_data, rows)
    leaves, policy_log_probs = torch.arange(6).expand(4, -1).contiguous(), torch.randn(4, 6)
    for own, other in zip(built, expected, strict=True):
        one, two = (
            CompositeReward(reward, run_data.catalog, run_data.tokenizer, transform="exp")
            .of(step)
            .score(leaves, policy_log_probs)
            for reward in (own, other)
        )
        torch.testing.assert_close(one.rewards, two.rewards)
    scores = teacher.score(rows["history"])
    share = (scores - scores.amin(1, keepdim=True)) / (scores.amax(1, keepdim=True) - scores.amin(1, keepdim=True))
    torch.testing.assert_close(built[2].score_items(step), share**4)


def test_titles_and_their_reader_are_part_of_the_key(tmp_path):
    tiny_model(9).save_pretrained(tmp_path / "reader")
    recipe = micro_recipe(tmp_path, rewards=REWARDS[-1:], folder=str(tmp_path))
    run_data = prepare(recipe)
    keys = [reward_key(run_data)]
    run_data.interactions.item_features[run_data.interactions.items[0]]["title"] = "another title"
    keys.append(reward_key(run_data))
    tiny_model(10).save_pretrained(tmp_path / "reader")
    keys.append(reward_key(run_data))
    assert keys[0] != keys[1] != keys[2]


def test_what_rewards_need_of_the_data_is_named(tmp_path):
    for rewards, message in (
        (REWARDS[:1], "has no sessions (events.jsonl), which rewards.0 (interaction) reads"),
        (REWARDS[-1:], "has no title for 1 of 30 items (items.jsonl), for example 3"),
        (
            [{"type": "collaborative", "popularity": "impressions"}],
            "has no impressions (impressions.json or events.jsonl",
        ),
    ):
        run_data = prepare(micro_recipe(tmp_path, rewards=rewards))
        run_data.interactions.events = run_data.splits.impression_counts = None
        del run_data.interactions.item_features[3]
        with pytest.raises(ValueError, match=re.escape(message)):
            check_needs(run_data)


def test_a_missing_reward_function_is_named(tmp_path):
    (tmp_path / "r.py").write_text(CODE)
    with pytest.raises(ValueError, match="defines no function or class 'dear'"):
        load_function("r.py:dear", str(tmp_path))
    with pytest.raises(FileNotFoundError, match="absent.py:cheap"):
        load_function("absent.py:cheap", str(tmp_path))
    with pytest.raises(ValueError, match="must be given as"):
        load_function("cheap")


def test_a_missing_reward_function_is_found_before_any_training(tmp_path):
    (tmp_path / "r.py").write_text(CODE)
    for reference, error in (("r.py:cheap", None), ("r.py:dear", ValueError), ("absent.py:cheap", FileNotFoundError)):
        rewards = [{"function": f"{tmp_path}/{reference}"}]
        run_data = prepare(
            micro_recipe(tmp_path, rewards=rewards, stages=["sft", "gflownet"], gflownet={}, sampler="on_policy")
        )
        with pytest.raises(error) if error else nullcontext():
            check_needs(run_data)


def test_what_only_scores_drawn_items_is_refused_before_any_training(tmp_path):
    (tmp_path / "r.py").write_text(CODE)
    function, flow = {"function": f"{tmp_path}/r.py:cheap"}, {"loss_type": ["exact_flow"], "reward_transform": "exp"}
    for reward in (function, {"type": "rank_penalty"}, {"type": "likelihood", "of": "policy"}):
        rewards = [{"type": "ground_truth"}, reward]
        message = r"rewards\.1 \(.*\) scores drawn items only.* needed by loss_type exact_flow and the sampler reward"
        with pytest.raises(ValueError, match=message):
            check_needs(prepare(micro_recipe(tmp_path, rewards=rewards, gflownet=flow)))
        check_needs(prepare(micro_recipe(tmp_path, rewards=rewards, stages=["teacher", "sft"])))
    rewards = [{"type": "title_likelihood", "model": str(tmp_path / "absent"), "all_items": True}]
    with pytest.raises(OSError, match="absent"):
        check_needs(prepare(micro_recipe(tmp_path, rewards=rewards)))


def test_learned_weights_are_fitted_to_validation_targets_and_trained_with(tmp_path, capsys):
    """The share of a reward is what maximizes the likelihood, found here by trying a thousand of them."""
    popularity = {"type": "collaborative", "teacher": {"type": "popularity"}, "weight": "learned"}
    rewards = [{"type": "ground_truth", "weight": 0.25}, {"type": "collaborative", "weight": "learned"}, popularity]
    recipe = micro_recipe(tmp_path, rewards=rewards, stages=["teacher", "sft", "gflownet"])
    run_data, context = prepare(recipe), RunContext(tmp_path, quiet=True)
    teacher = fit_teacher(context, run_data, recipe.teacher)
    functions = build_rewards(context, run_data, teacher, tmp_path)
    weights = final_weights(context, run_data, functions)
    rows = run_data.splits.validation
    step = step_of(run_data, rows)
    both = CompositeReward(functions[1:], run_data.catalog, floor=0.0)
    result = both.of(step).score(step.target_leaves[:, None])
    parts = torch.stack(list(result.parts.values()), -1).double().squeeze(1)
    parts += 1e-3 / run_data.catalog.tree.num_leaves
    shares = torch.linspace(0, 1, 1001, dtype=torch.double)
    likelihood = (parts @ torch.stack([shares, 1 - shares])).log().mean(0)
    assert weights[0] == 0.25 and 0 < weights[1] < 1
    assert weights[1] == pytest.approx(shares[likelihood.argmax()].item(), abs=2e-3)
    assert weights[1] + weights[2] == pytest.approx(1, abs=1e-6)
    results = run(recipe, run_data)
    assert results["methods"]["gflownet"]["reward_weights"] == weights
    assert "Learned shares of the rewards: rewards.1 (collaborative)" in capsys.readouterr().out
