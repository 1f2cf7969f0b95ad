"""The gradient of the routing weights: each row of the layer times the output's gradient."""

# SPDX-License-Identifier: Apache-2.0
import torch
import triton
import triton.language as tl

from ...jit.arithmetic import to_bf16
from ...jit.pdl import await_previous
from ...launcher import launch, next_power_of_2
from ...triton_target import arch, launch_options
from ..activation import of_expert


def row_dots(
    grad: torch.Tensor,
    token: torch.Tensor,
    sums: torch.Tensor,
    row_scale: torch.Tensor | None,
    bias: torch.Tensor | None,
    scale: torch.Tensor,
    expert: torch.Tensor,
) -> torch.Tensor:
    """Return grad[token] . bf16((sums * row_scale + bias) * scale) by row, [N] fp32.

    Args:
        grad: [T, H] of a float dtype; token: [N] int64.
        sums: [N, H] bf16, the second GEMM's.
        row_scale: N elements fp32; bias: [E, H] fp32. None: without.
        scale: E elements fp32; expert: [N] int64.
    """
    grad, sums = grad.contiguous(), sums.contiguous()
    bias = None if bias is None else bias.contiguous()
    n, columns = sums.shape
    out = torch.empty(n, dtype=torch.float32, device=sums.device)
    launch(row_dots_kernel, (n,),
        grad, token, sums, row_scale, bias, scale, expert, out, columns,
        BLOCK=min(1024, next_power_of_2(columns)), ARCH=arch(sums.device), num_warps=4,
        **launch_options(sums.device),
    )  # fmt: skip
    return out


@triton.jit
def row_dots_kernel(
    grad_ptr,  # [T, H]
    token_ptr,  # [N] int64
    sums_ptr,  # [N, H] bf16
    row_scale_ptr,  # [N] fp32, or None
    bias_ptr,  # [E, H] fp32, or None
    scale_ptr,  # [E] fp32
    expert_ptr,  # [N] int64
    out_ptr,  # [N] fp32
    columns,  # H
    BLOCK: tl.constexpr,
    ARCH: tl.constexpr,
):
    await_previous(ARCH)
    n = tl.program_id(0).to(tl.int64)
    expert = tl.load(expert_ptr + n)
    grads = grad_ptr + tl.load(token_ptr + n) * columns
    scale = tl.load(scale_ptr + expert)
    row_scale = of_expert(row_scale_ptr, n)
    total = tl.zeros((BLOCK,), tl.float32)
    for first in range(0, columns, BLOCK):
        column = first + tl.arange(0, BLOCK)
        inside = column < columns
        row = tl.load(sums_ptr + n * columns + column, inside, other=0.0).to(tl.float32)
        if row_scale is not None:
            row = row * row_scale
        if bias_ptr is not None:
            row += tl.load(bias_ptr + expert * columns + column, inside, other=0.0)
        row = to_bf16(row * scale, ARCH).to(tl.float32)
        total += row * tl.load(grads + column, inside, other=0.0).to(tl.float32)
    tl.store(out_ptr + n, tl.sum(total))
