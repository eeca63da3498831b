"""Exact flows with the best leaves of each prompt, when the table of all leaves is too large."""

import pytest
import torch

from gflowtrl.rewards import CollaborativeReward, CompositeReward, GroundTruthReward

from .world import losses, make_trainer, teacher


def rewards() -> list:
    return [GroundTruthReward(), CollaborativeReward(teacher)]


def trained(tmp_path, **options):
    trainer = make_trainer(tmp_path, rewards(), loss_type="exact_flow", **options)
    trainer.train()
    return trainer


def test_with_all_leaves_among_the_best_the_flows_are_exact(tmp_path):
    exact = trained(tmp_path / "a")
    with pytest.warns(UserWarning, match="8 prompts x 23 leaves = 184 numbers, more than max_exact_elements=50"):
        fallback = trained(tmp_path / "b", max_exact_elements=50, exact_top_items=23)
    assert losses(fallback) == pytest.approx(losses(exact), rel=1e-5)
    for name in (
        "log_z",
        "residual",
        "reward",
        "rewards/ground_truth",
        "rewards/collaborative",
        "reward_floored_mass",
    ):
        first, second = ([log[name] for log in t.state.log_history if name in log] for t in (exact, fallback))
        assert second == pytest.approx(first, rel=1e-4, abs=1e-6) and len(first) == 4


def test_with_few_best_leaves_the_flows_are_those_of_the_leveled_reward(tmp_path, monkeypatch):
    """The loss of the first step by brute force: all but three leaves get the same reward by hand."""
    seen, original = [], CompositeReward.of
    monkeypatch.setattr(
        CompositeReward, "of", lambda self, step, *a: seen.append((step, original(self, step, *a))) or seen[-1][1]
    )
    with pytest.warns(UserWarning, match="only the exact_top_items=3 best leaves"):
        trainer = make_trainer(
            tmp_path, rewards(), loss_type="exact_flow", max_exact_elements=50, exact_top_items=3, max_steps=1
        )
    trainer.train()
    step, top = seen[0]
    whole = CompositeReward(rewards(), trainer._catalog, trainer.processing_class)
    table = original(whole, step).result.log_rewards
    best = torch.zeros_like(table, dtype=torch.bool).scatter(1, table.topk(3, 1).indices, True)
    assert torch.equal(best.nonzero()[:, 1].view(-1, 3), top.leaves)
    rest = table.exp().masked_fill(best, 0.0).sum(1, keepdim=True) / 20
    leveled = torch.where(best, table, rest.log())
    assert trainer.state.log_history[0]["log_z"] == pytest.approx(leveled.logsumexp(1).mean().item(), rel=1e-5)
    nodes = torch.arange(trainer._catalog.tree.num_nodes).expand(len(table), -1)
    flows = trainer._catalog.tree.log_flows(leveled)
    torch.testing.assert_close(top.log_flows(nodes), flows, atol=1e-5, rtol=1e-5)
