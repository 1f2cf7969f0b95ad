"""The GPU, or Triton's interpreter, that kernels are compiled for and launched on.

`device.py` has the compute capability alone, without Triton. No other module asks for either.
"""

# SPDX-License-Identifier: Apache-2.0
import functools

import torch
import triton

from .device import of_device

MIN_CAPABILITY = (8, 0)
# The first Triton whose `tl.dot_scaled` compiles NVFP4 to the hardware's own MMA (compiled offline).
_NATIVE_SINCE = {100: (3, 4), 103: (3, 6), 110: (3, 8), 120: (3, 6), 121: (3, 8)}
INTERPRETER = 0
"""The ARCH that kernels see under TRITON_INTERPRET=1; on a GPU it is 10 * major + minor."""


INTERPRETING = bool(triton.knobs.runtime.interpret)
"""True in a process that runs Triton kernels in the interpreter, on CPU tensors."""


@functools.cache
def capability(device: torch.device) -> tuple[int, int]:
    """Return the compute capability of a CUDA device, (9, 0) for an H100.

    Raises:
        ValueError: the device is no GPU.
    """
    found = of_device(device)
    if found is None:
        raise ValueError(f"the device is {device}; only a GPU has a compute capability")
    return found


@functools.cache
def gpu_name(device: torch.device) -> str:
    """Return the driver's name of the GPU, such as "NVIDIA H100 80GB HBM3"."""
    return "interpreter" if INTERPRETING else torch.cuda.get_device_name(device)


def arch(device: torch.device) -> int:
    """Return the constant ARCH of kernels that are launched on `device`."""
    if INTERPRETING:
        return INTERPRETER
    major, minor = capability(device)
    return 10 * major + minor


def launch_options(device: torch.device) -> dict[str, bool]:
    """Return the options of every launch.

    The compiler fuses no multiply-add. From sm_90 the GPU starts a kernel while the one before it ends
    (programmatic dependent launch), so every kernel begins with `jit.pdl.await_previous`. A signal at
    the beginning of a kernel, which lets the next one start earlier, cost 20 us with one token on an
    H100.
    """
    return {"enable_fp_fusion": False, "launch_pdl": arch(device) >= 90}


def native_mma(arch: int) -> bool:
    """Return True if the installed Triton multiplies NVFP4 codes by the block-scaled MMA of ARCH."""
    since = _NATIVE_SINCE.get(arch)
    return since is not None and triton_version() >= since


def shared_memory(arch: int) -> int:
    """Return the KiB of shared memory that a program may have (CUDA C++ Programming Guide)."""
    if arch in (86, 89) or arch >= 120:
        return 99
    return 163 if arch in (80, 87) else 227


@functools.cache
def triton_version() -> tuple[int, ...]:
    """Return (major, minor) of the installed Triton."""
    return tuple(int(part) for part in triton.__version__.split(".")[:2])
