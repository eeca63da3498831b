"""A sampler with a replay buffer per prompt."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any, Self

import torch
from torch import Tensor

from gflowtrl.checks import COUNT, POSITIVE, SHARE, check_number
from gflowtrl.data import Step
from gflowtrl.policy import Noise, TreePolicy
from gflowtrl.rewards import StepReward, draw_leaves

from .basic import OnPolicySampler
from .sampler import Feedback, Sampler, Trajectories, check_state, sum_over_processes


class ReplaySampler(Sampler):
    """Replays trajectories of earlier steps: recent ones and ones with high reward (TBA, Bartoldson et al. 2025).

    Every prompt, identified by its `row_id`, has its own buffer. After each step, the buffer receives all trajectories
    of the group with their log R, from any source. It contains each leaf once. The first ceil(K * `recent_share`) of K
    trajectories are drawn uniformly from the ceil(`capacity` / 2) most recent ones, the others from the whole buffer
    in proportion to R ** (1 / `temperature`), both with replacement. `log_q` is the log-probability of that draw. For
    prompts without a buffer, the fallback sampler draws (source "fallback").

    Recency: a trajectory moves to the front when another source draws it. Replaying does not move it, because the
    buffer would reinforce itself. The first trajectory of a new group is the most recent one. Eviction: if the buffer
    is full, it keeps the ceil(`capacity` / 2) most recent trajectories, and of the others those with the highest log R
    (the more recent one in a tie). Trajectories without reward (log R = -inf) are not stored.

    Memory: 8 bytes per trajectory on the CPU, so 8 * `capacity` per prompt (26 MB for 100,000 prompts with a capacity
    of 32), and about 100 bytes for the row id. Full storage is doubled. Each process has its own buffers. If another
    process gets a prompt in a later epoch, that process starts with an empty buffer. So, unlike the draws of other
    samplers, the replayed trajectories depend on how rows are distributed. Training that resumes with the same number
    of processes gives exactly the results of an uninterrupted run.

    Args:
        capacity: trajectories stored per prompt.
        recent_share: share of recent trajectories among the K; 0.5 as in TBA.
        temperature: temperature of the draw by reward, > 0.
        fallback: sampler for prompts without a buffer; by default the policy. Its `observe` is not called, so it
            should not have a state.
    """

    source_names = ("replay", "fallback")
    observes_group = True

    def __init__(
        self,
        capacity: int = 32,
        recent_share: float = 0.5,
        temperature: float = 1.0,
        fallback: Sampler | None = None,
    ):
        check_number("The capacity of ReplaySampler", capacity, COUNT)
        check_number("The recent_share of ReplaySampler", recent_share, SHARE)
        check_number("The temperature of ReplaySampler", temperature, POSITIVE)
        if fallback is not None and not isinstance(fallback, Sampler):
            raise TypeError(f"The fallback of ReplaySampler is {fallback!r}; it must be a Sampler.")
        self.capacity, self.recent_share, self.temperature = capacity, recent_share, temperature
        self.num_recent = math.ceil(capacity / 2)  # trajectories of a buffer that count as recent
        self.fallback = OnPolicySampler() if fallback is None else fallback
        self._slots: dict[int, int] = {}  # row id -> row of the tensors below, in order of first occurrence
        self._leaves = torch.full((0, capacity), -1, dtype=torch.int32)  # most recent first, padded with -1
        self._log_rewards = torch.zeros(0, capacity)
        self._stored = 0  # trajectories in all buffers

    # ---------------------------------------------------------------------------------------------------------- draw
    def sample(
        self, step: Step, policy: TreePolicy, reward: StepReward | None, num_generations: int, noise: Noise
    ) -> Trajectories:
        device = step.device
        stored, log_rewards = (tensor.to(device) for tensor in self._buffers(step.row_ids.tolist()))
        has_buffer = (stored >= 0).any(1, keepdim=True)
        drawn, log_q = self._replay(stored, log_rewards, noise.uniform("replay", num_generations).to(device))
        source = torch.where(has_buffer, 0, 1).expand(-1, num_generations).contiguous()
        # All processes call the fallback if one does: it may run the model, and sharded engines wait for each other.
        if not sum_over_processes((~has_buffer).any().long()):
            return Trajectories(drawn, source, log_q)
        other = self.fallback.sample(step, policy, reward, num_generations, noise)
        other_log_q = None if other.log_q is None else torch.where(has_buffer, log_q, other.log_q)
        return Trajectories(torch.where(has_buffer, drawn, other.leaves), source, other_log_q)

    def _replay(self, stored: Tensor, log_rewards: Tensor, uniforms: Tensor) -> tuple[Tensor, Tensor]:
        """Draw from buffers `(B, C)`: leaves and log-probabilities `(B, K)`, which are arbitrary for empty buffers."""
        filled = stored >= 0
        filled[:, 0] = True  # gives empty buffers a distribution
        recent = filled & (torch.arange(self.capacity, device=filled.device) < self.num_recent)
        rewarded = (log_rewards / self.temperature).masked_fill(~filled, -torch.inf).softmax(1)
        split = math.ceil(uniforms.shape[1] * self.recent_share)
        parts = [draw_leaves(recent.float(), uniforms[:, :split]), draw_leaves(rewarded, uniforms[:, split:])]
        positions, log_q = (torch.cat(pair, 1) for pair in zip(*parts, strict=True))
        return stored.gather(1, positions), log_q

    def _buffers(self, row_ids: list[int]) -> tuple[Tensor, Tensor]:
        """Return the leaves (long, padded with -1) and log R of the buffers of some rows, both `(n, C)`."""
        slots = torch.tensor([self._slots.get(row_id, -1) for row_id in row_ids], dtype=torch.long)
        leaves = torch.full((len(row_ids), self.capacity), -1, dtype=torch.long)
        log_rewards = torch.zeros(len(row_ids), self.capacity)
        exists = slots >= 0
        leaves[exists] = self._leaves[slots[exists]].long()
        log_rewards[exists] = self._log_rewards[slots[exists]]
        return leaves, log_rewards

    # --------------------------------------------------------------------------------------------------------- learn
    @torch.no_grad()
    def observe(self, step: Step, trajectories: Trajectories, feedback: Feedback) -> None:
        row_ids = step.row_ids.tolist()
        leaves, log_rewards = trajectories.leaves.cpu(), feedback.log_rewards.float().cpu()
        replayed = trajectories.source.cpu() == 0
        for rows in _rounds_without_duplicates(row_ids):
            ids = [row_ids[row] for row in rows]
            merged = _prepend(leaves[rows], log_rewards[rows], replayed[rows], *self._buffers(ids))
            self._store(ids, *_evict(*merged, self.capacity, self.num_recent))

    def _store(self, row_ids: list[int], leaves: Tensor, log_rewards: Tensor) -> None:
        for row_id in row_ids:
            self._slots.setdefault(row_id, len(self._slots))
        missing = len(self._slots) - len(self._leaves)
        if missing > 0:
            added = max(missing, len(self._leaves))
            self._leaves = torch.cat([self._leaves, torch.full((added, self.capacity), -1, dtype=torch.int32)])
            self._log_rewards = torch.cat([self._log_rewards, torch.zeros(added, self.capacity)])
        slots = torch.tensor([self._slots[row_id] for row_id in row_ids], dtype=torch.long)
        self._stored += int((leaves >= 0).sum()) - int((self._leaves[slots] >= 0).sum())
        self._leaves[slots] = leaves.int()
        self._log_rewards[slots] = log_rewards

    # --------------------------------------------------------------------------------------------------------- state
    def state_dict(self) -> dict[str, Tensor]:
        size = len(self._slots)
        return {
            "row_ids": torch.tensor(list(self._slots), dtype=torch.long),
            "leaves": self._leaves[:size].clone(),
            "log_rewards": self._log_rewards[:size].clone(),
        }

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        check_state(self, state, ("row_ids", "leaves", "log_rewards"))
        capacity = state["leaves"].shape[1]
        if capacity != self.capacity:
            raise ValueError(
                f"The saved replay buffer has a capacity of {capacity}, but capacity is {self.capacity}. Set capacity "
                f"to {capacity}, or start a new training."
            )
        self._slots = {row_id: slot for slot, row_id in enumerate(state["row_ids"].tolist())}
        self._leaves = state["leaves"].to("cpu", torch.int32, copy=True)
        self._log_rewards = state["log_rewards"].to("cpu", torch.float32, copy=True)
        self._stored = int((self._leaves >= 0).sum())

    def metrics(self) -> dict[str, float]:
        """Return the number of `prompts` with a buffer, and the mean number of `trajectories` per buffer."""
        return {"prompts": float(len(self._slots)), "trajectories": self._stored / max(len(self._slots), 1)}

    @classmethod
    def from_spec(cls, spec: Mapping[str, Any], context: Mapping[str, Any]) -> Self:
        return cls(**{**spec, "fallback": context["build"](spec.get("fallback", "on_policy"))})


def _rounds_without_duplicates(row_ids: list[int]) -> Iterator[list[int]]:
    """Split the rows of a batch into rounds (almost always one) without repeated ids, in the order of the rows."""
    remaining = list(range(len(row_ids)))
    while remaining:
        first = {row_ids[row]: row for row in reversed(remaining)}
        yield sorted(first.values())
        remaining = [row for row in remaining if first[row_ids[row]] != row]


def _prepend(
    new: Tensor, new_log_rewards: Tensor, replayed: Tensor, old: Tensor, old_log_rewards: Tensor
) -> tuple[Tensor, Tensor]:
    """Put a group `(B, K)` before buffers `(B, C)`. Return leaves and log R `(B, K + C)`, with -1 for removed leaves.

    A replayed trajectory keeps its position in the buffer and gets its new log R.
    """
    in_buffer = (new[:, :, None] == old[:, None]) & replayed[:, :, None]
    latest = new_log_rewards.gather(1, in_buffer.float().argmax(1))
    old_log_rewards = torch.where(in_buffer.any(1), latest, old_log_rewards)
    leaves = torch.cat([new.masked_fill(in_buffer.any(2), -1), old], 1)
    return leaves, torch.cat([new_log_rewards, old_log_rewards], 1)


def _evict(leaves: Tensor, log_rewards: Tensor, capacity: int, num_recent: int) -> tuple[Tensor, Tensor]:
    """Reduce leaves `(B, n)`, most recent first, to buffers `(B, capacity)` of distinct leaves with a finite log R."""
    repeated = (leaves[:, :, None] == leaves[:, None]).tril(-1).any(2)
    present = (leaves >= 0) & ~repeated & log_rewards.isfinite()
    recent = present & (present.cumsum(1) <= num_recent)
    priority = log_rewards.masked_fill(~present, -torch.inf).masked_fill(recent, torch.inf)
    best = priority.argsort(dim=1, descending=True, stable=True)[:, :capacity]
    kept = torch.zeros_like(present).scatter_(1, best, True) & present
    order = (~kept).int().argsort(dim=1, stable=True)[:, :capacity]
    return leaves.masked_fill(~kept, -1).gather(1, order), log_rewards.masked_fill(~kept, 0.0).gather(1, order)
