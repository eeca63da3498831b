import copy
import dataclasses
import gc
import types
from collections.abc import Callable

import numpy as np
import pytest
import torch

from gflowtrl.catalog import ItemCatalog
from gflowtrl.data import (
    CLICKED,
    PURCHASED,
    SHOWN,
    GroupCollator,
    PromptEncoder,
    ShopTruth,
    SyntheticShop,
    build_tokenizer,
    leave_one_out,
    sft_dataset,
)

from .conftest import SMALL_SHOP


@pytest.fixture(scope="module")
def shop():
    """The shop with its default fields."""
    return SyntheticShop().generate()


def test_the_shop_is_marked_as_synthetic(shop):
    data, _ = shop
    assert data.name == "synthetic_shop" and data.synthetic and "SYNTHETIC" in data.summary()


def test_same_seed_same_shop_other_seed_other_shop(small_shop):
    data, truth = small_shop
    again, truth_again = SMALL_SHOP.generate()
    assert again == data and truth_again.preference.equal(truth.preference)
    other, _ = dataclasses.replace(SMALL_SHOP, seed=1).generate()
    assert other.sequences != data.sequences


def test_the_log_has_the_documented_properties(shop):
    data, truth = shop
    assert min(map(len, data.sequences)) >= 5
    assert all(len(set(sequence)) == len(sequence) for sequence in data.sequences)
    for user, log in enumerate(data.events):
        assert [event.session for event in log] == sorted(event.session for event in log)
        assert truth.shown[user].nonzero()[:, 0].tolist() == sorted({event.item for event in log})
        assert truth.consumed[user].nonzero()[:, 0].tolist() == sorted(data.sequences[user])
    assert truth.shown.sum(0).min() >= 20  # users that each item was shown to
    assert {event.level for log in data.events for event in log} == {SHOWN, CLICKED, PURCHASED}
    assert len(set(data.semantic_ids.values())) == len(data.items)
    assert all({"title", "category", "price"} <= data.item_features[item].keys() for item in data.items)


def test_the_log_is_biased_towards_popular_items_and_hides_most_liked_items(shop):
    _, truth = shop
    exposure = truth.shown.double().mean(0).sort(descending=True).values
    assert exposure[:30].mean() > 8 * exposure[150:].mean()
    liked_mass = (truth.preference * truth.liked).sum(1).mean()
    hidden_mass = (truth.preference * (truth.liked & ~truth.shown)).sum(1).mean()
    assert liked_mass > 0.6 and hidden_mass > 0.6 * liked_mass


def test_clicks_and_purchases_follow_the_true_preference(shop):
    """In ten equal groups of shown items, the click rate follows the documented function of the preference."""
    data, truth = shop
    config = SyntheticShop()
    log = [(user, event.item, event.level) for user, events in enumerate(data.events) for event in events]
    user, item, level = torch.tensor(log).T
    intensity = config.n_items * truth.preference[user, item]
    click = 1 - (1 - config.noise) * torch.exp(-config.click_rate * intensity)
    purchase = click * (1 - torch.exp(-config.purchase_rate * intensity))
    for group in intensity.argsort().chunk(10):
        for law, happened in ((click, level >= CLICKED), (purchase, level == PURCHASED)):
            deviation = law[group].sum() - happened[group].sum()
            assert abs(deviation) < 4.5 * (law * (1 - law))[group].sum().sqrt() + 1e-9


def test_preferences_are_distributions_of_low_rank(shop):
    _, truth = shop
    assert torch.allclose(truth.preference.sum(1), torch.ones(len(truth.users), dtype=torch.float64))
    assert torch.linalg.matrix_rank(truth.preference) == SyntheticShop().interests
    assert truth.liked.equal(truth.preference > 2 / len(truth.items))


def test_evaluate_by_hand():
    preference = torch.tensor([[0.5, 0.3, 0.1, 0.1], [0.25, 0.25, 0.25, 0.25]], dtype=torch.float64)
    shown = torch.tensor([[True, False, True, False], [False] * 4])
    consumed = torch.tensor([[True, False, False, False], [False] * 4])
    truth = ShopTruth(["u", "v"], [1, 2, 3, 4], preference, shown, consumed, liked_ratio=1.0)
    probs = torch.tensor([[0.2, 0.4, 0.4, 0.0]])
    # u likes items 1 and 2 and was not shown 2. Without the taken item 1: truth (.6, .2, .2), prediction (.5, .5, 0).
    assert truth.evaluate(["u"], probs) == pytest.approx({"unseen_liked_mass": 0.4, "total_variation": 0.3})
    both = truth.per_user(["v", "u"], torch.cat([preference[1:], probs]))
    assert both["total_variation"].tolist() == pytest.approx([0.0, 0.3])
    assert truth.evaluate(["u", "v"], preference)["total_variation"] == pytest.approx(0.0)


