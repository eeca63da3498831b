"""Teachers and rewards of a recipe."""

import pytest
import torch

from gflowtrl.pipeline.materials import prepare
from gflowtrl.pipeline.signals import build_rewards, fit_teacher, load_function, reward_key
from gflowtrl.pipeline.stage import Workshop

from .micro import micro_recipe


CODE = (
    "def cheap(items, item_features, **columns):\n    return [-item_features[group[0]]['price'] for group in items]\n"
)


def test_a_mixture_fits_each_part_once(tmp_path):
    parts = [{"type": "ease", "regularization": 5.0, "weight": 3}, {"type": "popularity"}]
    mixture = {"type": "mixture", "parts": parts}
    recipe = micro_recipe(tmp_path, teacher=mixture)
    materials, workshop = prepare(recipe), Workshop(tmp_path, quiet=True)
    teacher = fit_teacher(workshop, materials, recipe.teacher)
    ease = fit_teacher(workshop, materials, {"type": "ease", "regularization": 5.0})
    popularity = fit_teacher(workshop, materials, {"type": "popularity"})
    assert len(list(tmp_path.glob("teacher-*"))) == 2
    histories = materials.splits.test["history"][:4]
    expected = 0.75 * ease.score(histories).softmax(1) + 0.25 * popularity.score(histories).softmax(1)
    torch.testing.assert_close(teacher.score(histories).softmax(1), expected)


def test_reward_functions_get_item_features_and_their_code_is_part_of_the_key(tmp_path):
    file = tmp_path / "my_rewards.py"
    file.write_text(CODE)
    rewards = [{"function": "my_rewards.py:cheap", "weight": 0.5}]
    recipe = micro_recipe(tmp_path, rewards=rewards, folder=str(tmp_path), gflownet={"reward_transform": "exp"})
    materials = prepare(recipe)
    (reward,) = build_rewards(Workshop(tmp_path, quiet=True), materials, None, tmp_path)
    item = materials.data.items[0]
    assert reward(items=[[item]], prompts=[""]) == [-materials.data.item_features[item]["price"]]
    before = reward_key(recipe, materials)
    file.write_text(CODE + "# changed\n")
    assert reward_key(recipe, materials) != before


def test_a_missing_reward_function_is_named(tmp_path):
    (tmp_path / "r.py").write_text(CODE)
    with pytest.raises(ValueError, match="defines no function 'dear'"):
        load_function("r.py:dear", str(tmp_path))
    with pytest.raises(FileNotFoundError, match="absent.py:cheap"):
        load_function("absent.py:cheap", str(tmp_path))
    with pytest.raises(ValueError, match="must be given as"):
        load_function("cheap")
