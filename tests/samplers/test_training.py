"""A resumed training with all stateful and scheduled samplers equals an uninterrupted one."""

import shutil

import torch

from gflowtrl.samplers import build_sampler
from tests.trainer.test_step import rewards
from tests.trainer.world import losses, make_trainer, teacher, weights


SPEC = {
    "type": "scheduled_mixture",
    "schedule": [
        [0.0, {"ground_truth": 1, "curriculum": 2, "unobserved": 1, "replay": 1, "adaptive": 3}],
        [1.0, {"ground_truth": 1, "beam": 1, "replay": 3, "adaptive": 3}],
    ],
    "sources": {
        "curriculum": {"type": "curriculum", "pool_size": 9},
        "replay": {"type": "replay", "capacity": 5},
        "adaptive": {
            "type": "adaptive_mixture", "sources": {"low_confidence": 1, "stochastic_beam": 1, "on_policy": 1},
            "floor": 0.2,
        },
    },
}  # fmt: skip


def test_curriculum_replay_and_mixtures_resume_exactly(tmp_path):
    def trainer(folder):
        return make_trainer(
            folder, rewards(), sampler=build_sampler(SPEC, teacher), loss_type="vargrad", num_generations=8,
            save_strategy="steps", save_steps=5, max_steps=9,
        )  # fmt: skip

    whole = trainer(tmp_path / "whole")
    whole.train()
    shutil.copytree(tmp_path / "whole" / "checkpoint-5", tmp_path / "resumed" / "checkpoint-5")
    resumed = trainer(tmp_path / "resumed")
    resumed.train(resume_from_checkpoint=True)
    assert losses(resumed) == losses(whole)
    expected = weights(whole)
    assert all(torch.equal(value, expected[name]) for name, value in weights(resumed).items())
    state = whole.sampler.state_dict()
    assert sorted(state) == [
        "adaptive/residuals", "replay/leaves", "replay/log_rewards", "replay/row_ids",
    ]  # fmt: skip
    assert all(torch.equal(tensor, state[name]) for name, tensor in resumed.sampler.state_dict().items())
    steps = [log for log in whole.state.log_history if "loss" in log]
    # 24 rows, 8 per step: after the first epoch every prompt has a buffer, and the fallback is not used.
    assert [step["sampler/replay/prompts"] for step in steps] == [8, 16, *[24] * 7]
    shares = [(step["sampler/replay/replay/share"] > 0, step["sampler/replay/fallback/share"] > 0) for step in steps]
    assert shares == [(False, True)] * 3 + [(True, False)] * 6
    assert steps[0]["sampler/curriculum/share"] == 0.25 and steps[-1]["sampler/curriculum/share"] == 0
    assert all(step["sampler/adaptive/weight/on_policy"] >= 0.2 for step in steps)
    assert len({step["sampler/adaptive/weight/on_policy"] for step in steps}) == len(steps)
