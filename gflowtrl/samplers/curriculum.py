"""Samplers that select from a pool of candidates scored by a collaborative model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from gflowtrl.catalog import Item, ItemCatalog
from gflowtrl.checks import COUNT, check_choice, check_number
from gflowtrl.data import Step
from gflowtrl.policy import Noise, TreePolicy
from gflowtrl.policy.modules import evaluation_mode
from gflowtrl.rewards import StepReward
from gflowtrl.rewards.exclusion import as_mask
from gflowtrl.teachers import Teacher, as_teacher, teacher_scores

from .leaf_sets import count_allowed, distinct_ranks, observed_leaves, skip_forbidden
from .sampler import Sampler, Trajectories, fill_missing
from .schedule import Schedule


POOLS = ("random", "teacher")
EASY_TO_HARD = ((0.0, 0.0), (1.0, 1.0))


class CandidatePool:
    """Candidates that are unobserved: neither in the history of the row nor its target.

    Args:
        teacher: a `gflowtrl.teachers.Teacher`, or any callable `histories -> (B, items)` in the catalog's order.
        kind: "random" for uniform draws, or "teacher" for the best items of the teacher.
        size: candidates per row. None: 2 K + 1 for K trajectories. If the ground truth is one more trajectory, this
            equals the 2 N - 1 candidates for N trajectories of GFlowGR.
        owner: name of the sampler in errors.
    """

    def __init__(
        self, teacher: Teacher | Callable[[Sequence[Sequence[Item]]], Any], kind: str, size: int | None, owner: str
    ):
        check_choice(f"The pool of {owner}", kind, POOLS)
        check_number(f"The pool_size of {owner}", size, COUNT, optional=True)
        if not callable(teacher) and not hasattr(teacher, "score"):
            raise TypeError(f"The teacher of {owner} is {teacher!r}; it must be a Teacher or a callable.")
        self.teacher, self.kind, self.size, self.owner = teacher, kind, size, owner
        self._catalog: ItemCatalog | None = None
        self._aligned: Teacher  # the teacher with its columns in the catalog's order

    @torch.no_grad()
    def candidates(
        self, step: Step, catalog: ItemCatalog, reward: StepReward | None, num_trajectories: int, noise: Noise
    ) -> Tensor:
        """Return candidate leaves in ascending order of the teacher's score: `(B, size)`, padded with -1 on the right.

        Raises:
            ValueError: the pool has fewer candidates than trajectories, or a row has no unobserved leaf.
        """
        size = min(2 * num_trajectories + 1 if self.size is None else self.size, catalog.tree.num_leaves)
        if size < min(num_trajectories, catalog.tree.num_leaves):
            raise ValueError(
                f"The pool_size of {self.owner} is {size}; it must be at least {num_trajectories}, the number of "
                f"trajectories. Raise it, or omit it for the default of 2 K + 1 candidates for K trajectories."
            )
        scores = self._leaf_scores(step, catalog)
        observed = observed_leaves(step, catalog, reward, self.owner)
        allowed = count_allowed(observed, catalog.tree.num_leaves, self.owner)
        if self.kind == "random":
            pool = distinct_ranks(allowed, noise.uniform("pool", size))
            missing = pool < 0
            pool = skip_forbidden(pool.clamp(min=0), observed)
        else:
            is_observed = as_mask(observed, scores.shape[1])
            pool = scores.masked_fill(is_observed, -torch.inf).topk(size, 1).indices
            missing = is_observed.gather(1, pool)
        # A single sort by score; missing candidates go to the end.
        order = scores.gather(1, pool).masked_fill(missing, torch.inf).argsort(dim=1, stable=True)
        return pool.masked_fill(missing, -1).gather(1, order)

    def _leaf_scores(self, step: Step, catalog: ItemCatalog) -> Tensor:
        """Return the teacher's score of each leaf, which is the highest score of its items: `(B, N)`."""
        if catalog is not self._catalog:
            self._catalog, self._aligned = catalog, as_teacher(self.teacher, catalog.items)
        scores = teacher_scores(self._aligned, step, self.owner)
        return catalog.fold_items(scores.to(step.device), "max")


