"""Kernels that specialize their warps and do little else: what racecheck says of Triton's dispatch.

Racecheck reports the dispatch (`dispatch.py`) in the library's kernels. Each form here adds one thing to
the form before it: a limit of registers, barriers of the default warps alone, and a ring of stages that
TMA fills. No result of a form depends on the bytes of the dispatch.
"""

# SPDX-License-Identifier: Apache-2.0
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from nvfp4_moe.kernels.jit.pdl import await_previous
from nvfp4_moe.kernels.moe.hopper.gluon import (
    TensorDescriptor,
    block_barrier,
    fence_async_shared,
    gl,
    gluon,
    mbarrier,
    tma,
)

ROWS, COLUMNS, STAGES = gl.constexpr(8), gl.constexpr(64), gl.constexpr(2)
TURNS = 64
PROGRAMS = 512
"""All store the same; a report depends on the order in which warps run."""


@gluon.jit
def _default(y_ptr, WITHIN: gl.constexpr):
    for _ in gl.static_range(WITHIN):
        block_barrier()
    gl.store(y_ptr, 1)


@gluon.jit
def _other(y_ptr):
    gl.store(y_ptr + 1, 2)


@gluon.jit
def specialize_kernel(
    y_ptr,  # [2] int32: a number of each partition
    BEFORE: gl.constexpr,  # barriers of the default warps before the partitions
    WITHIN: gl.constexpr,  # barriers of the default warps in theirs
):
    for _ in gl.static_range(BEFORE):
        block_barrier()
    gl.warp_specialize([(_default, (y_ptr, WITHIN)), (_other, (y_ptr,))], [1], [24])


@gluon.jit
def _consume(y_ptr, x_bufs, full, empty, turns):
    LAYOUT: gl.constexpr = gl.BlockedLayout([1, 2], [1, 32], [8, 1], [1, 0])
    acc = gl.zeros((ROWS, COLUMNS), gl.float32, layout=LAYOUT)
    for turn in range(turns):
        stage = turn % STAGES
        mbarrier.wait(full.index(stage), turn // STAGES & 1)
        acc += x_bufs.index(stage).load(LAYOUT).to(gl.float32)
        mbarrier.arrive(empty.index(stage), count=1)
    gl.store(y_ptr, gl.sum(gl.sum(acc, 1), 0))


@gluon.jit
def _produce(x_desc, x_bufs, full, empty, turns):
    await_previous(90)
    for turn in range(turns):
        stage = turn % STAGES
        mbarrier.wait(empty.index(stage), turn // STAGES & 1 ^ 1)
        mbarrier.expect(full.index(stage), ROWS * COLUMNS * 2)
        tma.async_copy_global_to_shared(x_desc, [0, 0], full.index(stage), x_bufs.index(stage))


@gluon.jit(do_not_specialize=["turns"])
def ring_kernel(
    x_desc,  # [ROWS, COLUMNS] bf16
    y_ptr,  # [1] fp32: the sum of x, `turns` times
    turns,
):
    x_bufs = gl.allocate_shared_memory(gl.bfloat16, [STAGES, ROWS, COLUMNS], x_desc.layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(empty.index(i), count=1)
    fence_async_shared()
    await_previous(90)
    gl.warp_specialize(
        [
            (_consume, (y_ptr, x_bufs, full, empty, turns)),
            (_produce, (x_desc, x_bufs, full, empty, turns)),
        ],
        [1],
        [24],
    )


@dataclass(frozen=True)
class Form:
    """A kernel that specializes its warps, and how it is launched.

    Args:
        kernel: of Gluon.
        arguments: makes those that are no constants, on a device.
        options: of the launch.
        constants: of the kernel.
    """

    kernel: Any
    arguments: Callable[[str], tuple[Any, ...]]
    options: Mapping[str, Any]
    constants: Mapping[str, int] = field(default_factory=dict)

    def launch(self, device: str) -> None:
        self.kernel[(PROGRAMS,)](*self.arguments(device), **self.constants, **self.options)


def _numbers(device: str) -> tuple[torch.Tensor]:
    return (torch.empty(2, dtype=torch.int32, device=device),)


def _rows_and_sum(device: str) -> tuple[TensorDescriptor, torch.Tensor, int]:
    x = torch.ones(ROWS.value, COLUMNS.value, dtype=torch.bfloat16, device=device)
    layout = gl.NVMMASharedLayout(128, 16, rank=2)
    descriptor = TensorDescriptor.from_tensor(x, list(x.shape), layout)
    return descriptor, torch.empty(1, dtype=torch.float32, device=device), TURNS


_NONE = {"BEFORE": 0, "WITHIN": 0}
FORMS: dict[str, Form] = {
    "only": Form(specialize_kernel, _numbers, {"num_warps": 4}, _NONE),
    "registers": Form(specialize_kernel, _numbers, {"num_warps": 4, "maxnreg": 128}, _NONE),
    "barriers": Form(
        specialize_kernel,
        _numbers,
        {"num_warps": 4, "maxnreg": 128},
        {"BEFORE": 3, "WITHIN": 3},
    ),
    "ring": Form(ring_kernel, _rows_and_sum, {"num_warps": 8, "maxnreg": 104, "launch_pdl": True}),
}
"""The forms by name, each with more than the one before it."""
