"""A reward from the likelihood of an item under a recommender: a frozen one or the one in training."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor, nn

from gflowtrl.catalog import ItemCatalog
from gflowtrl.checks import check_choice
from gflowtrl.data import Step
from gflowtrl.policy import TreePolicy, make_policy
from gflowtrl.policy.modules import evaluation_mode

from .reward import Reward


if TYPE_CHECKING:
    from .from_spec import RewardContext


class LikelihoodReward(Reward):
    """The probability (not its logarithm) of the leaf under a policy, normalized over the tree and without gradient.

    This is the recommender's variant of r_y in GFlowGR (arXiv 2506.16114). The model runs in evaluation mode; its
    previous mode is restored afterwards.

    *Frozen model*: as a term of the sum, the reward keeps the fine-tuned model close to the frozen one.

    *Policy in training* (no argument): the reward changes with the policy. In a sum r + w pi with exponent 1, the
    fixed point is still pi = r / Z, and the term only slows down convergence. With an exponent above 1, or with the
    transform "exp", the term **sharpens** the policy: likely items become more likely. On its own, this reward gives
    no signal, because every policy is its own target. Only drawn leaves are scored, since scoring all leaves would
    cost a pass over the whole tree at every step. Exact flows therefore raise an error.

    Args:
        model_or_policy: a policy over the same catalog; or a causal or encoder-decoder model, from which a policy is
            made; or None for the policy in training.

    Raises:
        TypeError: `model_or_policy` is neither a policy nor a model.
    """

    reads_prompts = True
    reads_target = False

    def __init__(self, model_or_policy: TreePolicy | nn.Module | None = None):
        super().__init__("likelihood")
        self.policy: TreePolicy | None = model_or_policy if isinstance(model_or_policy, TreePolicy) else None
        self.model = model_or_policy if isinstance(model_or_policy, nn.Module) else None
        if model_or_policy is not None and self.policy is None and self.model is None:
            raise TypeError(
                f"LikelihoodReward got {type(model_or_policy).__name__}; it needs a model or a TreePolicy. Load a "
                f"model by its name or folder with gflowtrl.policy.load_backbone."
            )
        self.scores_all_items = model_or_policy is not None
        self.reads_policy = model_or_policy is None

    def _prepare(self, catalog: ItemCatalog) -> None:
        if self.policy is None and self.model is not None:
            self.policy = make_policy(self.model, catalog)

    def score_items(self, step: Step) -> Tensor:
        """Return `(B, items)`. Items at one leaf share its probability, so that folding them restores it."""
        self._bound_catalog()
        with self._frozen_policy(step.device) as policy:
            return self._items_from_leaves(policy.leaf_log_probs(step.prompts).exp())

    def score_leaves(self, step: Step, leaves: Tensor, policy_log_probs: Tensor | None = None) -> Tensor:
        """Return `(B, K)`. `policy_log_probs (B, K)` is log pi of the leaves under the policy in training."""
        self._bound_catalog()
        if self.policy is None and policy_log_probs is not None:
            return policy_log_probs.detach().exp()
        with self._frozen_policy(step.device) as policy:
            return policy.score(step.prompts, leaves).log_probs.sum(-1).exp()

    @contextmanager
    def _frozen_policy(self, device: torch.device) -> Iterator[TreePolicy]:
        if self.policy is None:
            raise ValueError(
                f"{self._owner} has neither a model nor a policy in training. GFlowNetTrainer passes the policy; "
                f"outside of this trainer, give the reward a frozen model."
            )
        with frozen(getattr(self.policy, "model", None), device):
            yield self.policy

    @classmethod
    def option_names(cls) -> set[str]:
        return {"of"}

    @classmethod
    def check_spec(cls, spec: Mapping[str, Any]) -> None:
        check_choice("of", spec.get("of", "sft"), ("sft", "policy"))

    @classmethod
    def needs(cls, spec: Mapping[str, Any]) -> set[str]:
        return {"policy"} if spec.get("of") == "policy" else {"sft_model"}

    @classmethod
    def from_spec(cls, spec: Mapping[str, Any], context: RewardContext) -> Self:
        return cls(None if spec.get("of") == "policy" else context.sft_model())


@contextmanager
def frozen(model: nn.Module | None, device: torch.device) -> Iterator[None]:
    """Context manager: run a model without gradient or dropout on a device, then restore each module's mode.

    The model stays on the device.
    """
    if model is not None and next(model.parameters()).device != device:
        model.to(device)
    with torch.no_grad(), nullcontext() if model is None else evaluation_mode(model):
        yield
