"""Looking into wrapped models, and teaching a module something without changing its parameters."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from gflowtrl.compat import uncompiled


def innermost(model: nn.Module) -> nn.Module:
    """The language model inside PEFT, DDP, DeepSpeed, FSDP and torch.compile wrappers: to look at, never to call."""
    while True:
        model = uncompiled(model)
        if hasattr(model, "get_base_model"):
            model = model.get_base_model()
        elif isinstance(getattr(model, "module", None), nn.Module):
            model = model.module
        else:
            return model


def forward_parameters(model: nn.Module) -> frozenset[str]:
    """Names of what the model inside all wrappers takes, in its own forward and in those of its base classes: a
    subclass with flow heads takes `**kwargs` and hands them on."""
    return _forward_parameters(type(innermost(model)))


@cache
def _forward_parameters(kind: type[nn.Module]) -> frozenset[str]:
    """Reading signatures takes longer than a small model's forward, and decoding asks at every token."""
    forwards = [vars(base)["forward"] for base in kind.__mro__ if "forward" in vars(base)]
    return frozenset(name for forward in forwards for name in inspect.signature(forward).parameters)


def cache_argument(model: nn.Module, cache: object) -> dict[str, object]:
    """The keyword of a decoder's cache, which transformers has renamed."""
    return {"cache" if "cache" in forward_parameters(model) else "past_key_values": cache}


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Within, no module trains (dropout is off); afterwards each does, or does not, as before."""
    training = [module for module in model.modules() if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True


def model_dtype(model: nn.Module) -> torch.dtype:
    return next(p.dtype for p in model.parameters() if p.dtype.is_floating_point)


@torch.no_grad()
def copy_whole(value: Tensor, target: Tensor) -> None:
    """Copy a whole tensor into one that FSDP2 may have split over processes, all of which must call this."""
    value = value.to(target.device, target.dtype)
    if isinstance(target, DTensor):
        value = distribute_tensor(value, target.device_mesh, target.placements)
    target.copy_(value)


def mix_in(mixin: type, module: nn.Module) -> None:
    """Make the module's class a subclass of `mixin` and of what it was, under the same name, so that what a checkpoint
    says of the model (`architectures`) stays as it was."""
    original = type(module)
    module.__class__ = type(original.__name__, (mixin, original), {"__module__": original.__module__})
