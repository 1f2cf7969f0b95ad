"""Tensors on the CPU, fp32 or int64, whatever the caller's default dtype and device are.

torch makes a tensor of the default dtype where none is named, and of the default device; so it does of
an integer tensor and a float. Inputs that are compared bit by bit are made by these.
"""

# SPDX-License-Identifier: Apache-2.0
from collections.abc import Sequence

import torch

READING = torch.device("cpu")
"""A context for reading: safetensors makes what it reads on the default device."""


def fp32(values: Sequence[float] | float) -> torch.Tensor:
    """Make an fp32 tensor of these values."""
    return torch.tensor(values, dtype=torch.float32, device="cpu")


def zeros(*size: int) -> torch.Tensor:
    """Make fp32 zeros."""
    return torch.zeros(size, dtype=torch.float32, device="cpu")


def ones(*size: int) -> torch.Tensor:
    """Make fp32 ones."""
    return torch.ones(size, dtype=torch.float32, device="cpu")


def full(size: Sequence[int], value: float) -> torch.Tensor:
    """Make an fp32 tensor of one value."""
    return torch.full(size, value, dtype=torch.float32, device="cpu")


def arange(*bounds: int) -> torch.Tensor:
    """Make int64 numbers, as `torch.arange` counts them."""
    return torch.arange(*bounds, dtype=torch.int64, device="cpu")


def powers(exponents: torch.Tensor) -> torch.Tensor:
    """Return 2^exponents, fp32, for an integer tensor."""
    return 2.0 ** exponents.float()


def normal(g: torch.Generator, *size: int) -> torch.Tensor:
    """Draw fp32 normal numbers."""
    return torch.randn(size, generator=g, dtype=torch.float32, device="cpu")


def uniform(g: torch.Generator, *size: int) -> torch.Tensor:
    """Draw fp32 numbers from 0 to below 1."""
    return torch.rand(size, generator=g, dtype=torch.float32, device="cpu")


def integers(g: torch.Generator, low: int, high: int, size: Sequence[int]) -> torch.Tensor:
    """Draw int64 numbers from low to high - 1."""
    return torch.randint(low, high, size, generator=g, dtype=torch.int64, device="cpu")
