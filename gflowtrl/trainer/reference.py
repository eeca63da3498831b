"""A reference model as a prior: the target is proportional to `pi_ref(leaf | x)^weight * R(x, leaf)`."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import Tensor, nn
from transformers import PreTrainedModel

from gflowtrl.catalog import ItemCatalog
from gflowtrl.compat import empty_model_like, prepare_deepspeed, prepare_fsdp
from gflowtrl.policy import Prompts, StepScores, TreePolicy, load_backbone, make_policy
from gflowtrl.policy.modules import evaluation_mode

from .input_checks import check_model


class ReferencePrior:
    """`weight * log pi_ref(leaf | x)`, which is added to log R in every balance loss.

    With weight 1 the target is the posterior `pi_ref * R / Z` that language models are usually tuned to; with constant
    R it is pi_ref. pi_ref is normalized over the tree and computed without gradient and without dropout.

    Args:
        weight: exponent of pi_ref, > 0.
        catalog: the items.
        model: the reference model, which is frozen. None: the trained model with its adapters disabled.

    Raises:
        ValueError: the model does not fit the catalog.
    """

    def __init__(self, weight: float, catalog: ItemCatalog, model: PreTrainedModel | None = None):
        self.weight, self.catalog = weight, catalog
        self.model: Any = model  # may be wrapped by an engine
        self._accelerator: Accelerator
        if model is not None:
            check_model(model, catalog)
            model.requires_grad_(False).eval()

    def prepare(self, accelerator: Accelerator) -> None:
        """Move a separate reference model to the device, or shard it, as TRL does."""
        self._accelerator = accelerator
        if self.model is None:
            return
        if accelerator.distributed_type == DistributedType.DEEPSPEED:
            self.model = prepare_deepspeed(self.model, accelerator)
        elif accelerator.distributed_type == DistributedType.FSDP:
            self.model = prepare_fsdp(self.model, accelerator)
        else:
            self.model = accelerator.prepare_model(self.model, evaluation_mode=True)

    def score(self, trained: nn.Module, prompts: Prompts, leaves: Tensor) -> Tensor:
        """Return the prior of `leaves (B, K)`, from one packed forward: `(B, K)`. `trained` is the trained model."""
        return self.weight * self.token_scores(trained, prompts, leaves).trajectory_log_probs

    @torch.no_grad()
    def token_scores(
        self, trained: nn.Module, prompts: Prompts, leaves: Tensor, vocabulary: bool = False
    ) -> StepScores:
        """Return the reference's scores of the tokens of `leaves (B, K)`, without the weight (`TreePolicy.score`)."""
        with self._policy(trained) as policy:
            return policy.score(prompts, leaves, vocabulary)

    @torch.no_grad()
    def score_all(self, trained: nn.Module, prompts: Prompts) -> Tensor:
        """Return the prior of all leaves: `(B, N)`."""
        with self._policy(trained) as policy:
            return self.weight * policy.leaf_log_probs(prompts)

    @contextmanager
    def _policy(self, trained: nn.Module) -> Iterator[TreePolicy]:
        """Context manager: the reference as a policy."""
        if self.model is not None:
            yield make_policy(self.model, self.catalog)
            return
        adapted: Any = self._accelerator.unwrap_model(trained)
        with evaluation_mode(trained), adapted.disable_adapter():
            yield make_policy(trained, self.catalog)


def build_prior(
    weight: float,
    catalog: ItemCatalog,
    ref_model: str | PreTrainedModel | None,
    model: PreTrainedModel,
    adapters: bool,
    needed: bool = False,
    **model_kwargs: Any,
) -> ReferencePrior | None:
    """Create the prior from a trainer's arguments; None if no reference is needed.

    Args:
        weight: `ref_weight`; 0 for no prior.
        ref_model: the reference model, or its name or folder. None: the model before training, which is the trained
            model without its adapters, or a copy if it has no adapters (as in TRL's DPOTrainer).
        model: the model to train, before adapters are added.
        adapters: whether adapters will be added.
        needed: whether a loss compares the policy with the reference, which then exists without a weight too.
        model_kwargs: keyword arguments of `from_pretrained` for a reference given by name.

    Raises:
        ValueError: a reference model without a weight, or the trained model as its own reference.
    """
    if not weight and not needed:
        if ref_model is not None:
            raise ValueError(
                "ref_model was given, but ref_weight is 0, so it would not be used. Set ref_weight to the exponent of "
                "pi_ref in the target (for example 1), or leave ref_model out."
            )
        return None
    if ref_model is model:
        raise ValueError(
            "ref_model is the model to train, so the reference would change with it. Leave ref_model out to use the "
            "model before training as the reference."
        )
    if isinstance(ref_model, str):
        ref_model = load_backbone(ref_model, **model_kwargs)
    elif ref_model is None and not adapters:
        ref_model = _copy(model)
    return ReferencePrior(weight, catalog, ref_model)


@torch.no_grad()
def _copy(model: PreTrainedModel) -> PreTrainedModel:
    """Copy a model. The copy of a model that ZeRO-3 has loaded in shards has the same shards."""
    if not any(hasattr(parameter, "ds_tensor") for parameter in model.parameters()):
        return copy.deepcopy(model)
    other = empty_model_like(model, copy.deepcopy(model.config))
    for parameter, copied in zip(model.parameters(), other.parameters(), strict=True):
        getattr(copied, "ds_tensor").copy_(getattr(parameter, "ds_tensor"))  # noqa: B009 - DeepSpeed's attribute
    return other
