"""How probable a recommender finds an item: a frozen one, or the one in training."""

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

    The recommender's own variant of r_y in GFlowGR (arXiv 2506.16114). The model runs in evaluation mode and is left
    as it was found.

    *Of a frozen model*, as a part of the sum, it keeps the fine-tuned one near the one it came from.

    *Of the policy in training* (no argument) the reward moves with the policy. In a sum r + w pi with exponent 1 the
    fixed point stays pi = r / Z, and the term only makes the way there slower. With an exponent above 1, or under
    "exp", it **sharpens**: what is likely becomes likelier. Alone it says nothing, as every policy is its own target.
    It is known of drawn leaves only: all leaves would cost a pass over the whole tree at every step, so exact flows
    are refused.

    Args:
        model_or_policy: a policy over the same catalog; or a causal or encoder-decoder model, which is then read as
            one; or None for the policy in training.
        catalog: of a model; the trainer supplies it where it is missing.

    Raises:
        TypeError: something else than a policy or a model.
    """

    reads_prompts = True
    reads_target = False

    def __init__(self, model_or_policy: TreePolicy | nn.Module | None = None, catalog: ItemCatalog | None = None):
        super().__init__("likelihood")
        self.policy: TreePolicy | None = model_or_policy if isinstance(model_or_policy, TreePolicy) else None
        self.model = model_or_policy if isinstance(model_or_policy, nn.Module) else None
        if model_or_policy is not None and self.policy is None and self.model is None:
            raise TypeError(
                f"LikelihoodReward reads a model or a TreePolicy, not {type(model_or_policy).__name__}; load a name "
                f"or folder with gflowtrl.policy.load_backbone."
            )
        self.scores_all_items = model_or_policy is not None
        self.reads_policy = model_or_policy is None
        if catalog is not None:
            self.bind(catalog)

    def _prepare(self, catalog: ItemCatalog) -> None:
        if self.policy is None and self.model is not None:
            self.policy = make_policy(self.model, catalog)

    def score_items(self, step: Step) -> Tensor:
        """`(B, items)`; items of one leaf share its probability, so that folding them gives it back."""
        self._bound_catalog()
        with self._frozen_policy(step.device) as policy:
            return self._items_from_leaves(policy.leaf_log_probs(step.prompts).exp())

    def score_leaves(self, step: Step, leaves: Tensor, policy_log_probs: Tensor | None = None) -> Tensor:
        """`(B, K)`; `policy_log_probs (B, K)` is log pi of the leaves under the policy in training."""
        self._bound_catalog()
        if self.policy is None and policy_log_probs is not None:
            return policy_log_probs.detach().exp()
        with self._frozen_policy(step.device) as policy:
            return policy.score(step.prompts, leaves).log_probs.sum(-1).exp()

    @contextmanager
    def _frozen_policy(self, device: torch.device) -> Iterator[TreePolicy]:
        if self.policy is None:
            raise ValueError(
                f"{self._owner} without a model is the likelihood under the policy in training, which nobody has "
                f"given. GFlowNetTrainer does; elsewhere give the reward a frozen model."
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
    """No gradients, no dropout, on the batch's device; afterwards every module trains (or not) as before."""
    if model is not None and next(model.parameters()).device != device:
        model.to(device)
    with torch.no_grad(), nullcontext() if model is None else evaluation_mode(model):
        yield
