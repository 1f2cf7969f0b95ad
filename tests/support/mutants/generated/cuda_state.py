"""The state of CUDA in a process that forks: once it is initialized, no forked process can use a GPU.

A pass of autograd over CPU tensors initializes it too: torch's engine then counts the GPUs, as
`Engine::start_device_threads` of `torch/csrc/autograd/engine.cpp` has it.
`torch.cuda.is_initialized()` stays False, so the driver itself is asked.
"""

# SPDX-License-Identifier: Apache-2.0
import ctypes
import os

import torch

_DRIVER = "libcuda.so.1"
_NOT_INITIALIZED = 3  # CUDA_ERROR_NOT_INITIALIZED: nothing in this process has called cuInit


class InitializedError(RuntimeError):
    """CUDA is initialized in a process that forks others for a GPU."""


def is_initialized() -> bool:
    """Return True if anything in this process has initialized CUDA. This does not initialize it."""
    return torch.cuda.is_initialized() or _driver_is_initialized()


def check(when: str) -> None:
    """Raise InitializedError if CUDA is initialized in this process.

    Args:
        when: what this process does or has done, for the message.
    """
    if is_initialized():
        raise InitializedError(
            f"CUDA is initialized in this process {when}. No process that it forks could use a GPU. "
            "A call that counts GPUs initializes CUDA, and so does a backward pass of autograd on the "
            "CPU: let the processes that are forked make such calls."
        )


def _driver_is_initialized() -> bool:
    try:
        driver = ctypes.CDLL(_DRIVER, mode=os.RTLD_NOW | os.RTLD_NOLOAD)
    except OSError:  # nothing has loaded it
        return False
    return bool(driver.cuDeviceGetCount(ctypes.byref(ctypes.c_int())) != _NOT_INITIALIZED)
