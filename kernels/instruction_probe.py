"""Measure the approximate instructions of the GPU in this machine: of rcp, ex2 and tanh."""

# SPDX-License-Identifier: Apache-2.0
import functools

import torch
import triton
import triton.language as tl

from ..reference.numerics import fp32
from ..reference.numerics import functions as known
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


@triton.jit
def instruction_kernel(x_ptr, y_ptr, SIZE: tl.constexpr, NAME: tl.constexpr):
    """Give every fp32 of x to one PTX instruction of an operand."""
    i = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    ASM: tl.constexpr = NAME + " $0, $1;"
    y = tl.inline_asm_elementwise(ASM, "=f,f", [tl.load(x_ptr + i)], tl.float32, True, 1)
    tl.store(y_ptr + i, y)


def apply_instruction(name: str, x: torch.Tensor) -> torch.Tensor:
    """Return what "ex2.approx.ftz.f32", or another instruction, gives for fp32 x, a multiple of 1024."""
    y = torch.empty_like(x)
    instruction_kernel[(x.numel() // 1024,)](x, y, SIZE=1024, NAME=name)
    return y


@torch.compiler.assume_constant_result
def functions_that_differ(device: torch.device | str) -> int:
    """Count the arguments for which the GPU's ex2, tanh and rcp are not those of functions="hopper".

    It waits for the GPU, once in a process. A compiler takes the number for a constant.

    Raises:
        RuntimeError: a CUDA graph is being captured, and nobody has measured before.
    """
    return _differ(torch.device(device))


@functools.cache
def _differ(device: torch.device) -> int:
    if torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            "the GPU's ex2.approx, tanh.approx and rcp.approx are not measured yet, and cannot be while "
            "a CUDA graph is captured: make the call once before the capture"
        )
    steps = torch.arange(2**23, dtype=torch.float64, device=device)
    ex2 = apply_instruction("ex2.approx.ftz.f32", (steps * 2.0**-23).float())
    pairs = [(ex2, known.ex2_table(device)), (measure_rcp_delta(device), fp32.rcp_delta(device))]
    for exponent in known.LEADING_BITS:
        x = known.leading_numbers(exponent).to(device)
        tanh = apply_instruction("tanh.approx.f32", x)
        pairs.append((tanh, known.tanh_table(exponent, device)))
    return sum(int((a != b).sum()) for a, b in pairs)  # no NaN, and no zero of another sign
