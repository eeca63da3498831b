"""The scores that a policy gives trajectories."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

from torch import Tensor


@dataclass
class StepScores:
    """Tree-normalized scores of `K` trajectories for each of `B` prompts (`L` tokens per id, `C` children per node).

    Attributes:
        log_probs: `(B, K, L)` log-probability of each token taken, 0 after the end of a shorter id.
        child_log_probs: `(B, K, L, C)` the whole distribution at each visited state, -inf on padding.
        child_nodes: `(B, K, L, C)` the child nodes of that distribution, -1 on padding.
        lengths: `(B, K)` number of tokens of each trajectory.
        log_z: `(B,)` log Z(x). None: the model has no flow heads.
        log_flows: `(B, K, L)` log F of the states s_0 .. s_{L-1}. None: the model has no flow heads.
        vocabulary_log_probs: `(B, K, L)` log-probability of each token taken over the whole vocabulary, 0 after the
            end of a shorter id. None: not requested.
        ref_log_probs, ref_vocabulary_log_probs: `(B, K, L)` log-probabilities of the same tokens under a reference
            model, over the tree and over the whole vocabulary. None: no reference model.
    """

    log_probs: Tensor
    child_log_probs: Tensor
    child_nodes: Tensor
    lengths: Tensor
    log_z: Tensor | None = None
    log_flows: Tensor | None = None
    vocabulary_log_probs: Tensor | None = None
    ref_log_probs: Tensor | None = None
    ref_vocabulary_log_probs: Tensor | None = None

    @property
    def trajectory_log_probs(self) -> Tensor:
        """`(B, K)` log pi(leaf | x)."""
        return self.log_probs.sum(-1)

    def of_trajectories(self, columns: slice) -> StepScores:
        """Return the scores of some of the K trajectories."""
        values = {entry.name: getattr(self, entry.name) for entry in fields(self) if entry.name != "log_z"}
        return replace(self, **{name: None if value is None else value[:, columns] for name, value in values.items()})
