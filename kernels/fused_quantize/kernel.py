"""SiLU-and-mul and RMSNorm with the per-token quantizer behind them, in one Triton kernel.

`reference/fused_quantize.py` fixes every operation, so that the bits are its own on every GPU. A program
owns ROWS rows whole: what it computes stays in registers until the row's maximum is known, rounded to
the dtype that a kernel of its own would have written. Names are those of `quantize/kernel.py`.
"""

# SPDX-License-Identifier: Apache-2.0
import triton
import triton.language as tl

from ..jit.arithmetic import div, flush, log2, mul, reciprocal, to_bf16, widened_bits
from ..jit.formats import BF16, LAYOUT_LINEAR, PER_TOKEN
from ..jit.load import block_values, load_blocks
from ..jit.pdl import await_previous
from ..jit.recipe import flushes
from ..jit.store import store_codes, zero_padding_rows
from ..quantize.block import or_zero, quantize_block, row_scales

SILU_AND_MUL, RMSNORM, ADD_RMSNORM = (tl.constexpr(i) for i in range(3))


@triton.jit
def _power_of_two(n):
    return ((n + 127) << 23).to(tl.float32, bitcast=True)


@triton.jit
def _exp(t):
    """`reference.fused_quantize.exp`; launched without fused multiply-adds."""
    t = tl.where(t < -87.0, -87.0, tl.where(t > 89.0, 89.0, t))
    shifted = t * 1.4426950408889634 + 12582912.0
    n = shifted - 12582912.0
    r = t - n * 0.693359375
    r = r - n * -2.12194440054690583e-4
    p = r * (1.0 / 5040) + 1.0 / 720
    p = p * r + 1.0 / 120
    p = p * r + 1.0 / 24
    p = p * r + 1.0 / 6
    p = p * r + 0.5
    p = p * r + 1.0
    p = p * r + 1.0
    power = shifted.to(tl.int32, bitcast=True) - 0x4B400000
    half = power >> 1
    return p * _power_of_two(half) * _power_of_two(power - half)