class CurriculumSampler(Sampler):
    """GFlowGR's collaborative curriculum: easy candidates early in training, hard candidates later.

    The M candidates of a row, drawn again at each step, are sorted by the teacher's score; low scores are easy. The
    trajectories are K consecutive candidates, starting at position round(h (M - K)). The hardness h follows the
    schedule: h = 0 selects the K lowest scores, h = 1 the K highest. With a random pool, `log_q` is unknown, because
    the probability of a leaf depends on its rank among all leaves. With the teacher's pool, the selection is
    deterministic and `log_q` is 0. If a row has fewer than K candidates, they are repeated. Reads the column
    `history`.

    Args:
        teacher: a `gflowtrl.teachers.Teacher`, or any callable `histories -> (B, items)` in the catalog's order.
        pool_size: M. None: 2 K + 1.
        pool: "random" for unobserved leaves drawn uniformly, so that candidates are hard relative to random leaves, or
            "teacher" for the best unobserved leaves of the teacher, so that even easy candidates are plausible.
        schedule: hardness in [0, 1] as a function of training progress: `[[progress, hardness], ...]`, interpolated
            linearly. By default h = progress.
    """

    source_names = ("curriculum",)

    def __init__(
        self,
        teacher: Teacher | Callable[[Sequence[Sequence[Item]]], Any],
        pool_size: int | None = None,
        pool: str = "random",
        schedule: Sequence[tuple[float, float]] = EASY_TO_HARD,
    ):
        self.pool = CandidatePool(teacher, pool, pool_size, "CurriculumSampler")
        self.schedule = Schedule(schedule, "CurriculumSampler")
        if self.schedule.values.shape[1] != 1 or not ((self.schedule.values >= 0) & (self.schedule.values <= 1)).all():
            raise ValueError(f"The schedule of CurriculumSampler is {schedule!r}; its hardness must be in [0, 1].")

    def sample(
        self, step: Step, policy: TreePolicy, reward: StepReward | None, num_generations: int, noise: Noise
    ) -> Trajectories:
        hardness = float(self.schedule.at(step.progress)[0])
        pool = self.pool.candidates(step, policy.catalog, reward, num_generations, noise)
        last_start = ((pool >= 0).sum(1, keepdim=True) - num_generations).clamp(min=0)
        start = (hardness * last_start + 0.5).long()  # rounds halves up; torch.round would round them to even
        width = min(num_generations, pool.shape[1])
        leaves = _repeat_to(pool.gather(1, start + torch.arange(width, device=pool.device)), num_generations)
        deterministic = self.pool.kind == "teacher"
        return Trajectories.of_one_source(
            leaves, torch.zeros_like(leaves, dtype=torch.float) if deterministic else None
        )


class LowConfidenceSampler(Sampler):
    """The leaves with the *lowest* probability under the policy among the best unobserved leaves of the teacher.

    A variant of GFlowGR. There is most to learn where the teacher recommends an item and the policy does not. The cost
    is one forward pass of the policy with one branch per candidate. The selection is deterministic, so `log_q` is 0.
    The least probable leaf comes first. If a row has fewer than K candidates, they are repeated. Reads the column
    `history`.

    Args:
        teacher: a `gflowtrl.teachers.Teacher`, or any callable `histories -> (B, items)` in the catalog's order.
        pool_size: number of candidates. None: 2 K + 1.
    """

    source_names = ("low_confidence",)

    def __init__(self, teacher: Teacher | Callable[[Sequence[Sequence[Item]]], Any], pool_size: int | None = None):
        self.pool = CandidatePool(teacher, "teacher", pool_size, "LowConfidenceSampler")

    def sample(
        self, step: Step, policy: TreePolicy, reward: StepReward | None, num_generations: int, noise: Noise
    ) -> Trajectories:
        pool = self.pool.candidates(step, policy.catalog, reward, num_generations, noise)
        with torch.no_grad(), evaluation_mode(policy.model):
            log_pi = policy.score(step.prompts, pool.clamp(min=0)).trajectory_log_probs
        order = log_pi.masked_fill(pool < 0, torch.inf).argsort(dim=1, stable=True)[:, :num_generations]
        leaves = _repeat_to(pool.gather(1, order), num_generations)
        return Trajectories.of_one_source(leaves, torch.zeros_like(leaves, dtype=torch.float))


def _repeat_to(leaves: Tensor, count: int) -> Tensor:
    """Repeat the leaves `(B, n <= count)` of each row, which may end with -1 for missing ones, to `(B, count)`."""
    return fill_missing(torch.nn.functional.pad(leaves, (0, count - leaves.shape[1]), value=-1))[0]
