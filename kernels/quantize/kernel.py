"""The quantizer kernel: every recipe, input type and layout of NVFP4 in one Triton function.

A program owns ROWS rows of NBP blocks of 16 (NBP a power of two >= the row's blocks, unless the row
is longer and the program walks along it twice). Words of memory are laid out so that one thread
holds whole blocks: two 16-byte loads, no exchange between threads but for the row's maximum, one
8-byte store. `reference/quantize.py` explains the arithmetic; names are the same here.
"""

# SPDX-License-Identifier: Apache-2.0
import triton
import triton.language as tl

from ..jit.arithmetic import flush, larger, mul, rcp, reciprocal
from ..jit.decode import decode_values
from ..jit.e4m3 import e4m3_decode
from ..jit.formats import E4M3, FP32, LAYOUT_LINEAR, PER_TOKEN, ROW_SCALES
from ..jit.fragments import join_fourths, load_places, store_at_places, store_fragments
from ..jit.load import block_maxima, block_values, load_blocks
from ..jit.pdl import await_previous
from ..jit.recipe import compares_inputs, flushes, is_exact
from ..jit.store import store_codes, zero_padding_rows
from .block import (
    may_saturate,
    or_zero,
    prescale_e4m3,
    quantize_block,
    quantize_fp32_block,
    row_scales,
)


@triton.jit
def _load_parts(
    x_ptr,
    row,
    block,
    live,
    NB,
    PARTS: tl.constexpr,
    BLOCKS: tl.constexpr,
    DTYPE: tl.constexpr,
    ARCH: tl.constexpr,
):
    """Load PARTS times BLOCKS blocks of a row: (words, block maxima), each a tuple of PARTS."""
    parts = ()  # type: tuple
    maxima = ()  # type: tuple
    for i in tl.static_range(PARTS):
        mask = live & (block + i * BLOCKS < NB)
        words = load_blocks(x_ptr, row, block, mask, NB, DTYPE, i * BLOCKS)
        parts = parts + (words,)  # noqa: RUF005, Triton has no star
        maxima = maxima + (block_maxima(words, DTYPE, ARCH),)  # noqa: RUF005
    return parts, maxima


@triton.jit
def _larger_and_smaller(a, b, c, d):
    return tl.maximum(a, c), tl.minimum(b, d)


@triton.jit
def _extremes(maxima, LEAST: tl.constexpr, ARCH: tl.constexpr):
    """Return (largest, least) [ROWS] of a tuple of blocks' maxima [ROWS, NB].

    The largest takes NaN for 0. The least takes 0 and NaN for infinity; without LEAST it is the largest.
    """
    largest = maxima[0]
    for i in tl.static_range(1, len(maxima)):
        largest = larger(largest, maxima[i], ARCH)
    if LEAST:
        least = tl.where(maxima[0] > 0, maxima[0], float("inf"))
        for i in tl.static_range(1, len(maxima)):
            least = tl.minimum(least, tl.where(maxima[i] > 0, maxima[i], float("inf")))
        row_amax, row_least = tl.reduce((largest, least), 1, _larger_and_smaller)
        return or_zero(row_amax), row_least
    row_amax = or_zero(tl.max(largest, 1))
    return row_amax, row_amax


@triton.jit
def _read_extremes(
    x_ptr, row, column, live, NB, DTYPE: tl.constexpr, LEAST: tl.constexpr, ARCH: tl.constexpr
):
    """Return `_extremes` of the blocks at (row, column)."""
    words = load_blocks(x_ptr, row, column, live & (column < NB), NB, DTYPE)
    return _extremes((block_maxima(words, DTYPE, ARCH),), LEAST, ARCH)


