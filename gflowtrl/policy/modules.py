"""Helpers to inspect wrapped models and to extend modules without changing their parameters."""

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
    """Return the model inside PEFT, DDP, DeepSpeed, FSDP and torch.compile wrappers, for inspection only.

    Calling it would bypass the wrappers.
    """
    while True:
        model = uncompiled(model)
        if hasattr(model, "get_base_model"):
            model = model.get_base_model()
        elif isinstance(getattr(model, "module", None), nn.Module):
            model = model.module
        else:
            return model


def forward_parameters(model: nn.Module) -> frozenset[str]:
    """Return the parameter names of the forward of the innermost model and of its base classes.

    The base classes count because a subclass with flow heads takes `**kwargs` and passes them on.
    """
    return _forward_parameters(type(innermost(model)))


@cache  # reading signatures takes longer than a small model's forward, and decoding needs the names at every token
def _forward_parameters(model_class: type[nn.Module]) -> frozenset[str]:
    forwards = [vars(base)["forward"] for base in model_class.__mro__ if "forward" in vars(base)]
    return frozenset(name for forward in forwards for name in inspect.signature(forward).parameters)


def cache_argument(model: nn.Module, cache: object) -> dict[str, object]:
    """Return the keyword argument for a decoder's cache, which transformers has renamed."""
    return {"cache" if "cache" in forward_parameters(model) else "past_key_values": cache}


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Context manager: all modules are in evaluation mode (no dropout). Each one's mode is restored afterwards."""
    training = [module for module in model.modules() if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True


def model_dtype(model: nn.Module) -> torch.dtype:
    """Return the dtype of the first floating-point parameter."""
    return next(p.dtype for p in model.parameters() if p.dtype.is_floating_point)


@torch.no_grad()
def copy_whole(value: Tensor, target: Tensor) -> None:
    """Copy a whole tensor into a tensor that FSDP2 may have sharded. Every process must call this."""
    value = value.to(target.device, target.dtype)
    if isinstance(target, DTensor):
        value = distribute_tensor(value, target.device_mesh, target.placements)
    target.copy_(value)


def mix_in(mixin: type, module: nn.Module) -> None:
    """Replace the module's class by a subclass of `mixin` and the original class, with the original name.

    The name stays the same so that the `architectures` in a checkpoint's configuration do.
    """
    original = type(module)
    module.__class__ = type(original.__name__, (mixin, original), {"__module__": original.__module__})
