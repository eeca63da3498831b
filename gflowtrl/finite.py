"""Checks for values that are not finite (NaN or infinity) in weights, probabilities and losses."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor


HALVES = (torch.float16, torch.bfloat16)
CHECKED = (*HALVES, torch.float32, torch.float64)  # quantized weights are integers, or have no order


class NonFiniteError(ValueError):
    """Weights, probabilities or losses are NaN or infinite."""


@torch.no_grad()
def find_nonfinite(tensors: Iterable[tuple[str, Tensor]]) -> str | None:
    """Return the name of the first tensor that holds NaN or infinity, or None.

    The smallest and the largest value of a tensor are finite if and only if all values are. They need one pass and no
    copy: about .3 s for a billion float32 values on one CPU thread. Accelerators are synchronized once. Of a tensor
    that is sharded over processes (FSDP2, ZeRO-3), only the shard of this process is read.
    """
    names: list[str] = []
    finite: list[Tensor] = []
    for name, tensor in tensors:
        values = local_shard(tensor).detach()
        if values.dtype in CHECKED and values.numel() and values.device.type != "meta":
            names.append(name)
            finite.append(torch.isfinite(torch.stack(torch.aminmax(values))).all())
    if not names:
        return None
    flags = torch.stack([flag.to(finite[0].device) for flag in finite]).tolist()
    return next((name for name, flag in zip(names, flags, strict=True) if not flag), None)


def find_nonfinite_weight(model: nn.Module) -> str | None:
    """Return the name of the first parameter that holds NaN or infinity, or None."""
    return find_nonfinite(model.named_parameters())


def check_tensors(tensors: Mapping[str, Tensor], source: object) -> None:
    """Check that tensors that were read from a file are finite.

    Args:
        tensors: the tensors by name.
        source: the file or folder, named in the error.

    Raises:
        NonFiniteError: names the source and the first tensor that holds NaN or infinity.
    """
    if (name := find_nonfinite(tensors.items())) is not None:
        raise NonFiniteError(
            f"{source} holds NaN or infinity in {name!r}: the training that wrote it diverged, or the file is "
            f"damaged. Use an earlier one."
        )


def check_weights(model: nn.Module) -> None:
    """Check that the weights of a model are finite.

    Args:
        model: bare or wrapped. Of a sharded model, only the shards of this process are read.

    Raises:
        NonFiniteError: names the model and the first weight that holds NaN or infinity.
    """
    if (weight := find_nonfinite_weight(model)) is not None:
        raise NonFiniteError(
            f"{describe(model)} has NaN or infinity in its weight {weight!r}: its training diverged, or its "
            f"files are damaged. Use an earlier checkpoint, or train again with a lower learning rate."
        )


def check_ranked(leaves: Tensor, log_probs: Tensor, model: nn.Module) -> None:
    """Check that the log-probabilities of ranked leaves are finite.

    Args:
        leaves: `(B, n)`, padded with -1. On padding, log-probabilities may be infinite.
        log_probs: `(B, n)` log-probabilities of the leaves.
        model: the model that computed them.

    Raises:
        NonFiniteError: names the model and, if a weight is not finite, the first such weight.
    """
    if bool(bad_ranking(leaves, log_probs)):
        check_weights(model)
        dtype = next((str(p.dtype) for p in model.parameters() if p.dtype.is_floating_point), "")
        raise NonFiniteError(
            f"{describe(model)} computes probabilities that are not finite, although its weights are finite: its "
            f"activations overflow in {dtype.removeprefix('torch.')}. Load it in a wider dtype (dtype='float32')."
        )


def bad_ranking(leaves: Tensor, log_probs: Tensor) -> Tensor:
    """Return whether any leaf has a log-probability that is not finite: a boolean scalar, on the leaves' device."""
    return (~torch.isfinite(log_probs) & (leaves >= 0)).any() | torch.isnan(log_probs).any()


def describe(model: nn.Module) -> str:
    """Return the subject of a sentence about a model: where it was loaded from, or its class."""
    while isinstance(inner := getattr(model, "module", None), nn.Module):
        model = inner
    return f"The model {name}" if (name := getattr(model, "name_or_path", "")) else f"The {type(model).__name__}"


def local_shard(tensor: Tensor) -> Tensor:
    """Return this process's shard of a tensor that FSDP2 or ZeRO-3 shards; any other tensor unchanged."""
    tensor = getattr(tensor, "ds_tensor", tensor)  # ZeRO-3
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
