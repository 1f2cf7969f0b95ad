"""A kernel that specializes its warps, and does nothing else: what racecheck says of Triton's dispatch.

It has no shared memory but that of the dispatch (`dispatch.py`).
"""

# SPDX-License-Identifier: Apache-2.0
import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl


@gluon.jit
def _default(y_ptr):
    gl.store(y_ptr, 1)


@gluon.jit
def _other(y_ptr):
    gl.store(y_ptr + 1, 2)


@gluon.jit
def specialize_kernel(y_ptr):
    gl.warp_specialize([(_default, (y_ptr,)), (_other, (y_ptr,))], [1], [24])


PROGRAMS = 512
"""All store the same; a report depends on the order in which warps run."""


def specialize(device: str) -> None:
    """Store a number by each of two partitions: four default warps, and another one."""
    y = torch.empty(2, dtype=torch.int32, device=device)
    specialize_kernel[(PROGRAMS,)](y, num_warps=4)
