"""What all parts of benchmarks/gpu.py share: where they run, at which size, and the arithmetic peak of the device."""

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
#: What a part yields: functions that measure one row of the results each, so that one that fails costs only itself.
Rows = Iterator[Callable[[], Row]]


@dataclass
class RunSettings:
    """Where and how large.

    Attributes:
        device: all models, and what is measured on them, are there.
        small: tiny sizes, which a CPU computes in about a minute.
    """

    device: torch.device
    small: bool = False

    def pick(self, full: T, small: T) -> T:
        """A size of the benchmark, or of its small form."""
        return small if self.small else full

    @cached_property
    def peak_flops(self) -> float:
        """FLOP per second of a large bf16 matrix product on this device, measured when it is first asked for."""
        return matmul_flops(self.device, self.pick(8192, 256))

    def on_device(self, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Tensors by name, on the device."""
        return {name: value.to(self.device) for name, value in tensors.items()}

    def describe(self) -> dict[str, Any]:
        """What the figures depend on besides the code: for the record."""
        found: dict[str, Any] = {
            "device": self.device.type, "small": self.small,
            "float32_matmul_precision": torch.get_float32_matmul_precision(),
        }  # fmt: skip
        if self.device.type == "cuda":
            properties = torch.cuda.get_device_properties(self.device)
            found |= {"gpu": properties.name, "memory": properties.total_memory, "cuda": torch.version.cuda}
        return found


def cast_parameters(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Change the dtype of a model's weights, and return the model.

    As where a model is loaded in that dtype, buffers (the frequencies of rotary positions) stay in float32.
    """
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    return model


def matmul_flops(device: torch.device, size: int, repeats: int = 10, rounds: int = 3) -> float:
    """FLOP per second of bf16 products of random `size x size` matrices: the best of the rounds."""
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
