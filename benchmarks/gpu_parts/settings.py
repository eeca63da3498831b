"""Settings of all parts of benchmarks/gpu.py: device, size, and the measured peak FLOPs of the device."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeVar

import torch
from measuring import synchronize
from torch import nn


T = TypeVar("T")
Row = dict[str, Any]
#: A part yields functions that measure one row of the results each, so that an error affects only one row.
Rows = Iterator[Callable[[], Row]]


@dataclass
class RunSettings:
    """Device and size of the run.

    Attributes:
        device: device of all models and measurements.
        small: use tiny sizes, which take about a minute on a CPU.
    """

    device: torch.device
    small: bool = False

    def pick(self, full: T, small: T) -> T:
        """Return the full or the small size."""
        return small if self.small else full

    @cached_property
    def peak_flops(self) -> float:
        """FLOPs per second of a large bf16 matrix product on this device, measured at the first access."""
        return matmul_flops(self.device, self.pick(8192, 256))

    def on_device(self, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Move named tensors to the device."""
        return {name: value.to(self.device) for name, value in tensors.items()}

    def describe(self) -> dict[str, Any]:
        """Return what the figures depend on in addition to the code, for the record."""
        found: dict[str, Any] = {
            "device": self.device.type, "small": self.small,
            "float32_matmul_precision": torch.get_float32_matmul_precision(),
        }  # fmt: skip
        if self.device.type == "cuda":
            properties = torch.cuda.get_device_properties(self.device)
            found |= {"gpu": properties.name, "memory": properties.total_memory, "cuda": torch.version.cuda}
        return found


def cast_parameters(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Change the dtype of a model's weights and return the model.

    Buffers (the frequencies of rotary embeddings) stay in float32, as when a model is loaded in that dtype.
    """
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    return model


def matmul_flops(device: torch.device, size: int, repeats: int = 10, rounds: int = 3) -> float:
    """Return FLOPs per second of bf16 products of random `size x size` matrices, the best of all rounds."""
    generator = torch.Generator(device).manual_seed(0)
    left, right = (torch.randn(size, size, device=device, generator=generator).to(torch.bfloat16) for _ in range(2))
    seconds = min(_seconds(lambda: left @ right, repeats, device) for _ in range(rounds + 1))
    return 2 * size**3 / seconds


def _seconds(work: Callable[[], Any], repeats: int, device: torch.device) -> float:
    synchronize(device)
    start = time.perf_counter()
    for _ in range(repeats):
        work()
    synchronize(device)
    return (time.perf_counter() - start) / repeats
