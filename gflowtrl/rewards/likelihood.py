"""How probable a frozen language model finds an item."""

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
    """The probability (not its logarithm) of the leaf under a frozen policy, normalised over the tree.

    As a part of the sum it keeps the fine-tuned model near the one it came from (the language-model variant of r_y in
    GFlowGR, arXiv 2506.16114). The model runs in evaluation mode and without gradients, and is left as it was found.

    Args:
        model_or_policy: a policy (an object with `score` and `leaf_log_probs`) over the same catalogue, or a causal
            model, which is then read as a `CausalTreePolicy`.
        catalog: of a model; the trainer supplies it where it is missing.
    """

    def __init__(self, model_or_policy: Any, catalog: ItemCatalog | None = None):
        super().__init__("likelihood")
        is_policy = hasattr(model_or_policy, "score") and hasattr(model_or_policy, "leaf_log_probs")
        self.policy = model_or_policy if is_policy else None
        self.model = getattr(model_or_policy, "model", None) if is_policy else model_or_policy
        if catalog is not None:
            self.bind(catalog)

    def bind(
        self, catalog: ItemCatalog, tokenizer: PreTrainedTokenizerBase | None = None, leaf_reduction: str = "sum"
    ) -> Self:
        if self.policy is None:
            from gflowtrl.policy import CausalTreePolicy

            self.policy = CausalTreePolicy(self.model, catalog)
        return super().bind(catalog, tokenizer, leaf_reduction)

    def score_items(self, batch: Mapping[str, Any]) -> Tensor:
        """`(B, items)`; items of one leaf share its probability, so that folding them gives it back."""
        catalog = self._bound_catalog()
        prompts = self._prompts(batch)
        with _frozen(self.model, prompts["input_ids"].device):
            probability = self.policy.leaf_log_probs(prompts).exp()
        if self.leaf_reduction == "sum":
            probability = probability / catalog.leaf_sizes.to(probability.device)
        return probability[:, catalog.item_leaf.to(probability.device)]

    def score_leaves(self, batch: Mapping[str, Any], leaves: Tensor) -> Tensor:
        self._bound_catalog()
        prompts = self._prompts(batch)
        with _frozen(self.model, prompts["input_ids"].device):
            return self.policy.score(prompts, leaves).log_probs.sum(-1).exp()

    def _prompts(self, batch: Mapping[str, Any]) -> Mapping[str, Tensor]:
        """The batch's prompts; as text (the TRL signature) they are tokenised again."""
        prompts = column(batch, "prompts", self.__name__)
        if isinstance(prompts, Mapping):
            return prompts
        if self.tokenizer is None:
            raise ValueError(
                f"Reward {self.__name__!r} needs the tokenizer to read prompts; bind(catalog, tokenizer)."
            )
        device = self.policy.catalog.device if hasattr(self.policy, "catalog") else None
        return self.tokenizer(
            prompts, add_special_tokens=False, padding=True, padding_side="left", return_tensors="pt"
        ).to(device or "cpu")


@contextmanager
def _frozen(model: Any, device: torch.device) -> Iterator[None]:
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
