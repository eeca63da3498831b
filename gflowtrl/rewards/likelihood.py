"""How probable a recommender finds an item: a frozen one, or the one in training."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor, nn

from gflowtrl.catalog import ItemCatalog

from .base import Reward, column


if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class LikelihoodReward(Reward):
    """The probability (not its logarithm) of the leaf under a policy, normalised over the tree and without gradient.

    The recommender's own variant of r_y in GFlowGR (arXiv 2506.16114). The model runs in evaluation mode and is left
    as it was found.

    *Of a frozen model*, as a part of the sum, it keeps the fine-tuned one near the one it came from.

    *Of the policy in training* (no argument) the reward moves with the policy. In a sum r + w pi with exponent 1 the
    fixed point stays pi = r / Z, and the term only makes the way there slower. With an exponent above 1, or under
    "exp", it **sharpens**: what is likely becomes likelier. Alone it says nothing, as every policy is its own target.
    It reads `batch["policy"]`. For the very tensor of leaves `batch["policy_leaves"]` it takes
    `batch["policy_log_probs"]` and costs nothing; all leaves would cost a pass over the whole tree at every step, so
    exact flows are refused.

    Args:
        model_or_policy: a policy (an object with `score` and `leaf_log_probs`) over the same catalogue; or a causal or
            encoder-decoder model, which is then read as one; or None for the policy in training.
        catalog: of a model; the trainer supplies it where it is missing.
    """

    def __init__(self, model_or_policy: Any = None, catalog: ItemCatalog | None = None):
        super().__init__("likelihood")
        is_policy = hasattr(model_or_policy, "score") and hasattr(model_or_policy, "leaf_log_probs")
        self.policy = model_or_policy if is_policy else None
        self.model = None if is_policy else model_or_policy
        self.scores_all_items = model_or_policy is not None
        if catalog is not None:
            self.bind(catalog)

    def bind(
        self, catalog: ItemCatalog, tokenizer: PreTrainedTokenizerBase | None = None, leaf_reduction: str = "sum"
    ) -> Self:
        if self.policy is None and self.model is not None:
            from gflowtrl.policy import make_policy

            self.policy = make_policy(self.model, catalog)
        return super().bind(catalog, tokenizer, leaf_reduction)

    def score_items(self, batch: Mapping[str, Any]) -> Tensor:
        """`(B, items)`; items of one leaf share its probability, so that folding them gives it back."""
        self._bound_catalog()
        policy, prompts = self._policy(batch), self._prompts(batch)
        with frozen(getattr(policy, "model", None), prompts["input_ids"].device):
            return self._items_from_leaves(policy.leaf_log_probs(prompts).exp())

    def score_leaves(self, batch: Mapping[str, Any], leaves: Tensor) -> Tensor:
        self._bound_catalog()
        if self.policy is None and batch.get("policy_leaves") is leaves:
            return batch["policy_log_probs"].detach().exp()
        policy, prompts = self._policy(batch), self._prompts(batch)
        with frozen(getattr(policy, "model", None), prompts["input_ids"].device):
            return policy.score(prompts, leaves).log_probs.sum(-1).exp()

    def _policy(self, batch: Mapping[str, Any]) -> Any:
        if self.policy is not None:
            return self.policy
        if "policy" not in batch:
            raise ValueError(
                f"Reward {self.__name__!r} without a model is the likelihood under the policy in training, but the "
                f"batch has no 'policy'. GFlowNetTrainer puts it there; elsewhere give the reward a frozen model."
            )
        return batch["policy"]

    def _prompts(self, batch: Mapping[str, Any]) -> Mapping[str, Tensor]:
        """The batch's prompts; as text (the TRL signature) they are tokenised again."""
        prompts = column(batch, "prompts", self.__name__)
        if isinstance(prompts, Mapping):
            return prompts
        if self.tokenizer is None:
            raise ValueError(
                f"Reward {self.__name__!r} needs the tokenizer to read prompts; bind(catalog, tokenizer)."
            )
        return self.tokenizer(
            prompts, add_special_tokens=False, padding=True, padding_side="left", return_tensors="pt"
        ).to(self._bound_catalog().device)


@contextmanager
def frozen(model: Any, device: torch.device) -> Iterator[None]:
    """No gradients, no dropout, on the batch's device; afterwards every module trains (or not) as before."""
    modules = [m for m in model.modules() if m.training] if isinstance(model, nn.Module) else []
    if isinstance(model, nn.Module) and next(model.parameters()).device != device:
        model.to(device)
    for module in modules:
        module.training = False
    try:
        with torch.no_grad():
            yield
    finally:
        for module in modules:
            module.training = True