@triton.jit
def _quantize_and_store(
    words, amax, encode, token, row_amax, saturates, row, first, live, codes_ptr, sf_ptr, values_ptr,
    places, rcp_delta_ptr, NB, padded_columns,
    RECIPE: tl.constexpr, MODE: tl.constexpr, DTYPE: tl.constexpr, LAYOUT: tl.constexpr,
    BLOCKS: tl.constexpr, SHIFT: tl.constexpr, TWICE: tl.constexpr, FRAGMENTS: tl.constexpr,
    SLOTS: tl.constexpr, ARCH: tl.constexpr,
):  # fmt: skip
    """Store codes and scales, or values, of BLOCKS blocks of live rows from block `first` + SHIFT."""
    column = first + tl.arange(0, BLOCKS)[None, :]
    x = block_values(words, DTYPE)
    if DTYPE == E4M3:
        x = prescale_e4m3(x, encode, rcp_delta_ptr, RECIPE, ARCH)
        amax = tl.max(tl.abs(x), 2)
    if DTYPE == FP32 and MODE == PER_TOKEN:
        byte, codes = quantize_fp32_block(x, amax, token, rcp_delta_ptr, ARCH)
    else:
        byte, codes = quantize_block(
            x, amax, encode, row_amax, rcp_delta_ptr, RECIPE, MODE, DTYPE, ARCH, saturates, TWICE
        )
    if FRAGMENTS:
        x = _values(codes, byte, ARCH)
        store_fragments(x, values_ptr, places, (first + SHIFT) * 16, NB * 16, SLOTS)
    elif values_ptr is not None:
        column += SHIFT
        _store_values(values_ptr, codes, byte, row, column, live & (column < NB), NB, ARCH)
    else:
        store_codes(
            codes, byte, row, column, live, codes_ptr, sf_ptr, NB, padded_columns, LAYOUT, SHIFT
        )


@triton.jit
def _words(codes):
    """Return codes [R, NB, 2] of eight as [R, NB, 4] of four."""
    halves = codes[:, :, :, None] >> (tl.arange(0, 2) * 16)[None, None, None, :]
    return tl.reshape(halves.to(tl.uint16), (codes.shape[0], codes.shape[1], 4))


@triton.jit
def _values(codes, byte, ARCH: tl.constexpr):
    """Return codes [R, NB, 2] times block scales: [R, 16 NB] bf16."""
    words = _words(codes)
    scale = e4m3_decode(byte)[:, :, None]
    return join_fourths(
        decode_values(words, scale, 0, ARCH), decode_values(words, scale, 1, ARCH),
        decode_values(words, scale, 2, ARCH), decode_values(words, scale, 3, ARCH),
    )  # fmt: skip


@triton.jit
def _store_values(values_ptr, codes, byte, row, column, mask, NB, ARCH: tl.constexpr):
    """Store codes [R, NB, 2] times block scales to [M, 4, K/4] bf16, each fourth column together."""
    words = _words(codes)
    scale = e4m3_decode(byte)[:, :, None]
    for i in tl.static_range(4):
        offset = ((row * 4 + i) * NB + column)[:, :, None] * 4 + tl.arange(0, 4)[None, None, :]
        tl.store(values_ptr + offset, decode_values(words, scale, i, ARCH), mask[:, :, None])


