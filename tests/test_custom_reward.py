"""A custom reward of a few lines changes the recommendations. README and docs show the same code."""

import inspect
from pathlib import Path

import pytest
import torch

from gflowtrl import GFlowNetConfig, GFlowNetTrainer, Recommender
from gflowtrl.rewards import CollaborativeReward
from tests.tiny import tiny_model
from tests.trainer.world import ITEMS, TOKENIZER, make_catalog, make_rows, teacher


price = {item: 1.0 + 9.0 * (index % 2) for index, item in enumerate(ITEMS)}  # every other item costs ten times as much


def prefer_cheap(items, **kwargs):
    return [1 / min(price[item] for item in group) for group in items]


def mean_price(folder, rewards, weights) -> float:
    """Return the mean price of the top five recommendations after training with these rewards."""
    torch.manual_seed(0)
    args = GFlowNetConfig(
        str(folder), reward_weights=weights, num_generations=8, max_steps=60, learning_rate=1e-2, save_strategy="no",
        per_device_train_batch_size=8, disable_tqdm=True, use_cpu=True,
    )  # fmt: skip
    model, catalog = tiny_model(len(TOKENIZER)), make_catalog()
    GFlowNetTrainer(
        model, rewards, args, make_rows(), processing_class=TOKENIZER, catalog=catalog,
        sampler={"on_policy": 4, "uniform": 4},
    ).train()  # fmt: skip
    lists = Recommender(model, TOKENIZER, catalog).recommend([row["history"] for row in make_rows(40, seed=5)], k=5)
    prices = [price[recommendation.item] for ranked in lists for recommendation in ranked]
    return sum(prices) / len(prices)


def test_a_custom_reward_changes_what_is_recommended(tmp_path):
    without = mean_price(tmp_path, [CollaborativeReward(teacher)], [1.0])
    with_it = mean_price(tmp_path, [CollaborativeReward(teacher), prefer_cheap], [1.0, 1.0])
    assert without == pytest.approx(5.5, abs=1.5)  # the teacher ignores the price
    assert with_it < 0.5 * without


@pytest.mark.parametrize("name", ["README.md", "docs/rewards.md"])
def test_the_documents_show_this_reward(name):
    file = Path(__file__).parents[1] / name
    if not file.is_file():
        pytest.skip(f"{name} does not exist in an installed copy")
    assert inspect.getsource(prefer_cheap) in file.read_text(encoding="utf-8")
