"""Measure the reciprocal approximation of the GPU in this machine."""

# SPDX-License-Identifier: Apache-2.0
import torch
import triton
import triton.language as tl

from .jit.arithmetic import rcp, reciprocal
from .triton_target import arch


@triton.jit
def _rcp_delta_kernel(delta_ptr, N: tl.constexpr, ARCH: tl.constexpr):
    significand = tl.program_id(0) * N + tl.arange(0, N)
    x = (significand | 0x3F800000).to(tl.float32, bitcast=True)
    approximate = rcp(x, None, ARCH).to(tl.int32, bitcast=True)
    exact = reciprocal(x, False, ARCH).to(tl.int32, bitcast=True)
    tl.store(delta_ptr + significand, (approximate - exact).to(tl.int8))


def measure_rcp_delta(device: torch.device | str) -> torch.Tensor:
    """Measure by how many ulp `rcp.approx.ftz` differs from the rounded 1/x, for every significand.

    `reference/numerics/rcp_delta.xz` is `lzma.compress` of these bytes, measured on an H100.

    Returns:
        [2^23] int8, on the device.
    """
    device = torch.device(device)
    delta = torch.empty(2**23, dtype=torch.int8, device=device)
    _rcp_delta_kernel[(2**13,)](delta, N=1024, ARCH=arch(device))
    return delta
