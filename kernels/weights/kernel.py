"""Weights of many experts to NVFP4 in the prepared layout: their maxima, then codes and scales.

A program owns BLOCKS blocks of 16 that follow one another in an expert's natural rows, whatever the
row's length, and puts each where `reference/weights/experts.py` wants it. `reference/weights/update.py`
has the contract; the arithmetic is `quantize/kernel.py`'s with a global scale.
"""

# SPDX-License-Identifier: Apache-2.0
import triton
import triton.language as tl

from ...reference.weights import scalars
from ..jit.arithmetic import div, flush, mul, reciprocal
from ..jit.formats import BF16, GLOBAL_SCALE, LAYOUT_128X4
from ..jit.load import block_maxima, block_values, load_blocks
from ..jit.pdl import await_previous
from ..jit.recipe import flushes
from ..jit.store import store_codes
from ..quantize.block import quantize_block

MOST_RAW, MOST_OF_WEIGHTS, LARGEST = (
    tl.constexpr(value) for value in (scalars.MOST_RAW, scalars.MOST_OF_WEIGHTS, scalars.LARGEST)
)


@triton.jit
def _finite(x):
    return tl.where(x > LARGEST, LARGEST, x)


@triton.jit
def _largest_bits(x_ptr, offset, mask, DTYPE: tl.constexpr):
    """The largest magnitude of the words there, as fp32 bits; of any NaN, NaN."""
    word = tl.load(x_ptr + offset, mask, other=0)
    high = tl.max((word >> 16) & 0x7FFF, 0)
    half = tl.maximum(tl.max(word & 0x7FFF, 0), high)  # magnitudes of 16 bits order as integers do
    if DTYPE == BF16:
        bits = half << 16
    else:
        bits = half.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
        bits = bits.to(tl.int32, bitcast=True)
    return bits


@triton.jit
def amax_kernel(
    x_ptr,  # [n, words] int32: two elements a word
    amax_ptr,  # [n] int32, bits of fp32, zeros before
    words,  # of an expert
    DTYPE: tl.constexpr,
    WORDS: tl.constexpr,  # of a program, at a time
    STEPS: tl.constexpr,
    ARCH: tl.constexpr,
):
    await_previous(ARCH)
    expert = tl.program_id(1)
    base = x_ptr + expert.to(tl.int64) * words
    first = tl.program_id(0) * (WORDS * STEPS) + tl.arange(0, WORDS)
    largest = 0
    for i in tl.static_range(STEPS):
        offset = first + i * WORDS
        largest = tl.maximum(largest, _largest_bits(base, offset, offset < words, DTYPE))
    tl.atomic_max(amax_ptr + expert, largest, sem="relaxed")


@triton.jit
def _shuffled(row, half_rows, GATED: tl.constexpr):
    """Return the place of a natural row: the inverse of `reference.weights.experts.row_order`."""
    if GATED:
        second = row >= half_rows
        row = tl.where(second, (row - half_rows) * 2 + 1, row * 2)
    # Of 32 rows, row 4 a + b goes to place 8 b + a.
    return (row & -32) | ((row & 3) << 3) | ((row >> 2) & 7)


@triton.jit
def load_weights_kernel(
    x_ptr,  # [n, rows, 16 NB] as int32 words
    amax_ptr,  # [n] fp32
    added_ptr,  # [n] fp32, or None
    rcp_delta_ptr,  # [2^23] int8, in the interpreter
    codes_ptr,  # [n, padded_rows, 2 padded_blocks] int32
    sf_ptr,  # [n, padded_rows, padded_blocks] uint8, 128x4
    scalar_ptr,  # [n] fp32
    divisor_ptr,  # [1] fp32, or None
    up_scalar_ptr,  # [n] fp32, or None
    factor_ptr,  # [1] fp32, or None
    largest,  # 6 * e4m3_max
    rows,
    half_rows,  # of up, with GATED
    NB,
    padded_rows,
    padded_blocks,
    RECIPE: tl.constexpr,  # Recipe.code
    DTYPE: tl.constexpr,
    GATED: tl.constexpr,
    BLOCKS: tl.constexpr,
    ARCH: tl.constexpr,
):
    await_previous(ARCH)
    FTZ: tl.constexpr = flushes(RECIPE)
    expert = tl.program_id(1).to(tl.int64)
    amax = tl.load(amax_ptr + expert)
    encode = mul(reciprocal(amax, False, ARCH), largest, False, ARCH)
    encode = tl.where(amax == 0, 1.0, encode)
    # `reference.weights.scalars.most_encode_scale`
    most = tl.full((), MOST_RAW, tl.float32)
    if added_ptr is not None:
        most = div(most, tl.load(added_ptr + expert), False, ARCH)
    if divisor_ptr is not None:
        most = div(most, tl.load(divisor_ptr), False, ARCH)
    most = tl.minimum(most, MOST_OF_WEIGHTS)
    encode = tl.where(encode > most, most, encode)
    if tl.program_id(0) == 0:
        scalar = reciprocal(encode, False, ARCH)
        if divisor_ptr is not None:
            scalar = _finite(div(scalar, tl.load(divisor_ptr), False, ARCH))
        tl.store(scalar_ptr + expert, scalar)
        if up_scalar_ptr is not None:
            if factor_ptr is not None:
                scalar = _finite(mul(scalar, tl.load(factor_ptr), False, ARCH))
            tl.store(up_scalar_ptr + expert, scalar)
    encode = flush(encode, FTZ, ARCH) + tl.zeros((1, 1), tl.float32)

    index = (tl.program_id(0) * BLOCKS + tl.arange(0, BLOCKS))[None, :]
    live = index < rows * NB
    source = x_ptr + expert * rows * NB * 8
    words = load_blocks(source, tl.zeros((1, 1), tl.int64), index, live, 0, DTYPE)
    byte, codes = quantize_block(
        block_values(words, DTYPE),
        block_maxima(words, DTYPE, ARCH),
        encode,
        encode,
        rcp_delta_ptr,
        RECIPE,
        GLOBAL_SCALE,
        DTYPE,
        ARCH,
    )
    row, column = index // NB, index % NB
    # 128x4 tiles do not cross experts, whose padded rows are a multiple of 128.
    target = expert * padded_rows + _shuffled(row, half_rows, GATED)
    store_codes(
        codes,
        byte,
        target,
        column,
        live,
        codes_ptr,
        sf_ptr,
        padded_blocks,
        padded_blocks,
        LAYOUT_128X4,
    )