@triton.jit(do_not_specialize=["M", "padded_rows"])  # serving meets every M
def quantize_kernel(
    x_ptr,  # [M, 16 NB] as int32 words
    row_index_ptr,  # [>= M] int32, with HAS_ROW_INDEX
    scale_ptr,  # fp32 [1] or [M], with HAS_SCALE_TENSOR
    out_scale_ptr,  # fp32 [1], with HAS_OUT_SCALE
    rcp_delta_ptr,  # [2^23] int8, in the interpreter
    codes_ptr,  # [M, 2 NB] int32; None with values
    sf_ptr,  # [padded_rows, padded_columns] uint8; None with values
    values_ptr,  # bf16, or None: [M, 4, 4 NB]; with FRAGMENTS [rows, 16 NB rounded up to 128]
    place_ptr,  # [M, SLOTS] int32, with SLOTS: the rows that values and scales go to, -1: none
    token_ptr,  # [M or rows] fp32, with MODE PER_TOKEN
    scale_value,  # fp32, without HAS_SCALE_TENSOR
    M,
    NB,
    padded_rows,
    padded_columns,
    RECIPE: tl.constexpr,  # Recipe.code
    MODE: tl.constexpr,
    DTYPE: tl.constexpr,
    LAYOUT: tl.constexpr,
    INVERSE: tl.constexpr,
    HAS_ROW_INDEX: tl.constexpr,
    HAS_SCALE_TENSOR: tl.constexpr,
    HAS_OUT_SCALE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCKS: tl.constexpr,  # quantized by a program at a time
    PARTS: tl.constexpr,  # times BLOCKS, kept from the one read
    READ: tl.constexpr,  # read at a time for the row's maximum (all, if SPLITS); 0: one read in all
    SPLITS: tl.constexpr,  # programs that share the columns of a row
    FRAGMENTS: tl.constexpr,  # values in the order of `jit/fragments.py`; 8 divides BLOCKS
    SLOTS: tl.constexpr,
    ARCH: tl.constexpr,
):
    await_previous(ARCH)
    FTZ: tl.constexpr = flushes(RECIPE)
    if LAYOUT != LAYOUT_LINEAR:
        row_programs = (M + ROWS - 1) // ROWS
        if tl.program_id(0) >= row_programs:
            first = (tl.program_id(0) - row_programs) * SPLITS + tl.program_id(1)
            zero_padding_rows(
                sf_ptr, M, padded_rows, padded_columns, first * ROWS * BLOCKS, ROWS * BLOCKS, LAYOUT
            )
            return

    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    live = row < M
    if HAS_ROW_INDEX:
        row = tl.load(row_index_ptr + row, live, other=-1).to(tl.int64)
        live = live & (row >= 0) & (row < M)
        if tl.max(live.to(tl.int32), 0) == 0:
            return  # most rows of masked input
    row, live = row[:, None], live[:, None]
    first = tl.program_id(1) * BLOCKS
    block = first + tl.arange(0, BLOCKS)[None, :]

    places = load_places(place_ptr, row, live, SLOTS)
    if MODE == ROW_SCALES:
        given = tl.load(scale_ptr + row, live, other=1.0)
    elif HAS_SCALE_TENSOR:
        given = tl.load(scale_ptr + tl.zeros_like(row))
    else:
        given = tl.zeros((ROWS, 1), tl.float32) + scale_value

    if MODE != PER_TOKEN or READ == 0 or SPLITS != 1:
        # With SPLITS, the program's own blocks are on their way while it reads the row.
        parts, maxima = _load_parts(x_ptr, row, block, live, NB, PARTS, BLOCKS, DTYPE, ARCH)

    if MODE == PER_TOKEN:
        LEAST: tl.constexpr = compares_inputs(RECIPE) and DTYPE != E4M3 and ARCH != 0
        if READ == 0:
            row_amax, least = _extremes(maxima, LEAST, ARCH)
        else:
            ahead = tl.arange(0, READ)[None, :]
            row_amax, least = _read_extremes(x_ptr, row, ahead, live, NB, DTYPE, LEAST, ARCH)
            if SPLITS == 1:
                for start in range(READ, NB, READ):
                    more, less = _read_extremes(
                        x_ptr, row, start + ahead, live, NB, DTYPE, LEAST, ARCH
                    )
                    row_amax = tl.maximum(row_amax, more)
                    least = tl.minimum(least, less)
        row_amax, least = flush(row_amax, FTZ, ARCH)[:, None], least[:, None]
        encode, token = row_scales(row_amax, given, rcp_delta_ptr, RECIPE, ARCH)
        saturates = may_saturate(least, encode, row_amax) if LEAST else None
        shown = token
        if HAS_OUT_SCALE:
            shown = mul(token, tl.load(out_scale_ptr), FTZ, ARCH)
        if tl.program_id(1) == 0:
            store_at_places(shown, token_ptr, places, True, 1, SLOTS)
    else:
        row_amax = given
        encode = given
        saturates = None
        if INVERSE:
            if is_exact(RECIPE):
                encode = reciprocal(given, FTZ, ARCH)
            else:
                # Nothing subnormal comes out; but the assembler would cancel rcp(rcp(x)).
                encode = flush(rcp(given, rcp_delta_ptr, ARCH), True, ARCH)
        encode = flush(encode, FTZ, ARCH)
        token = encode

    if MODE == PER_TOKEN and READ != 0 and SPLITS == 1:
        for start in range(0, padded_columns, BLOCKS):
            column = start + block
            words = load_blocks(x_ptr, row, column, live & (column < NB), NB, DTYPE)
            _quantize_and_store(
                words, block_maxima(words, DTYPE, ARCH), encode, token, row_amax, saturates, row,
                start, live, codes_ptr, sf_ptr, values_ptr, places, rcp_delta_ptr, NB, padded_columns,
                RECIPE, MODE, DTYPE, LAYOUT, BLOCKS, 0, ARCH >= 89, FRAGMENTS, SLOTS, ARCH,
            )  # fmt: skip
    else:
        TWICE: tl.constexpr = PARTS > 1 and ARCH >= 89  # both candidates would not fit before
        for i in tl.static_range(PARTS):
            _quantize_and_store(
                parts[i], maxima[i], encode, token, row_amax, saturates, row, first, live,
                codes_ptr, sf_ptr, values_ptr, places, rcp_delta_ptr, NB, padded_columns,
                RECIPE, MODE, DTYPE, LAYOUT, BLOCKS, i * BLOCKS, TWICE, FRAGMENTS, SLOTS, ARCH,
            )  # fmt: skip


