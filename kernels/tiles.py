"""The tiles of a GEMM kernel, the grouped and the dense one."""

# SPDX-License-Identifier: Apache-2.0
from dataclasses import dataclass


@dataclass(frozen=True)
class GemmConfig:
    """The tiles of `expert_gemm_kernel` and `dense_gemm_kernel`, and how they are launched."""

    bm: int  # rows of weights, a power of two from 32; 128 divides their number if bm does not
    bn: int  # tokens
    bk: int  # columns of weights
    stages: int
    warps: int
    decoded: bool = False  # another kernel decodes the weights before
    registers: int | None = (
        None  # most that a thread may use, so that more programs share a multiprocessor
    )
