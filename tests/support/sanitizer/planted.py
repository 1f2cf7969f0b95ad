"""One planted fault for each tool: a tool that does not report it checks nothing on this machine."""

# SPDX-License-Identifier: Apache-2.0
from collections.abc import Callable

import torch
import triton
import triton.language as tl

RACE = tl.constexpr("""{
    .reg .u32 %thread, %address;
    .shared .align 4 .u32 word;
    mov.u32 %thread, %tid.x;
    mov.u32 %address, word;
    st.volatile.shared.u32 [%address], %thread;
    ld.volatile.shared.u32 $0, [%address];
}""")
"""Every thread of four warps writes its number to one word, and reads it."""
BARRIERS = tl.constexpr("""{
    .reg .pred %some;
    .reg .u32 %thread, %address;
    .reg .u64 %state;
    .shared .align 8 .u64 barrier;
    mov.u32 %thread, %tid.x;
    mov.u32 %address, barrier;
    mbarrier.arrive.shared.b64 %state, [%address];
    setp.lt.u32 %some, %thread, 16;
    @%some bar.sync 0;
    mov.u32 $0, %thread;
}""")
"""Every thread arrives at an uninitialized mbarrier, and half a warp waits for the block."""


@triton.jit
def beyond_kernel(y_ptr, SIZE: tl.constexpr):
    tl.store(y_ptr + 1 + tl.arange(0, SIZE), 1)


@triton.jit
def copy_kernel(x_ptr, y_ptr, SIZE: tl.constexpr):
    i = tl.arange(0, SIZE)
    tl.store(y_ptr + i, tl.load(x_ptr + i) + 1)


@triton.jit
def assembly_kernel(y_ptr, SIZE: tl.constexpr, ASSEMBLY: tl.constexpr):
    i = tl.arange(0, SIZE)
    number = tl.inline_asm_elementwise(ASSEMBLY, "=r,r", [i], tl.int32, False, 1)
    tl.store(y_ptr + i, number)


SIZE = 128


def _unwritten(n: int, device: str) -> torch.Tensor:
    return torch.empty(n, dtype=torch.int32, device=device)


def write_beyond(device: str) -> None:
    """Store behind the end of a tensor."""
    beyond_kernel[(1,)](_unwritten(SIZE, device), SIZE=SIZE)


def read_unwritten(device: str) -> None:
    """Load what nothing has written."""
    copy_kernel[(1,)](_unwritten(SIZE, device), _unwritten(SIZE, device), SIZE=SIZE)


def race(device: str) -> None:
    """Write and read one word of shared memory by all threads, without a barrier."""
    assembly_kernel[(1,)](_unwritten(SIZE, device), SIZE=SIZE, ASSEMBLY=RACE, num_warps=4)


def wrong_barriers(device: str) -> None:
    """Arrive at an uninitialized mbarrier, and at a barrier of the block in half a warp."""
    assembly_kernel[(1,)](_unwritten(SIZE, device), SIZE=SIZE, ASSEMBLY=BARRIERS, num_warps=4)


PLANTED: dict[str, Callable[[str], None]] = {
    "memcheck": write_beyond,
    "racecheck": race,
    "initcheck": read_unwritten,
    "synccheck": wrong_barriers,
}
"""The fault of each tool of compute-sanitizer."""
TOOLS = tuple(PLANTED)
