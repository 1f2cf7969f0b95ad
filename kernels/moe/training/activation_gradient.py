"""The activation of a trained layer and its gradient, in one pass over the first GEMM's sums."""

# SPDX-License-Identifier: Apache-2.0
import torch
import triton
import triton.language as tl

from ....reference.activation import ActivationType
from ...jit.approximations import gelu, sigmoid, tanh
from ...jit.arithmetic import to_bf16
from ...jit.pdl import await_previous
from ...launcher import cdiv, launch, next_power_of_2
from ...triton_target import arch, launch_options
from ..activation import (
    GEGLU,
    GEGLU_TANH,
    GELU,
    IDENTITY,
    RELU,
    RELU2,
    SILU,
    SITU,
    SWIGLU,
    SWIGLU_STEP,
    is_gated,
    of_expert,
)


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
def _limited(x, limit):
    """Return x within +-limit, and the derivative there; NaN stays NaN."""
    y = tl.where(tl.abs(x) > limit, tl.where(x < 0, -limit, limit), x)
    return y, (tl.abs(x) <= limit).to(tl.float32)


@triton.jit
def _at_most(x, limit):
    """Return x up to the limit, and the derivative there; NaN stays NaN."""
    return tl.where(x > limit, limit, x), (x <= limit).to(tl.float32)


@triton.jit
def _bounded(x, bound):
    """Return bound * tanh(x / bound), and its derivative."""
    if bound is not None:
        t = tanh(x / bound)
        y = bound * t
    else:
        t = tanh(x)
        y = t
    return y, 1.0 - t * t


@triton.jit
def _of_one(g, ACT: tl.constexpr):
    """Return a function of one argument, which is an activation or the curve of a gate, and d."""
    if ACT == GELU or ACT == GEGLU:
        y = gelu(g)
        part = tl.where(tl.abs(g) < 2.0**-30, 0.5, y / g)  # the normal distribution function
        slope = part + g * (0.3989422804014327 * tl.exp(g * g * -0.5))
    elif ACT == GEGLU_TANH:
        part = sigmoid(1.5957691216057308 * (g + 0.044715 * g * g * g))
        steep = part * (1.0 - part)
        inner = 1.5957691216057308 * (1.0 + 0.134145 * g * g)
        slope = part + tl.where(steep > 0, g * steep * inner, 0.0)
        y = g * part
    elif ACT == SILU or ACT == SWIGLU_STEP:
        part = sigmoid(g)
        slope = part + g * part * (1.0 - part)
        y = g * part
    elif ACT == RELU:
        slope = (g > 0).to(tl.float32)
        y = tl.where(g <= 0, 0.0, g)
    elif ACT == RELU2:
        y = tl.where(g <= 0, 0.0, g)
        slope = 2.0 * y
        y = y * y
    else:
        tl.static_assert(ACT == IDENTITY, "the activation has no derivative here")
        slope = tl.full(g.shape, 1.0, tl.float32)
        y = g
    return y, slope


@triton.jit
def _of_two(up, gate, alpha, beta, limit, ACT: tl.constexpr):
    """Return a gated activation in physical units, and its derivatives by up and by gate."""
    one = tl.full(gate.shape, 1.0, tl.float32)
    up_inside, gate_inside = one, one
    if ACT == SWIGLU_STEP:
        up, up_inside = _limited(up, limit)
        curve, slope = _of_one(gate, ACT)
        curve, inside = _at_most(curve, limit)
        slope = slope * inside
        factor = up
    elif ACT == SWIGLU or ACT == SITU:
        if limit is not None:
            up, up_inside = _limited(up, limit)
            gate, gate_inside = _at_most(gate, limit)
        if ACT == SWIGLU:
            factor = up
            if beta is not None:
                factor = up + beta
            steep = gate
            argument = gate
            if alpha is not None:
                argument = alpha * gate
                steep = argument
            part = sigmoid(argument)
            curve = gate * part
            slope = part + steep * part * (1.0 - part)
        else:
            factor, factor_slope = _bounded(up, beta)
            up_inside = up_inside * factor_slope
            bounded, bounded_slope = _bounded(gate, alpha)
            part = sigmoid(gate)
            curve = bounded * part
            slope = bounded_slope * part + bounded * part * (1.0 - part)
    else:
        factor = up
        curve, slope = _of_one(gate, ACT)
    return curve * factor, curve * up_inside, slope * gate_inside * factor


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
        y, d_up, d_gate = _of_two(up, gate, alpha, beta, limit, ACT)
        d_up = d_up * d
    else:
        y, d_gate = _of_one(gate, ACT)
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
