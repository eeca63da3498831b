"""Rows that share a prompt: found completely, and kept together in every epoch's order."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from gflowtrl.data.sharing import PrefixGroupedEpochSampler, prefix_groups, prompt_members


HISTORIES = st.lists(st.lists(st.sampled_from("abc"), min_size=1, max_size=5), min_size=1, max_size=12)


@given(HISTORIES, st.sampled_from([None, 2, 3]))
def test_groups_are_prefixes_and_as_few_as_can_be(histories, cut):
    groups = prefix_groups(histories, cut)
    assert sorted(row for group in groups for row in group) == list(range(len(histories)))
    prompts = [tuple(history if cut is None else history[-cut:]) for history in histories]
    for group in groups:
        assert all(prompts[group[0]][: len(prompts[row])] == prompts[row] for row in group)
    # A history that is a proper prefix of no other one needs a group of its own, and nothing else does.
    maximal = {p for p in prompts if not any(q != p and q[: len(p)] == p for q in prompts)}
    assert len(groups) == len(maximal)


@given(HISTORIES, st.integers(1, 4))
def test_large_groups_are_divided_evenly(histories, max_size):
    whole, parts = prefix_groups(histories), prefix_groups(histories, max_size=max_size)
    assert sorted(row for group in parts for row in group) == list(range(len(histories)))
    assert max(map(len, parts)) <= max_size
    assert len(parts) == sum(-(-len(group) // max_size) for group in whole)
    assert all(histories[group[0]][: len(histories[row])] == histories[row] for group in parts for row in group)


def test_members_are_padded():
    members = prompt_members([["a"], ["b"], ["a", "b"]])
    assert members.tolist() == [[2, 0], [1, -1]]


@given(st.lists(st.integers(1, 7), min_size=1, max_size=40), st.integers(1, 9), st.integers(0, 3))
def test_an_epoch_holds_each_row_once_and_groups_together(sizes, batch_size, epoch):
    ends = torch.tensor(sizes).cumsum(0).tolist()
    groups = [list(range(end - size, end)) for size, end in zip(sizes, ends, strict=True)]
    sampler = PrefixGroupedEpochSampler(groups, sizes, batch_size, seed=1, spread=3)
    sampler.set_epoch(epoch)
    order = list(sampler)
    assert order == list(sampler)
    assert sorted(order) == list(range(ends[-1])) and len(sampler) == ends[-1]
    batches = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
    pieces = [sum(any(row in batch for row in group) for batch in batches) for group in groups]
    # A batch's two ends are the only places where a group may be cut.
    assert sum(pieces) <= len(groups) + len(batches) - 1 or batch_size < max(sizes)


def test_order_changes_from_epoch_to_epoch():
    sampler = PrefixGroupedEpochSampler([[row] for row in range(100)], [1] * 100, 4, seed=0)
    first = list(sampler)
    sampler.set_epoch(1)
    assert list(sampler) != first
