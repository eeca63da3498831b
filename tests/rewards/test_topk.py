"""Flows and draws of `TopKReward`, compared with a table of all leaves where the other leaves have their mean."""

import pytest
import torch

from gflowtrl.catalog import PrefixTree
from gflowtrl.rewards import CollaborativeReward, CompositeReward, GroundTruthReward, TopKReward
from tests.rewards.world import TableTeacher, make_catalog, make_step
from tests.tiny import random_paths


class Grid:
    """Noise that is an evenly spaced grid in (0, 1)."""

    def uniform(self, purpose: str, num: int) -> torch.Tensor:
        return ((torch.arange(num) + 0.5) / num).expand(2, -1)


def top_of(table: torch.Tensor, k: int, tree: PrefixTree) -> tuple[TopKReward, torch.Tensor]:
    """Return the expected `TopKReward` of a table of log R, and the equivalent table of all leaves."""
    leaves = table.argsort(1, descending=True)[:, :k].sort(1).values
    best = torch.zeros_like(table, dtype=torch.bool).scatter(1, leaves, True)
    rest = table.double().exp().masked_fill(best, 0).sum(1) / max(table.shape[1] - k, 1)
    leveled = torch.where(best, table.double().exp(), rest[:, None])
    top = TopKReward(leaves, table.gather(1, leaves), rest.log().float(), tree, exact=lambda leaves: None)
    return top, leveled.log().float()


@pytest.mark.parametrize("k", [1, 7, 60])
def test_flows_of_all_nodes(k):
    """Tests a tree with ids of different lengths and rewards over many orders of magnitude. Z is exact."""
    tree = PrefixTree(random_paths(60, ragged=True))
    table = 6 * torch.randn(3, tree.num_leaves, generator=torch.Generator().manual_seed(k))
    top, leveled = top_of(table, min(k, tree.num_leaves), tree)
    nodes = torch.arange(tree.num_nodes).expand(3, -1)
    torch.testing.assert_close(top.log_flows(nodes), tree.log_flows(leveled), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(top.log_flows(nodes)[:, 0], table.logsumexp(1))
    shaped = torch.tensor([[[0, -1], [3, 2]]] * 3)
    assert (top.log_flows(shaped).isneginf() == (shaped < 0)).all()
    assert torch.equal(top.log_flows(shaped)[:, 1, 0], top.log_flows(nodes)[:, 3])


def test_the_best_leaves_of_a_batch():
    """The result does not depend on the chunks of rows. Every reward sees the columns of its rows."""
    catalog, step = make_catalog(), make_step()
    rewards = [GroundTruthReward(), CollaborativeReward(TableTeacher())]
    table = CompositeReward(rewards, catalog, beta=1.5).dense(make_step()).result.log_rewards
    expected, _ = top_of(table, 3, catalog.tree)
    drawn = torch.tensor([[0, 5], [1, 1], [7, 2], [3, 4]])
    for limit in (31, 24, 16, 1):
        top = CompositeReward(rewards, catalog, beta=1.5, max_elements=limit, top_items=3).of(step)
        assert isinstance(top, TopKReward) and torch.equal(top.leaves, expected.leaves)
        torch.testing.assert_close(top.log_rewards, expected.log_rewards)
        torch.testing.assert_close(top.log_rest, expected.log_rest)
        torch.testing.assert_close(top.log(drawn), table.gather(1, drawn))  # exact for any leaf
    every = CompositeReward(rewards, catalog, beta=1.5, max_elements=16, top_items=100).of(step)
    nodes = torch.arange(catalog.tree.num_nodes).expand(4, -1)
    torch.testing.assert_close(every.log_flows(nodes), catalog.tree.log_flows(table))
    assert every.log_rest.isneginf().all()
    with pytest.raises(ValueError, match="number of top leaves is 0; it must be a whole number of at least 1"):
        CompositeReward(rewards, catalog, max_elements=16, top_items=0).of(step)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("k", [1, 3, 8])
def test_draws_follow_the_reward(k, temperature):
    """An evenly spaced grid hits every leaf in proportion to its share, and returns its log-probability."""
    table = torch.randn(2, 8, generator=torch.Generator().manual_seed(k))
    top, leveled = top_of(table, k, PrefixTree(torch.arange(8)[:, None]))
    leaves, log_q = top.sample(20_000, Grid(), temperature)
    shares = torch.stack([torch.bincount(row, minlength=8) for row in leaves]) / 20_000
    torch.testing.assert_close(shares, (leveled / temperature).softmax(1), atol=2e-4, rtol=0)
    torch.testing.assert_close(log_q, (leveled / temperature).log_softmax(1).gather(1, leaves))
