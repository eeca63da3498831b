"""Samplers that choose from a pool of candidates which a collaborative model has scored."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from gflowtrl.checks import COUNT, check_choice, check_number
from gflowtrl.data import Step
from gflowtrl.policy import Noise, TreePolicy
from gflowtrl.policy.modules import evaluation_mode
from gflowtrl.rewards import StepReward
from gflowtrl.teachers import as_teacher, teacher_scores

from .observed import count_allowed, distinct_ranks, observed_leaves, skip_forbidden
from .sampler import Sampler, Trajectories, fill_missing
from .schedule import Schedule


if TYPE_CHECKING:
    from gflowtrl.catalog import Item, ItemCatalog
    from gflowtrl.teachers import Teacher


POOLS = ("random", "teacher")
EASY_TO_HARD = ((0.0, 0.0), (1.0, 1.0))


class CandidatePool:
    """Candidates that a row has not observed: neither in its history nor its target.

    Args:
        teacher: a `gflowtrl.teachers.Teacher`, or any callable `histories -> (B, items)` in the catalog's order.
        kind: "random", drawn uniformly, or "teacher", the teacher's best.
        size: candidates a row; None: 2 K + 1 for K wanted trajectories. With the ground truth as one more trajectory
            these are the 2 N - 1 candidates for N trajectories of GFlowGR.
        owner: the sampler that is named in errors.
    """

    def __init__(
        self, teacher: Teacher | Callable[[Sequence[Sequence[Item]]], Any], kind: str, size: int | None, owner: str
    ):
        check_choice(f"The pool of {owner}", kind, POOLS)
        check_number(f"The pool_size of {owner}", size, COUNT, optional=True)
        if not callable(teacher) and not hasattr(teacher, "score"):
            raise TypeError(f"{owner} needs a teacher or a callable histories -> (B, items), got {teacher!r}.")
        self.teacher, self.kind, self.size, self.owner = teacher, kind, size, owner
        self._catalog: ItemCatalog | None = None
        self._aligned: Teacher  # the teacher, its columns in the catalog's order

    @torch.no_grad()
    def candidates(self, step: Step, catalog: ItemCatalog, wanted: int, noise: Noise) -> Tensor:
        """Candidate leaves from the teacher's worst to its best: `(B, size)`, padded with -1 at the right."""
        size = min(2 * wanted + 1 if self.size is None else self.size, catalog.tree.num_leaves)
        if size < min(wanted, catalog.tree.num_leaves):
            raise ValueError(
                f"{self.owner} shall give {wanted} trajectories, but its pool_size is {size}. Raise it, or leave it "
                f"out for twice as many candidates as trajectories and one more."
            )
        scores = self._leaf_scores(step, catalog)
        observed = observed_leaves(step, catalog, self.owner)
        allowed = count_allowed(observed, catalog.tree.num_leaves, self.owner)
        if self.kind == "random":
            pool = distinct_ranks(allowed, noise.uniform("pool", size))
            missing = pool < 0
            pool = skip_forbidden(pool.clamp(min=0), observed)
        else:
            # One more column takes what only pads.
            marked = scores.new_zeros(len(scores), scores.shape[1] + 1, dtype=torch.bool)
            marked = marked.scatter_(1, observed.masked_fill(observed < 0, scores.shape[1]), True)[:, :-1]
            pool = scores.masked_fill(marked, -torch.inf).topk(size, 1).indices
            missing = marked.gather(1, pool)
        # One comparison decides: the missing behind all others, which come by score.
        order = scores.gather(1, pool).masked_fill(missing, torch.inf).argsort(dim=1, stable=True)
        return pool.masked_fill(missing, -1).gather(1, order)

    def _leaf_scores(self, step: Step, catalog: ItemCatalog) -> Tensor:
        """The teacher's score of each leaf, the highest among its items: `(B, N)`."""
        if catalog is not self._catalog:
            self._catalog, self._aligned = catalog, as_teacher(self.teacher, catalog.items)
        scores = teacher_scores(self._aligned, step, self.owner)
        return catalog.fold_items(scores.to(step.device), "max")


