"""What the kernels run on: beside `capability.py` the only place that asks GPU or interpreter."""

# SPDX-License-Identifier: Apache-2.0
import functools

import torch
import triton

from .device import of_device

MIN_CAPABILITY = (8, 0)
# The first Triton whose `tl.dot_scaled` compiles NVFP4 to the hardware's own MMA (seen offline).
_NATIVE_SINCE = {100: (3, 4), 103: (3, 6), 110: (3, 8), 120: (3, 6), 121: (3, 8)}
INTERPRETER = 0
"""The ARCH that kernels see under TRITON_INTERPRET=1; on a GPU it is 10 * major + minor."""


INTERPRETING = bool(triton.knobs.runtime.interpret)
"""Whether this process runs Triton kernels in the interpreter, on CPU tensors."""


@functools.cache
def capability(device: torch.device) -> tuple[int, int]:
    """Compute capability of a CUDA device, (9, 0) for an H100."""
    found = of_device(device)
    if found is None:
        raise ValueError(f"the device is {device}; only a GPU has a compute capability")
    return found


@functools.cache
def gpu_name(device: torch.device) -> str:
    """What the driver calls the GPU, "NVIDIA H100 80GB HBM3"."""
    return "interpreter" if INTERPRETING else torch.cuda.get_device_name(device)


def arch(device: torch.device) -> int:
    """The ARCH constant of kernels launched on `device`."""
    if INTERPRETING:
        return INTERPRETER
    major, minor = capability(device)
    return 10 * major + minor


def launch_options(device: torch.device) -> dict[str, bool]:
    """Options of every launch.

    No fused multiply-adds; and from sm_90 a kernel is brought onto the GPU while the one before ends
    (programmatic dependent launch), so that every kernel begins with `jit.pdl.await_previous`. To
    signal earlier, at a kernel's beginning, cost 20 us with one token on an H100.
    """
    return {"enable_fp_fusion": False, "launch_pdl": arch(device) >= 90}


def native_mma(arch: int) -> bool:
    """Whether Triton here multiplies NVFP4 codes by the block-scaled MMA of this ARCH."""
    since = _NATIVE_SINCE.get(arch)
    return since is not None and _triton_version() >= since


def shared_memory(arch: int) -> int:
    """KiB of shared memory that a program may have (CUDA C++ Programming Guide)."""
    if arch in (86, 89) or arch >= 120:
        return 99
    return 163 if arch in (80, 87) else 227


@functools.cache
def _triton_version() -> tuple[int, ...]:
    return tuple(int(part) for part in triton.__version__.split(".")[:2])
