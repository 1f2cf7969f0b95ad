"""Memory of a GPU behind which nothing is mapped: a kernel that reads or writes on there fails.

PyTorch's own memory goes on behind a tensor, where a mistake shows no error and no other result.
"""

# SPDX-License-Identifier: Apache-2.0
import ctypes
import functools
from dataclasses import dataclass
from typing import Any

import torch

from nvfp4_moe.kernels import launcher

Tensor = torch.Tensor
_PINNED, _OF_DEVICE, _READ_AND_WRITE = 1, 1, 3  # in cuda.h


class _Location(ctypes.Structure):
    """CUmemLocation."""

    _fields_ = (("type", ctypes.c_int), ("id", ctypes.c_int))


class _Properties(ctypes.Structure):
    """CUmemAllocationProp."""

    _fields_ = (
        ("type", ctypes.c_int),
        ("handle_types", ctypes.c_int),
        ("location", _Location),
        ("windows", ctypes.c_void_p),
        ("flags", ctypes.c_ubyte * 8),
    )


class _Access(ctypes.Structure):
    """CUmemAccessDesc."""

    _fields_ = (("location", _Location), ("flags", ctypes.c_int))


@functools.cache
def _driver() -> ctypes.CDLL:
    return ctypes.CDLL("libcuda.so.1")


def _call(name: str, *args: Any) -> None:
    if status := getattr(_driver(), name)(*args):
        raise RuntimeError(f"{name}: CUDA's status is {status}")


def _end_of_mapped(size: int, device: int) -> int:
    """Map at least `size` bytes of a GPU, never to be unmapped; return the address behind them."""
    location = _Location(_OF_DEVICE, device)
    properties = _Properties(_PINNED, 0, location)
    access = _Access(location, _READ_AND_WRITE)
    step, start, handle = ctypes.c_size_t(), ctypes.c_uint64(), ctypes.c_uint64()
    _call("cuMemGetAllocationGranularity", ctypes.byref(step), ctypes.byref(properties), 0)
    mapped = ctypes.c_size_t(-(-size // step.value) * step.value)
    reserved, zero = ctypes.c_size_t(mapped.value + step.value), ctypes.c_uint64(0)
    nowhere, offset = ctypes.c_size_t(0), ctypes.c_size_t(0)
    _call("cuMemAddressReserve", ctypes.byref(start), reserved, nowhere, zero, zero)
    _call("cuMemCreate", ctypes.byref(handle), mapped, ctypes.byref(properties), zero)
    _call("cuMemMap", start, mapped, offset, handle, zero)
    _call("cuMemSetAccess", start, mapped, ctypes.byref(access), ctypes.c_size_t(1))
    return start.value + mapped.value


@dataclass(frozen=True)
class _Bytes:
    """Bytes of a GPU, in the form of which PyTorch makes a tensor."""

    address: int
    size: int

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        memory = {"data": (self.address, False), "version": 3, "strides": None}
        return {"shape": (self.size,), "typestr": "|u1", **memory}


def guarded(t: Tensor) -> Tensor:
    """Copy a contiguous tensor to where memory ends; one that is on no GPU is returned as it is."""
    if t.device.type != "cuda" or not t.numel():
        return t
    assert t.is_contiguous()
    size, device = t.numel() * t.element_size(), torch.cuda.current_device()
    memory = _Bytes(_end_of_mapped(size, device) - size, size)
    return torch.as_tensor(memory, device=t.device).view(t.dtype).view(t.shape).copy_(t)


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **constants: Any) -> None:
    """Launch as `launcher.launch`, with copies of the tensors, each at an end of memory."""
    moved = [guarded(a) if isinstance(a, Tensor) else a for a in args]
    launcher.launch(kernel, grid, *moved, **constants)
    for given, other in zip(args, moved, strict=True):
        if isinstance(given, Tensor):
            given.copy_(other)
