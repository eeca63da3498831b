"""Plain reward functions are called with TRL's signature."""

import asyncio
from types import SimpleNamespace

import pytest
import torch

from gflowtrl.rewards import CompositeReward, UniformReward
from tests.rewards.world import TOKENIZER, make_catalog, make_step


def leaves_of(*names):
    return make_catalog().leaf_of(names).view(-1, 2)


LEAVES = leaves_of("date", "apple", "fig", "fig", "pear", "nut", "kiwi", "lime")


def combine(*rewards):
    return CompositeReward(list(rewards), make_catalog(), TOKENIZER)


def test_keywords():
    seen = {}

    def reward(prompts, completions, completion_ids, items, **columns):
        seen.update(prompts=prompts, completions=completions, ids=completion_ids, items=items, **columns)
        columns["log_metric"]("half", 1)
        columns["log_metric"]("half", 0)
        columns["log_extra"]("note", ["x"] * 8)
        return [1.0] * 8

    state = SimpleNamespace(global_step=3)
    result = combine(reward).of(make_step(), trainer_state=state).score(LEAVES)
    assert seen["prompts"][0] == seen["prompts"][1] == "<bos> <a_1> <b_1> <c_2>"
    assert seen["prompts"][2] == "<bos> <a_2> <b_2> <c_1> <a_3> <b_1>"
    assert seen["completions"][:2] == ["<a_3> <b_1>", "<a_1> <b_1> <c_1>"]
    assert seen["ids"] == TOKENIZER(seen["completions"], add_special_tokens=False)["input_ids"]
    assert seen["items"][:3] == [["date"], ["apple", "quince"], ["fig"]]
    assert seen["row_id"] == [10, 10, 11, 11, 12, 12, 13, 13]
    assert seen["target"] == ["apple"] * 2 + ["date"] * 2 + ["pear"] * 2 + ["quince"] * 2
    assert seen["history"][3] == ["pear", "date"] and seen["budget"][-1] == 3.0
    assert seen["trainer_state"] is state
    assert set(seen) == {
        "prompts", "completions", "ids", "items", "row_id", "target", "history", "budget", "session_items",
        "session_levels", "trainer_state", "log_extra", "log_metric",
    }  # fmt: skip
    assert result.metrics == {"half": 0.5} and result.extra == {"note": ["x"] * 8}


def test_async_rewards_run_concurrently():
    """Each reward waits for the other, so sequential calls would never return."""
    events, loops = {}, []

    def waiting(name, other):
        async def reward(completions, **_):
            loops.append(asyncio.get_running_loop())
            for event in (name, other):
                events.setdefault(event, asyncio.Event())
            events[name].set()
            await asyncio.wait_for(events[other].wait(), timeout=5)
            return [2.0 if name == "a" else 3.0] * len(completions)

        return reward

    class Scorer:
        async def __call__(self, completions, **_):
            return [float(len(text.split())) for text in completions]

    composite = combine(waiting("a", "b"), waiting("b", "a"), Scorer())
    result = composite.of(make_step()).score(LEAVES)
    assert result.rewards.tolist() == [[7, 8], [8, 8], [8, 8], [8, 8]]
    assert result.parts["Scorer"][0].tolist() == [2, 3]

    async def notebook():
        return composite.of(make_step()).score(LEAVES).rewards

    assert torch.equal(asyncio.run(notebook()), result.rewards)
    assert len(set(loops)) == 1  # a single loop keeps the open connections of a reward from step to step


@pytest.mark.parametrize("asynchronous", [False, True])
def test_an_exception_names_the_reward(asynchronous):
    def plain(**_):
        raise KeyError("price")

    async def later(**_):
        raise KeyError("price")

    with pytest.raises(KeyError) as caught:
        combine(later if asynchronous else plain).of(make_step()).score(LEAVES)
    assert f"'{'later' if asynchronous else 'plain'}'" in caught.value.__notes__[0]


@pytest.mark.parametrize(
    ("values", "error", "message"),
    [
        ({index: 1.0 for index in range(8)}, TypeError, "returned dict; it must return a list of 8 numbers"),
        ({float(index) for index in range(8)}, TypeError, "returned set; it must return a list of 8"),
        ("11111111", TypeError, "returned str; it must return a list of 8"),
        (["1"] * 8, TypeError, "returned '1' for row 0"),
        ([10**400] * 8, ValueError, "returned inf for row 0"),
        (torch.ones(8, device="meta"), TypeError, "returned Tensor; it must return a list of 8"),
    ],
)
def test_values_that_are_no_list_of_numbers_are_refused(values, error, message):
    with pytest.raises(error, match=f"Reward 'mine' {message}"):
        combine(named(lambda **_: values)).of(make_step()).score(LEAVES)


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (
            lambda prompts: [1.0] * 8,
            "cannot be called with the columns .*unexpected keyword argument.*as \\*\\*kwargs",
        ),
        (lambda absent, **_: [1.0] * 8, "cannot be called with .*missing a required argument: 'absent'"),
        (lambda log_metric, **_: log_metric("share", "high"), "log_metric of 'share' got 'high'; give a number"),
        (lambda log_extra, **_: log_extra("note", 5), "log_extra of 'note' got 5; give one value per completion"),
    ],
)
def test_functions_that_do_not_fit_are_refused(function, message):
    with pytest.raises(TypeError, match=message):
        combine(named(function)).of(make_step()).score(LEAVES)


@pytest.mark.parametrize(
    "values", [torch.ones(4, 2, device="meta"), torch.ones(4, 2).to_sparse(), torch.ones(4, 2) * 1j]
)
def test_tensors_without_real_values_are_refused(values):
    reward = SimpleNamespace(__name__="mine", score_leaves=lambda step, leaves: values)
    with pytest.raises(ValueError, match="score_leaves of reward 'mine' returned tensor"):
        combine(reward).of(make_step()).score(LEAVES)


def test_a_class_is_not_a_reward():
    with pytest.raises(TypeError, match="reward_funcs contains <class .*UniformReward'>; .*an object, not its class"):
        combine(UniformReward)


def named(function):
    function.__name__ = "mine"
    return function
