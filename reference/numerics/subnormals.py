"""Subnormal numbers count in the reference, whatever `torch.set_flush_denormal` the caller has chosen.

The flag is a mode of the processor, one for each thread, which a thread inherits from the one that
starts it. Under it fp32 and fp64 operations flush, and conversions between them, so that no arithmetic
in floating point is safe from it. A function that is `kept` therefore runs with the flag off in its
thread, and puts it back. Threads of torch's pool that were started under the flag keep it for ever: then
the function runs in its own thread alone, more slowly.
"""

# SPDX-License-Identifier: Apache-2.0
import functools
import sys
import threading
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch

P = ParamSpec("P")
R = TypeVar("R")

_SMALLEST = sys.float_info.min  # a number of the processor's, so that the flag shows in its half
_GRAIN = 1 << 15  # torch gives a thread of its pool no fewer elements


class _Seen(threading.local):
    threads = 1  # of this thread's pool, that many keep subnormals


_seen = _Seen()


def flushes() -> bool:
    """Return True if this thread flushes subnormal numbers."""
    return _SMALLEST * 0.5 == 0.0


def _pool_flushes(threads: int) -> bool:
    """Return True if one of so many threads of torch's pool flushes; missing threads are started."""
    bits = torch.ones(threads * _GRAIN, dtype=torch.int32, device="cpu")
    products = bits.view(torch.float32) * 1.0
    if type(products) is not torch.Tensor:  # a mode that computes no numbers, as FakeTensorMode
        return False
    if not torch.equal(products.view(torch.int32), bits):
        return True
    _seen.threads = threads
    return False


def kept(f: Callable[P, R]) -> Callable[P, R]:
    """f, for which subnormal numbers are kept on the CPU; see the module."""

    @functools.wraps(f)
    def keeping(*args: P.args, **kwargs: P.kwargs) -> R:
        if torch.compiler.is_compiling():
            return f(*args, **kwargs)
        flushing, threads = flushes(), torch.get_num_threads()
        if not flushing and threads <= _seen.threads:
            return f(*args, **kwargs)
        if flushing:
            torch.set_flush_denormal(False)
        alone = threads > _seen.threads and _pool_flushes(threads)
        try:
            if alone:
                torch.set_num_threads(1)
            return f(*args, **kwargs)
        finally:
            if alone:
                torch.set_num_threads(threads)
            if flushing:
                torch.set_flush_denormal(True)

    return keeping