@pytest.mark.parametrize(
    ("users", "probs", "message"),
    [
        (["w"], [[0.5, 0.5]], "User 'w' is not in this synthetic shop"),
        (["u"], [[0.5, 0.5, 0.0]], r"must be \(1, 2\), but is \(1, 3\)"),
        (["u"], [[0.5, 0.4]], "Row 0 of item_probs is not a probability"),
        (["u"], [[float("nan"), 0.4]], "Row 0 of item_probs is not a probability"),
        (["u"], [[1.5, -0.5]], "Row 0 of item_probs is not a probability"),
    ],
)
def test_evaluate_refuses_bad_input(users, probs, message):
    none = torch.zeros(1, 2, dtype=torch.bool)
    truth = ShopTruth(["u"], [1, 2], torch.tensor([[0.5, 0.5]], dtype=torch.float64), none, none)
    with pytest.raises(ValueError, match=message):
        truth.evaluate(users, torch.tensor(probs))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"noise": 0.0}, "noise"),
        ({"min_items": 2}, "min_items"),
        ({"n_items": 5}, "n_items"),
        ({"n_users": 9}, "n_users"),
    ],
)
def test_impossible_shops_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        SyntheticShop(**fields)


# ---------------------------------------------------------------------------------------- the truth cannot be reached
def reachable(*roots):
    """Return all objects reachable from `roots` through attributes, members and closures, not modules and classes."""
    stack, seen = list(roots), {}
    while stack:
        value = stack.pop()
        if id(value) in seen or isinstance(value, types.ModuleType | type):
            continue
        seen[id(value)] = value
        if isinstance(value, types.FunctionType):  # without its globals, which are the module
            stack += [value.__defaults__, value.__kwdefaults__, value.__dict__]
            stack += [cell.cell_contents for cell in value.__closure__ or ()]
        else:
            stack += gc.get_referents(value)
    return seen.values()


def assert_hides(truth, *roots):
    secrets = {"preference": truth.preference, "liked": truth.liked}
    for value in reachable(*roots):
        assert not isinstance(value, ShopTruth)
        if isinstance(value, torch.Tensor | np.ndarray):
            values = torch.as_tensor(value)
            for name, secret in secrets.items():
                same = values.shape == secret.shape and torch.allclose(values.double(), secret.double(), atol=1e-6)
                assert not same, f"the truth ({name}) can be reached"


@pytest.fixture(scope="module")
def training_objects(small_shop):
    """The objects that a training run uses."""
    data, _ = small_shop
    splits = leave_one_out(data)
    tokenizer = build_tokenizer(data.semantic_ids)
    catalog = ItemCatalog.from_semantic_ids(data.semantic_ids, tokenizer)
    collator = GroupCollator(PromptEncoder(catalog, tokenizer))
    return {
        "data": data,
        "splits": splits,
        "catalog": catalog,
        "sft": sft_dataset(splits.train_sequences, catalog, tokenizer),
        "collator": collator,
        "batch": collator(splits.train.to_list()[:4]),
    }


def test_assert_hides_finds_the_truth(small_shop, training_objects):
    """The test below can fail: the truth is found in a closure, in an attribute and as a copy of the matrix."""
    data, truth = small_shop
    closure: Callable = lambda: truth  # noqa: E731
    for leak in (closure, types.SimpleNamespace(x=[{"y": truth}]), [truth.preference.float().numpy()]):
        with pytest.raises(AssertionError):
            assert_hides(truth, training_objects, leak)


def test_training_cannot_reach_the_truth(small_shop, training_objects):
    _, truth = small_shop
    assert_hides(truth, training_objects)


def test_rewards_and_teachers_cannot_reach_the_truth(small_shop, training_objects):
    teachers, rewards = pytest.importorskip("gflowtrl.teachers"), pytest.importorskip("gflowtrl.rewards")
    data, truth = small_shop
    teacher = teachers.EASE.fit(training_objects["splits"].train_sequences, data.items)
    assert_hides(truth, teacher, rewards.CollaborativeReward(teacher), rewards.GroundTruthReward())


def test_training_data_is_a_function_of_the_log_alone(small_shop):
    """Two shops with the same log and different truths have the same training data."""
    data, truth = small_shop
    before = leave_one_out(data)
    truth = copy.deepcopy(truth)
    truth.preference = truth.preference.flip(1)
    truth.liked = truth.liked.flip(1)
    again = leave_one_out(copy.deepcopy(data))
    for name in ("train", "validation", "test"):
        assert getattr(before, name).to_list() == getattr(again, name).to_list()
    assert before.item_counts.equal(again.item_counts) and before.impression_counts.equal(again.impression_counts)