class CurriculumSampler(Sampler):
    """GFlowGR's collaborative curriculum: easy candidates early in the training, hard ones later.

    The M candidates of a row (drawn anew at each step) are sorted by the teacher's score, low ones are easy. The
    trajectories are K neighbors in this order, from place round(h (M - K)) on, where the hardness h follows the
    schedule: at h = 0 the K lowest, at h = 1 the K highest. `log_q` is not known with a random pool (how often a leaf
    comes depends on its rank among all) and 0 with the teacher's, where chance has no part. Where a row has fewer than
    K candidates they are repeated. Reads the column `history`.

    Args:
        teacher: a `gflowtrl.teachers.Teacher`, or any callable `histories -> (B, items)` in the catalog's order.
        pool_size: M; None: 2 K + 1.
        pool: "random": unobserved leaves drawn uniformly, so that hard ones are hard among random ones; "teacher": the
            teacher's best unobserved leaves, so that the easy ones already are plausible.
        schedule: hardness in [0, 1] over the progress of the training: `[[progress, hardness], ...]`, linear in
            between; by default h = progress.
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
            raise ValueError(f"The hardness in the schedule of CurriculumSampler must be in [0, 1], got {schedule!r}.")

    def sample(
        self, step: Step, policy: TreePolicy, reward: StepReward | None, num_generations: int, noise: Noise
    ) -> Trajectories:
        hardness = float(self.schedule.at(step.progress)[0])
        pool = self.pool.candidates(step, policy.catalog, num_generations, noise)
        room = ((pool >= 0).sum(1, keepdim=True) - num_generations).clamp(min=0)
        first = (hardness * room + 0.5).long()  # a half rounds up; torch.round would take it to the even number
        width = min(num_generations, pool.shape[1])
        chosen = pool.gather(1, first + torch.arange(width, device=pool.device))
        leaves = _filled_to(chosen, num_generations)
        known = self.pool.kind == "teacher"
        return Trajectories.of_one_source(leaves, torch.zeros(leaves.shape, device=leaves.device) if known else None)


class LowConfidenceSampler(Sampler):
    """Of the teacher's best unobserved leaves those that the policy thinks *least* probable (GFlowGR's variant).

    What the teacher recommends and the policy does not is where there is most to learn. Costs one forward of the
    policy with a branch per candidate. Nothing is drawn, so `log_q` is 0; the least probable come first. Where a row
    has fewer than K candidates they are repeated. Reads the column `history`.

    Args:
        teacher: a `gflowtrl.teachers.Teacher`, or any callable `histories -> (B, items)` in the catalog's order.
        pool_size: number of candidates; None: 2 K + 1.
    """

    source_names = ("low_confidence",)

    def __init__(self, teacher: Teacher | Callable[[Sequence[Sequence[Item]]], Any], pool_size: int | None = None):
        self.pool = CandidatePool(teacher, "teacher", pool_size, "LowConfidenceSampler")

    def sample(
        self, step: Step, policy: TreePolicy, reward: StepReward | None, num_generations: int, noise: Noise
    ) -> Trajectories:
        pool = self.pool.candidates(step, policy.catalog, num_generations, noise)
        with torch.no_grad(), evaluation_mode(policy.model):
            log_pi = policy.score(step.prompts, pool.clamp(min=0)).trajectory_log_probs
        order = log_pi.masked_fill(pool < 0, torch.inf).argsort(dim=1, stable=True)[:, :num_generations]
        leaves = _filled_to(pool.gather(1, order), num_generations)
        return Trajectories.of_one_source(leaves, torch.zeros(leaves.shape, device=leaves.device))


def _filled_to(leaves: Tensor, count: int) -> Tensor:
    """`(B, n <= count)` leaves, -1 at the end of a row for missing ones, repeated in turn to `(B, count)`."""
    return fill_missing(torch.nn.functional.pad(leaves, (0, count - leaves.shape[1]), value=-1))[0]
