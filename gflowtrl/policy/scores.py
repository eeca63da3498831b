"""What a policy says about trajectories."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

from torch import Tensor


@dataclass
class StepScores:
    """Tree-normalized scores of `K` trajectories for each of `B` prompts (`L` tokens an id, `C` children a node).

    Attributes:
        log_probs: `(B, K, L)` log-probability of each token taken, 0 where a shorter id has ended.
        child_log_probs: `(B, K, L, C)` the whole distribution at each visited state, -inf on padding.
        child_nodes: `(B, K, L, C)` the nodes that distribution is over, -1 on padding.
        lengths: `(B, K)` number of tokens of each trajectory.
        log_z: `(B,)` log Z(x), where the model carries that head.
        log_flows: `(B, K, L)` log F of the states s_0 .. s_{L-1}, where the model carries that head.
        vocabulary_log_probs: `(B, K, L)` log-probability of each token taken over the whole vocabulary, 0 where a
            shorter id has ended; where it was asked for.
        ref_log_probs, ref_vocabulary_log_probs: `(B, K, L)` what a reference model says of the same tokens, over the
            tree and over the whole vocabulary; where there is one.
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
        """The scores of some of the K trajectories."""
        given = {entry.name: getattr(self, entry.name) for entry in fields(self) if entry.name != "log_z"}
        return replace(self, **{name: None if value is None else value[:, columns] for name, value in given.items()})
