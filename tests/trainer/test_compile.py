"""Training with torch.compile equals training without it."""

import pytest
import torch

from gflowtrl import Recommender
from gflowtrl.rewards import GroundTruthReward
from tests.trainer.world import losses, make_rows, make_trainer


@pytest.mark.slow
def test_a_compiled_model_trains_and_ranks_like_the_plain_one(tmp_path):
    """The backend "eager" captures graphs and runs them with PyTorch, so the numbers are equal."""
    found = []
    for options in ({}, {"torch_compile": True, "torch_compile_backend": "eager"}):
        torch.manual_seed(0)
        trainer = make_trainer(
            tmp_path / str(len(found)), [GroundTruthReward()], loss_type=["sft", "trajectory_balance"], max_steps=2,
            sampler={"ground_truth": 1, "on_policy": 3}, eval_dataset=make_rows(6, 1, 500), **options,
        )  # fmt: skip
        trainer.train()
        metrics = trainer.evaluate()
        trainer.save_model()
        lists = Recommender.from_pretrained(tmp_path / str(len(found))).recommend([["i001"]], k=5)
        found.append((losses(trainer), metrics["eval_ndcg@10"], [(r.item, r.log_prob) for r in lists[0]]))
        assert (type(trainer.model_wrapped).__name__ == "OptimizedModule") == bool(options)
    plain, compiled = found
    assert compiled[0] == pytest.approx(plain[0], rel=1e-5)
    assert compiled[1] == plain[1]
    assert [item for item, _ in compiled[2]] == [item for item, _ in plain[2]]
    assert [value for _, value in compiled[2]] == pytest.approx([value for _, value in plain[2]], rel=1e-4)
