"""Gluon, as the kernels of this folder use it: the one module that knows Triton's versions.

Gluon is experimental: each version of Triton renames parts of it. A version that is not listed does not
serve; the kernels of `tl.dot` take its place.
"""

# SPDX-License-Identifier: Apache-2.0
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

__all__ = [
    "TensorDescriptor",
    "async_copy",
    "block_barrier",
    "fence_async_shared",
    "gl",
    "gluon",
    "mbarrier",
    "reinterpreted",
    "tma",
    "warpgroup_mma",
    "warpgroup_mma_wait",
]

block_barrier = gl.barrier if hasattr(gl, "barrier") else gl.thread_barrier
_NEW_NAME = gl.constexpr(hasattr(gl.shared_memory_descriptor, "reinterpret"))


@gluon.jit
def reinterpreted(buffer, dtype: gl.constexpr, shape: gl.constexpr, layout: gl.constexpr):
    """Return the same shared memory as a tensor of another type, shape and layout."""
    if _NEW_NAME:
        return buffer.reinterpret(dtype, shape, layout)
    else:
        return buffer._reinterpret(dtype, shape, layout)
