"""Values that are not finite (NaN, infinity): an error names them, wherever they would be ranked or trained on."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor


HALVES = (torch.float16, torch.bfloat16)
CHECKED = (*HALVES, torch.float32, torch.float64)  # quantized weights are whole numbers, or have no order


class NonFiniteError(ValueError):
    """Weights, probabilities or losses are NaN or infinite."""


@torch.no_grad()
def find_nonfinite(tensors: Iterable[tuple[str, Tensor]]) -> str | None:
    """The name of the first tensor that holds NaN or infinity, or None.

    The least and the greatest value of a tensor are finite if and only if all are, and cost one pass without a copy:
    about .3 s for a billion float32 on one CPU thread. Accelerators are waited for once. Of a tensor that is split
    over processes (FSDP2, ZeRO-3) the part of this process is read.
    """
    names: list[str] = []
    finite: list[Tensor] = []
    for name, tensor in tensors:
        values = own_part(tensor).detach()
        if values.dtype in CHECKED and values.numel() and values.device.type != "meta":
            names.append(name)
            finite.append(torch.isfinite(torch.stack(torch.aminmax(values))).all())
    if not names:
        return None
    together = torch.stack([good.to(finite[0].device) for good in finite]).tolist()
    return next((name for name, good in zip(names, together, strict=True) if not good), None)


def find_nonfinite_weight(model: nn.Module) -> str | None:
    """The name of the first parameter that holds NaN or infinity, or None."""
    return find_nonfinite(model.named_parameters())


def check_tensors(tensors: Mapping[str, Tensor], source: object) -> None:
    """Refuse tensors that were read from a file.

    Args:
        tensors: by their names.
        source: the file or folder, for the error.

    Raises:
        NonFiniteError: names the source and the first tensor that holds NaN or infinity.
    """
    if (name := find_nonfinite(tensors.items())) is not None:
        raise NonFiniteError(
            f"{source} holds NaN or infinity in {name!r}: what wrote it had diverged, or the file is damaged. Use an "
            f"earlier one."
        )


def check_weights(model: nn.Module, name: object = None) -> None:
    """Refuse a model whose weights are not finite.

    Args:
        model: bare or wrapped; of a sharded model this process looks at its own part.
        name: what the error calls it, by default where it was loaded from.

    Raises:
        NonFiniteError: names the model and the first such weight.
    """
    if (weight := find_nonfinite_weight(model)) is not None:
        raise NonFiniteError(
            f"{name or describe(model)} has NaN or infinity in its weight {weight!r}: its training diverged, or its "
            f"files are damaged. Use an earlier checkpoint, or train again with a lower learning rate."
        )


def check_ranked(leaves: Tensor, log_probs: Tensor, model: nn.Module) -> None:
    """Refuse ranked leaves of a model that computes NaN.

    Args:
        leaves: `(B, n)`, -1 where there is none; these may have any number.
        log_probs: `(B, n)` of them.
        model: whose they are.

    Raises:
        NonFiniteError: names the model, and the first of its weights that is not finite, if one is.
    """
    if bool(bad_ranking(leaves, log_probs)):
        check_weights(model)
        dtype = next((str(p.dtype) for p in model.parameters() if p.dtype.is_floating_point), "")
        raise NonFiniteError(
            f"{describe(model)} computes probabilities that are not finite, although its weights are finite: its "
            f"numbers overflow in {dtype.removeprefix('torch.')}. Load it in a wider dtype (dtype='float32')."
        )


def bad_ranking(leaves: Tensor, log_probs: Tensor) -> Tensor:
    """Whether a leaf has a log-probability that is not finite: a boolean scalar, on its device."""
    return (~torch.isfinite(log_probs) & (leaves >= 0)).any() | torch.isnan(log_probs).any()


def describe(model: nn.Module) -> str:
    """A model in a sentence: where it was loaded from, or its class."""
    while isinstance(inner := getattr(model, "module", None), nn.Module):
        model = inner
    return f"The model {name}" if (name := getattr(model, "name_or_path", "")) else f"The {type(model).__name__}"


def own_part(tensor: Tensor) -> Tensor:
    """What this process holds of a tensor that FSDP2 or ZeRO-3 has split; else the tensor."""
    tensor = getattr(tensor, "ds_tensor", tensor)  # ZeRO-3
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
