"""The activation of a trained layer and its gradient, in one pass over the first GEMM's sums."""

# SPDX-License-Identifier: Apache-2.0
import torch
import triton
import triton.language as tl

from ....reference.activation import ActivationType
from ...jit.arithmetic import to_bf16
from ...jit.pdl import await_previous
from ...launcher import cdiv, launch, next_power_of_2
from ...triton_target import arch, launch_options
from ..activation import SWIGLU_STEP, gated_with_slopes, is_gated, of_expert, with_slope


def activation_gradient(
    sums: torch.Tensor,
    token_scale: torch.Tensor | None,
    bias: torch.Tensor | None,
    scale: torch.Tensor,
    expert: torch.Tensor,
    kind: ActivationType,
    parameters: tuple[torch.Tensor | None, ...],
    d: torch.Tensor,
    factor: torch.Tensor,
    column_scale: torch.Tensor | None,
    row_scale: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return bf16 (activation(raw) [N, I], d raw * column_scale [N, M], d raw * row_scale [N, M]).

    raw is (sums * token_scale + bias) * scale, and d raw its gradient where d * factor is that of the
    activation.

    Args:
        sums: [N, M] bf16 or fp32, [up; gate] of gated activations, M = 2 I; else M = I.
        token_scale, factor, row_scale: N elements fp32; bias: [E, M] fp32. None: without.
        scale, column_scale: [E, M / I] fp32, of up and gate.
        expert: [N] int64.
        parameters: alpha, beta and clamp_limit in physical units, [E] fp32 or None.
        d: [N, I] bf16.
    """
    n, columns = d.shape
    sums, d = sums.contiguous(), d.contiguous()
    bias = None if bias is None else bias.contiguous()
    a, first = torch.empty_like(d), torch.empty_like(sums, dtype=torch.bfloat16)
    second = first if column_scale is None and row_scale is None else torch.empty_like(first)
    block = min(1024, next_power_of_2(columns))
    launch(activation_gradient_kernel, (n, cdiv(columns, block)),
        sums, token_scale, bias, scale, expert, *parameters, d, factor,
        column_scale, row_scale, a, first, None if second is first else second, columns,
        ACT=int(kind), BLOCK=block, ARCH=arch(d.device), num_warps=4, **launch_options(d.device),
    )  # fmt: skip
    return a, first, second


@triton.jit
def _raw(sums_ptr, token, bias_ptr, scale_ptr, row, column, inside):
    """Load sums of a row, and make them physical."""
    x = tl.load(sums_ptr + row + column, inside, other=0.0).to(tl.float32)
    if token is not None:
        x = x * token
    if bias_ptr is not None:
        x = x + tl.load(bias_ptr + column, inside, other=0.0)
    return x * tl.load(scale_ptr)


@triton.jit
def _store(d, out_ptr, column_scale_ptr, row, column, inside, ARCH: tl.constexpr):
    if column_scale_ptr is not None:
        d = d * tl.load(column_scale_ptr)
    tl.store(out_ptr + row + column, to_bf16(d, ARCH), inside)


@triton.jit
def activation_gradient_kernel(
    sums_ptr,  # [N, M] bf16 or fp32; M is 2 I, up and gate, or I
    token_scale_ptr,  # [N] fp32, or None
    bias_ptr,  # [E, M] fp32, or None
    scale_ptr,  # [E, M / I] fp32
    expert_ptr,  # [N] int64
    alpha_ptr,
    beta_ptr,
    limit_ptr,  # [E] fp32, or None
    d_ptr,  # [N, I] bf16
    factor_ptr,  # [N] fp32
    column_scale_ptr,  # [E, M / I] fp32, or None
    row_scale_ptr,  # [N] fp32, or None
    a_ptr,  # [N, I] bf16
    first_ptr,  # [N, M] bf16, with the column's scale
    second_ptr,  # [N, M] bf16, with the row's scale; or None
    columns,  # I
    ACT: tl.constexpr,
    BLOCK: tl.constexpr,
    ARCH: tl.constexpr,
):
    """One row's block of columns; a row of no expert holds anything."""
    await_previous(ARCH)
    PARTS: tl.constexpr = 2 if is_gated(ACT) else 1
    n = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < columns
    expert = tl.load(expert_ptr + n)
    row = n * columns * PARTS
    token = of_expert(token_scale_ptr, n)
    row_scale = of_expert(row_scale_ptr, n)
    alpha = of_expert(alpha_ptr, expert)
    beta = of_expert(beta_ptr, expert)
    if ACT == SWIGLU_STEP and limit_ptr is None:
        limit = tl.full((), 7.0, tl.float32)  # reference.activation.STEP_LIMIT
    else:
        limit = of_expert(limit_ptr, expert)
    d = tl.load(d_ptr + n * columns + column, inside, other=0.0).to(tl.float32) * tl.load(
        factor_ptr + n
    )
    scales = scale_ptr + expert * PARTS
    biases = bias_ptr
    if bias_ptr is not None:
        biases = bias_ptr + expert * columns * PARTS
    last = column + (PARTS - 1) * columns
    gate = _raw(sums_ptr, token, biases, scales + PARTS - 1, row, last, inside)
    if PARTS == 2:
        up = _raw(sums_ptr, token, biases, scales, row, column, inside)
        y, d_up, d_gate = gated_with_slopes(up, gate, alpha, beta, limit, ACT)
        d_up = d_up * d
    else:
        y, d_gate = with_slope(gate, ACT)
        d_up = d_gate
    d_gate = d_gate * d
    tl.store(a_ptr + n * columns + column, to_bf16(y, ARCH), inside)
    by_column = column_scale_ptr
    if column_scale_ptr is not None:
        by_column = column_scale_ptr + expert * PARTS + PARTS - 1
    _store(d_gate, first_ptr, by_column, row, last, inside, ARCH)
    if PARTS == 2:
        if column_scale_ptr is not None:
            by_column = column_scale_ptr + expert * PARTS
        _store(d_up, first_ptr, by_column, row, column, inside, ARCH)
    if second_ptr is not None:
        if row_scale is not None:
            d_gate = d_gate * row_scale
            d_up = d_up * row_scale
        _store(d_gate, second_ptr, None, row, last, inside, ARCH)
        if PARTS == 2:
            _store(d_up, second_ptr, None, row, column, inside, ARCH)
