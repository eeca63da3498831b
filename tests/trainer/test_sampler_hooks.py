"""The information that a sampler gets from the trainer, and the resume of its state."""

import shutil

import pytest
import torch
from safetensors.torch import load_file

from gflowtrl.samplers import Sampler, Trajectories, UniformSampler
from gflowtrl.trainer.training_state import load_sampler, save_sampler

from .test_step import CATALOG, LEAVES, WEIGHTS, rewards, true_rewards
from .world import losses, make_trainer, weights


class Counting(Sampler):
    """Count the drawn leaves and the feedback about them; both determine the next draw."""

    source_names = ("counting",)

    def __init__(self):
        self.counts = torch.zeros(LEAVES, dtype=torch.long)
        self.residual = torch.zeros(LEAVES)
        self.seen: list[dict] = []

    def sample(self, step, policy, reward, num_generations, noise):
        order = (self.counts + self.residual + 0.01 * torch.arange(LEAVES)).argsort()
        leaves = order[(step.row_ids[:, None] + torch.arange(num_generations)) % LEAVES]
        return Trajectories.of_one_source(leaves)

    def observe(self, step, trajectories, feedback):
        leaves = trajectories.leaves.flatten()
        self.counts += torch.bincount(leaves, minlength=LEAVES)
        self.residual.index_add_(0, leaves, feedback.residual.flatten())
        self.seen.append({"step": step, "leaves": trajectories.leaves, **vars(feedback)})

    def state_dict(self):
        return {"counts": self.counts, "residual": self.residual}

    def load_state_dict(self, state):
        self.counts, self.residual = state["counts"].clone(), state["residual"].clone()

    def metrics(self):
        return {"leaves_met": float((self.counts > 0).sum())}


def test_it_gets_the_progress_and_the_results_of_its_trajectories(tmp_path):
    sampler = Counting()
    trainer = make_trainer(
        tmp_path, rewards(), sampler=sampler, loss_type="trajectory_balance", reward_weights=WEIGHTS,
        per_device_train_batch_size=4, gradient_accumulation_steps=2, max_steps=4,
    )  # fmt: skip
    trainer.train()
    assert [told["step"].progress for told in sampler.seen] == [0, 0, 0.25, 0.25, 0.5, 0.5, 0.75, 0.75]
    first = sampler.seen[0]
    expected = true_rewards(first["step"]).log().gather(1, first["leaves"])
    torch.testing.assert_close(first["log_rewards"], expected, rtol=1e-4, atol=1e-4)
    # The head is initialized to log Z = 0.
    torch.testing.assert_close(first["residual"], (first["log_pi"] - expected).abs(), rtol=1e-4, atol=1e-4)
    for told in sampler.seen:
        assert not any(told[name].requires_grad for name in ("log_rewards", "residual", "log_pi"))
    met = [log["sampler/leaves_met"] for log in trainer.state.log_history if "loss" in log]
    assert met == sorted(met) and met[-1] <= LEAVES


def test_the_residual_uses_the_true_log_z_if_it_is_known(tmp_path):
    sampler = Counting()
    trainer = make_trainer(
        tmp_path, rewards(), sampler=sampler, loss_type="exact_flow", reward_weights=WEIGHTS, max_steps=1
    )
    trainer.train()
    told = sampler.seen[0]
    log_rewards = true_rewards(told["step"]).log()
    expected = log_rewards.logsumexp(1)[:, None] + told["log_pi"] - log_rewards.gather(1, told["leaves"])
    torch.testing.assert_close(told["residual"], expected.abs(), rtol=1e-4, atol=1e-4)


def test_its_state_is_restored_bit_for_bit(tmp_path):
    def trainer(folder, sampler):
        return make_trainer(folder, rewards(), sampler=sampler, save_strategy="steps", save_steps=3, max_steps=6)

    whole = trainer(tmp_path / "whole", Counting())
    whole.train()
    checkpoint = tmp_path / "resumed" / "checkpoint-3"
    shutil.copytree(tmp_path / "whole" / "checkpoint-3", checkpoint)
    state = load_file(checkpoint / "sampler.safetensors")
    assert state["counts"].sum() == 3 * 8 * 4
    resumed = trainer(tmp_path / "resumed", Counting())
    resumed.train(resume_from_checkpoint=True)
    assert torch.equal(resumed.sampler.counts, whole.sampler.counts)
    assert torch.equal(resumed.sampler.residual, whole.sampler.residual)
    expected = weights(whole)
    assert all(torch.equal(value, expected[name]) for name, value in weights(resumed).items())
    assert losses(resumed) == losses(whole)
    # Another state gives other draws, so equal draws show that the state was restored.
    save_sampler(Counting(), checkpoint, 0, 1)
    forgetful = trainer(tmp_path / "forgetful", Counting())
    forgetful.train(resume_from_checkpoint=str(checkpoint))
    assert losses(forgetful)[:3] == losses(whole)[:3] and losses(forgetful)[3:] != losses(whole)[3:]


def test_a_sampler_without_state_writes_no_file(tmp_path):
    trainer = make_trainer(tmp_path, rewards(), sampler="uniform", save_strategy="steps", save_steps=1, max_steps=1)
    trainer.train()
    assert (tmp_path / "checkpoint-1" / "optimizer.pt").exists()
    assert not list((tmp_path / "checkpoint-1").glob("sampler*"))


def test_every_process_has_its_own_file(tmp_path):
    for process in range(2):
        sampler = Counting()
        sampler.counts += process + 1
        save_sampler(sampler, tmp_path / "checkpoint", process, processes=2)
    for process in range(2):
        loaded = Counting()
        load_sampler(loaded, tmp_path / "checkpoint", process, processes=2)
        assert (loaded.counts == process + 1).all()
    for processes in (1, 3):
        with pytest.raises(ValueError, match=rf"sampler-0-of-2.*not the state of {processes} process"):
            load_sampler(Counting(), tmp_path / "checkpoint", 0, processes)


def test_the_state_of_another_sampler_is_an_error(tmp_path):
    save_sampler(Counting(), tmp_path, 0, 1)
    with pytest.raises(ValueError, match="UniformSampler has the entries"):
        load_sampler(UniformSampler(), tmp_path, 0, 1)


def test_views_and_shared_memory_can_be_saved(tmp_path):
    """safetensors accepts neither, and a sampler's buffers can be either."""
    sampler = Counting()
    table = torch.arange(4 * LEAVES).view(LEAVES, 4)
    sampler.counts, sampler.residual = table[:, 1], table[:, 1]
    save_sampler(sampler, tmp_path, 0, 1)
    loaded = Counting()
    load_sampler(loaded, tmp_path, 0, 1)
    assert torch.equal(loaded.counts, table[:, 1]) and CATALOG.tree.num_leaves == LEAVES