@triton.jit
def quantize_row_to_places(
    words, x_ptr, row, first, places, values_ptr, token_ptr, base_scale_inv, rcp_delta_ptr, NB,
    RECIPE: tl.constexpr, DTYPE: tl.constexpr, BLOCKS: tl.constexpr, READ: tl.constexpr,
    SLOTS: tl.constexpr, ARCH: tl.constexpr,
):  # fmt: skip
    """Quantize BLOCKS blocks of one row per token, from block `first`: values in fragments, at `places`.

    Args:
        words: of the BLOCKS blocks, by `load_blocks`.
        x_ptr: [M, 16 NB] as int32 words.
        row: [1, 1] int64.
        READ: a power of two >= NB, where the BLOCKS are a part of the row; 0: they are the row.
    """
    FTZ: tl.constexpr = flushes(RECIPE)
    live = row >= 0
    maxima = block_maxima(words, DTYPE, ARCH)
    LEAST: tl.constexpr = compares_inputs(RECIPE) and DTYPE != E4M3 and ARCH != 0
    if READ == 0:
        row_amax, least = _extremes((maxima,), LEAST, ARCH)
    else:
        ahead = tl.arange(0, READ)[None, :]
        row_amax, least = _read_extremes(x_ptr, row, ahead, live, NB, DTYPE, LEAST, ARCH)
    row_amax, least = flush(row_amax, FTZ, ARCH)[:, None], least[:, None]
    given = tl.zeros((1, 1), tl.float32) + base_scale_inv
    encode, token = row_scales(row_amax, given, rcp_delta_ptr, RECIPE, ARCH)
    saturates = may_saturate(least, encode, row_amax) if LEAST else None
    if first == 0:
        store_at_places(token, token_ptr, places, True, 1, SLOTS)
    _quantize_and_store(
        words, maxima, encode, token, row_amax, saturates, row, first, live, None, None, values_ptr,
        places, rcp_delta_ptr, NB, NB, RECIPE, PER_TOKEN, DTYPE, LAYOUT_LINEAR, BLOCKS, 0, False,
        True, SLOTS, ARCH,
    )  # fmt: skip
