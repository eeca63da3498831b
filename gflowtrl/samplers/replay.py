"""A replay buffer for every prompt: what was drawn before is learned from again."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from gflowtrl.checks import COUNT, POSITIVE, SHARE, check_number
from gflowtrl.data import Step
from gflowtrl.policy import Noise, TreePolicy
from gflowtrl.rewards import StepReward, draw_leaves

from .basic import OnPolicySampler
from .sampler import Feedback, Sampler, Trajectories, check_state, over_processes


class ReplaySampler(Sampler):
    """Trajectories of earlier steps, half recent ones and half well rewarded ones (TBA, Bartoldson et al. 2025).

    Every prompt, known by its `row_id`, has a buffer of its own. After each step it takes in all trajectories of the
    group, whatever source drew them, with their log R; a leaf stands in it once. Of K trajectories the first
    ceil(K * `recent_share`) are drawn uniformly from the ceil(`capacity` / 2) most recent ones, the others from the
    whole buffer in proportion to R ** (1 / `temperature`), both with replacement; `log_q` is the log-probability of
    that draw. A prompt that was never met is left to the fallback sampler (source "fallback").

    What is recent: a trajectory moves to the front when another source draws it; replaying it does not, or the buffer
    would feed on itself. Of a group that comes in, the first trajectory is the most recent one. What goes when the
    buffer is full: the ceil(`capacity` / 2) most recent trajectories stay, and of the others those with the highest
    log R, the more recent one where they are equal. One that comes without reward (log R = -inf) is not kept.

    Memory: 8 bytes a trajectory on the CPU, so 8 * `capacity` for each prompt that was met (26 MB for 100,000 prompts
    of 32), and about 100 bytes for its number; storage that is full is doubled. Under several processes each has
    its own buffers of the prompts it met: a prompt that another process meets in a later epoch starts there afresh, so
    what is replayed, unlike what the other samplers draw, depends on how rows are distributed. A training that resumes
    on as many processes goes on exactly as if undisturbed.

    Args:
        capacity: trajectories kept for each prompt.
        recent_share: share of the recent ones among the K; 0.5 as in TBA.
        temperature: > 0; of the draw by reward.
        fallback: sampler for prompts that have no buffer yet; by default the policy. It is not told what became of its
            trajectories (`observe`), so it should be one without a memory.
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
            raise TypeError(f"The fallback of ReplaySampler must be a Sampler, got {fallback!r}.")
        self.capacity, self.recent_share, self.temperature = capacity, recent_share, temperature
        self.fallback = OnPolicySampler() if fallback is None else fallback
        self._slots: dict[int, int] = {}  # row id -> row of the tensors below, numbered as the rows were met
        self._leaves = torch.full((0, capacity), -1, dtype=torch.int32)  # most recent first, -1 behind the last
        self._log_rewards = torch.zeros(0, capacity)
        self._stored = 0  # trajectories in all buffers

    @property
    def num_recent(self) -> int:
        """How many of a buffer's trajectories count as recent."""
        return math.ceil(self.capacity / 2)

    # ---------------------------------------------------------------------------------------------------------- draw
    def sample(
        self, step: Step, policy: TreePolicy, reward: StepReward | None, num_generations: int, noise: Noise
    ) -> Trajectories:
        device = step.device
        stored, log_rewards = (tensor.to(device) for tensor in self._buffers(step.row_ids.tolist()))
        met = (stored >= 0).any(1, keepdim=True)
        drawn, log_q = self._replay(stored, log_rewards, noise.uniform("replay", num_generations).to(device))
        source = torch.where(met, 0, 1).expand(-1, num_generations).contiguous()
        # If one process asks the fallback all do: it may call the model, and sharded engines wait for each other.
        if not over_processes((~met).any().long()):
            return Trajectories(drawn, source, log_q)
        other = self.fallback.sample(step, policy, reward, num_generations, noise)
        return Trajectories(
            torch.where(met, drawn, other.leaves),
            source,
            None if other.log_q is None else torch.where(met, log_q, other.log_q),
        )

    def _replay(self, stored: Tensor, log_rewards: Tensor, uniforms: Tensor) -> tuple[Tensor, Tensor]:
        """Draw from buffers `(B, C)`: leaves and log-probabilities `(B, K)`, without meaning where one is empty."""
        filled = stored >= 0
        filled[:, 0] = True  # an empty buffer gets a distribution too
        recent = filled & (torch.arange(self.capacity, device=filled.device) < self.num_recent)
        rewarded = (log_rewards / self.temperature).masked_fill(~filled, -torch.inf).softmax(1)
        split = math.ceil(uniforms.shape[1] * self.recent_share)
        parts = [draw_leaves(recent.float(), uniforms[:, :split]), draw_leaves(rewarded, uniforms[:, split:])]
        places = torch.cat([places for places, _ in parts], 1)
        return stored.gather(1, places), torch.cat([log_q for _, log_q in parts], 1)

    def _buffers(self, rows: list[int]) -> tuple[Tensor, Tensor]:
        """Leaves (long, -1 for none) and log R of some rows' buffers, `(n, C)` each."""
        slots = torch.tensor([self._slots.get(row, -1) for row in rows], dtype=torch.long)
        leaves = torch.full((len(rows), self.capacity), -1, dtype=torch.long)
        log_rewards = torch.zeros(len(rows), self.capacity)
        met = slots >= 0
        leaves[met] = self._leaves[slots[met]].long()
        log_rewards[met] = self._log_rewards[slots[met]]
        return leaves, log_rewards

    # --------------------------------------------------------------------------------------------------------- learn
    @torch.no_grad()
    def observe(self, step: Step, trajectories: Trajectories, feedback: Feedback) -> None:
        ids = step.row_ids.tolist()
        leaves, log_rewards = trajectories.leaves.cpu(), feedback.log_rewards.float().cpu()
        replayed = trajectories.source.cpu() == 0
        for places in _distinct_rounds(ids):
            rows = [ids[place] for place in places]
            old = self._buffers(rows)
            new = leaves[places], log_rewards[places]
            self._store(rows, *_merged(*_taken_in(*new, replayed[places], *old), self.capacity, self.num_recent))

    def _store(self, rows: list[int], leaves: Tensor, log_rewards: Tensor) -> None:
        for row in rows:
            self._slots.setdefault(row, len(self._slots))
        missing = len(self._slots) - len(self._leaves)
        if missing > 0:
            room = max(missing, len(self._leaves))
            self._leaves = torch.cat([self._leaves, torch.full((room, self.capacity), -1, dtype=torch.int32)])
            self._log_rewards = torch.cat([self._log_rewards, torch.zeros(room, self.capacity)])
        slots = torch.tensor([self._slots[row] for row in rows], dtype=torch.long)
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
                f"The saved replay buffer holds {capacity} trajectories a prompt, but capacity is {self.capacity}. "
                f"Set capacity to {capacity}, or start afresh."
            )
        self._slots = {row: slot for slot, row in enumerate(state["row_ids"].tolist())}
        self._leaves = state["leaves"].to("cpu", torch.int32, copy=True)
        self._log_rewards = state["log_rewards"].to("cpu", torch.float32, copy=True)
        self._stored = int((self._leaves >= 0).sum())

    def metrics(self) -> dict[str, float]:
        """`prompts` with a buffer, and the mean number of `trajectories` in it."""
        return {"prompts": float(len(self._slots)), "trajectories": self._stored / max(len(self._slots), 1)}