@triton.jit
def _sum_of_squares(x):
    """[R] of [R, NB, 16]: a binary tree over adjacent columns, by sums of two, which commute."""
    R: tl.constexpr = x.shape[0]
    LEVELS: tl.constexpr = log2(x.shape[1] * 16)
    terms = tl.reshape(x * x, (R, x.shape[1] * 16))
    for _ in tl.static_range(LEVELS):
        terms = tl.sum(tl.reshape(terms, (R, terms.shape[1] // 2, 2)), 2)
    return tl.reshape(terms, (R,))


@triton.jit
def _rounded(y, DTYPE: tl.constexpr, ARCH: tl.constexpr):
    """To x's dtype, to nearest even."""
    if DTYPE == BF16:
        z = to_bf16(y, ARCH)
    else:
        z = y.to(tl.float16)
    return z


@triton.jit
def _widened(z, DTYPE: tl.constexpr):
    """Widen to fp32, bf16 by its bits."""
    if DTYPE == BF16:
        x = widened_bits(z)
    else:
        x = z.to(tl.float32)
    return x


@triton.jit
def _quantize_rows(
    x, row, block, live, scale_ptr, rcp_delta_ptr, codes_ptr, sf_ptr, token_ptr, scale_value, NB,
    padded_columns, RECIPE: tl.constexpr, DTYPE: tl.constexpr, LAYOUT: tl.constexpr,
    ARCH: tl.constexpr,
):  # fmt: skip
    """Codes, block scales and per-token scales of whole rows x [R, NBP, 16]."""
    FTZ: tl.constexpr = flushes(RECIPE)
    amax = tl.max(tl.abs(x), 2)
    row_amax = flush(or_zero(tl.max(or_zero(amax), 1)), FTZ, ARCH)[:, None]
    if scale_ptr is None:
        g = tl.zeros_like(row_amax) + scale_value
    else:
        g = tl.zeros_like(row_amax) + tl.load(scale_ptr)
    encode, token = row_scales(row_amax, g, rcp_delta_ptr, RECIPE, ARCH)
    tl.store(token_ptr + row, token, live)
    byte, codes = quantize_block(
        x, amax, encode, row_amax, rcp_delta_ptr, RECIPE, PER_TOKEN, DTYPE, ARCH
    )
    store_codes(codes, byte, row, block, live, codes_ptr, sf_ptr, NB, padded_columns, LAYOUT)


@triton.jit(do_not_specialize=["M", "padded_rows"])
def producer_kernel(
    x_ptr,  # [M, 16 NB] as int32 words; with SILU_AND_MUL [M, 32 NB], gate and up
    residual_ptr,  # [M, 16 NB] bf16 or fp16, read and written; with ADD_RMSNORM
    weight_ptr,  # [16 NB] as int32 words; None with SILU_AND_MUL
    scale_ptr,  # fp32 [1], or None
    rcp_delta_ptr,  # [2^23] int8, in the interpreter
    codes_ptr,  # [M, 2 NB] int32; None with values
    sf_ptr,  # [padded_rows, padded_columns] uint8; None with values
    token_ptr,  # [M] fp32; None with values
    values_ptr,  # [M, 16 NB] bf16 or fp16: what would be quantized, in place of it; or None
    scale_value,  # fp32, without scale_ptr
    eps,
    M,
    NB,
    padded_rows,
    padded_columns,
    KIND: tl.constexpr,
    RECIPE: tl.constexpr,  # Recipe.code
    DTYPE: tl.constexpr,
    LAYOUT: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCKS: tl.constexpr,  # a power of two >= padded_columns
    ARCH: tl.constexpr,
):
    await_previous(ARCH)
    if LAYOUT != LAYOUT_LINEAR and values_ptr is None:
        row_programs = (M + ROWS - 1) // ROWS
        if tl.program_id(0) >= row_programs:
            first = (tl.program_id(0) - row_programs) * ROWS * BLOCKS
            zero_padding_rows(sf_ptr, M, padded_rows, padded_columns, first, ROWS * BLOCKS, LAYOUT)
            return

    row = (tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS))[:, None]
    live = row < M
    block = tl.arange(0, BLOCKS)[None, :]
    mask = live & (block < NB)
    start = (row * NB * 16)[:, :, None]
    column = block[:, :, None] * 16 + tl.arange(0, 16)[None, None, :]
    if KIND == SILU_AND_MUL:
        gate = block_values(load_blocks(x_ptr, row, block, mask, 2 * NB, DTYPE), DTYPE)
        up = block_values(load_blocks(x_ptr, row, block + NB, mask, 2 * NB, DTYPE), DTYPE)
        FTZ: tl.constexpr = flushes(RECIPE)
        y = mul(div(gate, 1.0 + _exp(-gate), FTZ, ARCH), up, FTZ, ARCH)
    else:
        x = block_values(load_blocks(x_ptr, row, block, mask, NB, DTYPE), DTYPE)
        if KIND == ADD_RMSNORM:
            words = residual_ptr.to(tl.pointer_type(tl.int32))
            x = x + block_values(load_blocks(words, row, block, mask, NB, DTYPE), DTYPE)
            tl.store(residual_ptr + start + column, _rounded(x, DTYPE, ARCH), mask[:, :, None])
        columns = tl.zeros((ROWS,), tl.float32) + NB * 16
        mean = div(_sum_of_squares(x), columns, False, ARCH)
        r = reciprocal(tl.sqrt_rn(mean + eps), False, ARCH)
        weight = load_blocks(weight_ptr, tl.zeros((1, 1), tl.int64), block, block < NB, NB, DTYPE)
        y = x * r[:, None, None] * block_values(weight, DTYPE)
    z = _rounded(y, DTYPE, ARCH)
    if values_ptr is not None:
        tl.store(values_ptr + start + column, z, mask[:, :, None])
    else:
        _quantize_rows(
            _widened(z, DTYPE), row, block, live, scale_ptr, rcp_delta_ptr, codes_ptr, sf_ptr,
            token_ptr, scale_value, NB, padded_columns, RECIPE, DTYPE, LAYOUT, ARCH,
        )  # fmt: skip
