"""Copies from a GPU beside whatever else the process does there."""

# SPDX-License-Identifier: Apache-2.0
import ctypes
import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

_RELAXED = 2
"""`CU_STREAM_CAPTURE_MODE_RELAXED` of cuda.h."""


@contextmanager
def beside(device: torch.device, event: Any = None) -> Iterator[None]:
    """Within, this thread copies over a stream of its own, behind the event.

    A copy to the CPU makes the captures of other threads fail, unless the capture mode of the thread
    that copies is relaxed (CUDA Driver API, `cuThreadExchangeStreamCaptureMode`). Within, it is.

    Args:
        device: of the tensors that are copied; on a CPU nothing happens.
        event: what the copies wait for; None: nothing.
    """
    if device.type != "cuda":
        yield
        return
    stream = _stream(device)
    if event is not None:
        stream.wait_event(event)
    mode = ctypes.c_int(_RELAXED)
    _exchange(mode)
    try:
        with torch.cuda.stream(stream):
            yield
    finally:
        _exchange(mode)


@functools.cache
def _stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


def _exchange(mode: ctypes.c_int) -> None:
    """Set this thread's capture mode, and put the one that it had in its place."""
    if status := _driver().cuThreadExchangeStreamCaptureMode(ctypes.byref(mode)):
        raise RuntimeError(f"cuThreadExchangeStreamCaptureMode returned {status}")


@functools.cache
def _driver() -> ctypes.CDLL:
    return ctypes.CDLL("libcuda.so.1")