def _distinct_rounds(ids: list[int]) -> Iterator[list[int]]:
    """Places of a batch in rounds (nearly always one) in which no id comes twice, earlier places first."""
    waiting = list(range(len(ids)))
    while waiting:
        first = {ids[place]: place for place in reversed(waiting)}
        yield sorted(first.values())
        waiting = [place for place in waiting if first[ids[place]] != place]


def _taken_in(
    new: Tensor, new_log_rewards: Tensor, replayed: Tensor, old: Tensor, old_log_rewards: Tensor
) -> tuple[Tensor, Tensor]:
    """A group `(B, K)` put before buffers `(B, C)`: leaves and log R `(B, K + C)`, -1 for what does not count.

    A replayed trajectory keeps its place in the buffer and gets its new log R there.
    """
    known = (new[:, :, None] == old[:, None]) & replayed[:, :, None]
    latest = new_log_rewards.gather(1, known.float().argmax(1))
    old_log_rewards = torch.where(known.any(1), latest, old_log_rewards)
    leaves = torch.cat([new.masked_fill(known.any(2), -1), old], 1)
    return leaves, torch.cat([new_log_rewards, old_log_rewards], 1)


def _merged(leaves: Tensor, log_rewards: Tensor, capacity: int, num_recent: int) -> tuple[Tensor, Tensor]:
    """Leaves `(B, n)`, most recent first, cut to buffers `(B, capacity)` of distinct ones with a reward."""
    repeated = (leaves[:, :, None] == leaves[:, None]).tril(-1).any(2)
    present = (leaves >= 0) & ~repeated & log_rewards.isfinite()
    protected = present & (present.cumsum(1) <= num_recent)
    worth = log_rewards.masked_fill(~present, -torch.inf).masked_fill(protected, torch.inf)
    by_worth = worth.argsort(dim=1, descending=True, stable=True)[:, :capacity]
    kept = torch.zeros_like(present).scatter_(1, by_worth, True) & present
    order = (~kept).int().argsort(dim=1, stable=True)[:, :capacity]
    return leaves.masked_fill(~kept, -1).gather(1, order), log_rewards.masked_fill(~kept, 0.0).gather(1, order)
