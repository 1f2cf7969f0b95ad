"""Zeros for the experts without rows in a product over rows."""

# SPDX-License-Identifier: Apache-2.0
import torch
import triton
import triton.language as tl

from ...jit.pdl import await_previous
from ...launcher import launch
from ...triton_target import INTERPRETING, arch, launch_options

_BLOCK = 4096
_PROGRAMS = 64 if not INTERPRETING else 1
"""Programs that share an expert; most of them find rows and end."""


def zero_empty_groups(t: torch.Tensor, ends: torch.Tensor) -> None:
    """Fill t[e] with zeros, in place, where expert e has no rows.

    Args:
        t: [E, ...] of a float dtype, contiguous; ends: [E] int32, the last row of each expert, + 1.
    """
    launch(zero_empty_groups_kernel, (t.shape[0], _PROGRAMS),
        t, ends, t[0].numel(),
        BLOCK=_BLOCK, PROGRAMS=_PROGRAMS, ARCH=arch(t.device), num_warps=4,
        **launch_options(t.device),
    )  # fmt: skip


@triton.jit
def zero_empty_groups_kernel(
    t_ptr,  # [E, elements]
    end_ptr,  # [E] int32
    elements,
    BLOCK: tl.constexpr,
    PROGRAMS: tl.constexpr,
    ARCH: tl.constexpr,
):
    await_previous(ARCH)
    expert = tl.program_id(0)
    begin = tl.load(end_ptr + expert - 1, expert > 0, other=0)
    if begin != tl.load(end_ptr + expert):
        return
    base = t_ptr + expert.to(tl.int64) * elements
    zeros = tl.zeros((BLOCK,), tl.float32).to(t_ptr.dtype.element_ty)
    for first in range(tl.program_id(1) * BLOCK, elements, PROGRAMS * BLOCK):
        i = first + tl.arange(0, BLOCK)
        tl.store(base + i, zeros, i < elements)
