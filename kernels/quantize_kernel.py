"""The quantizer kernel: every recipe, input type and layout of NVFP4 in one Triton function.

A program owns ROWS rows of NBP blocks of 16 (NBP a power of two >= the row's blocks, unless the row
is longer and the program walks along it twice). Words of memory are laid out so that one thread
holds whole blocks: two 16-byte loads, no exchange between threads but for the row's maximum, one
8-byte store. `reference/quantize.py` explains the arithmetic; names are the same here.
"""

# SPDX-License-Identifier: Apache-2.0
import triton
import triton.language as tl

from .leaves import (
    FLT_MAX,
    SIXTH,
    add,
    await_previous,
    columns,
    decode_values,
    div,
    e2m1_encode,
    e2m1_encode_magnitudes,
    e2m1_signs,
    e4m3_decode,
    e4m3_encode,
    flush,
    larger,
    mul,
    rcp,
    reciprocal,
    smaller,
    sub,
)

BF16 = tl.constexpr(0)
FP16 = tl.constexpr(1)
E4M3 = tl.constexpr(2)
FP32 = tl.constexpr(3)

PER_TOKEN = tl.constexpr(0)
GLOBAL_SCALE = tl.constexpr(1)
ROW_SCALES = tl.constexpr(2)  # global scales, one a row

LAYOUT_128X4 = tl.constexpr(0)
LAYOUT_8X4 = tl.constexpr(1)
LAYOUT_LINEAR = tl.constexpr(2)


@triton.jit
def _load_words(x_ptr, row, block, mask, NB, FIRST: tl.constexpr, WORDS: tl.constexpr):
    """Four 32-bit words of each block, [ROWS, NBP, 4], from word FIRST of the block's WORDS."""
    word = (row * NB + block)[:, :, None] * WORDS + FIRST + tl.arange(0, 4)[None, None, :]
    return tl.load(x_ptr + word, mask[:, :, None], other=0)


@triton.jit
def _load(x_ptr, row, block, mask, NB, DTYPE: tl.constexpr):
    """Blocks of x as they are in memory, a tuple of words [ROWS, NBP, 4]; zero outside the mask."""
    WORDS: tl.constexpr = 16 if DTYPE == FP32 else 4 if DTYPE == E4M3 else 8
    words = ()
    for i in tl.static_range(WORDS // 4):
        words = words + (_load_words(x_ptr, row, block, mask, NB, 4 * i, WORDS),)  # noqa: RUF005
    return words


@triton.jit
def _values(words, DTYPE: tl.constexpr):
    """What `_load` read as fp32, [ROWS, NBP, 16], element order kept."""
    R: tl.constexpr = words[0].shape[0]
    NBP: tl.constexpr = words[0].shape[1]
    if DTYPE == FP32:
        x = tl.join(tl.join(words[0], words[1]), tl.join(words[2], words[3]))
        # [.., word, 2, 2], the last index the major.
        x = tl.permute(x, (0, 1, 4, 3, 2)).to(tl.float32, bitcast=True)
    elif DTYPE == E4M3:
        x = e4m3_decode(
            (words[0][:, :, :, None] >> (tl.arange(0, 4) * 8)[None, None, None, :]) & 0xFF
        )
    else:
        even, odd = _two_values(tl.join(words[0], words[1]), DTYPE)
        x = tl.permute(tl.join(even, odd), (0, 1, 3, 2, 4))
    return tl.reshape(x, (R, NBP, 16))


@triton.jit
def _two_values(w, DTYPE: tl.constexpr):
    """The (even, odd) elements of words of bf16 or fp16."""
    if DTYPE == BF16:
        even = (w << 16).to(tl.float32, bitcast=True)
        odd = (w & -65536).to(tl.float32, bitcast=True)
    else:
        even = w.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
        odd = (w >> 16).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    return even, odd


@triton.jit
def _max_abs_bf16x2(a, b):
    return tl.inline_asm_elementwise(
        "max.xorsign.abs.bf16x2 $0, $1, $2;", "=r,r,r", [a, b], tl.int32, True, 1
    )


@triton.jit
def _max_abs_f16x2(a, b):
    return tl.inline_asm_elementwise(
        "max.xorsign.abs.f16x2 $0, $1, $2;", "=r,r,r", [a, b], tl.int32, True, 1
    )


@triton.jit
def _block_maxima(words, DTYPE: tl.constexpr, ARCH: tl.constexpr):
    """Largest magnitudes [ROWS, NBP]; of a block of nothing but NaN, NaN or 0."""
    if ARCH < 86 or (DTYPE != BF16 and DTYPE != FP16):
        amax = tl.max(tl.abs(_values(words, DTYPE)), 2)
    else:
        # Two at a time, as they lie in memory: fewer instructions, and half the registers while the
        # row's maximum is awaited.
        if DTYPE == BF16:
            w = tl.reduce(_max_abs_bf16x2(words[0], words[1]), 2, _max_abs_bf16x2)
        else:
            w = tl.reduce(_max_abs_f16x2(words[0], words[1]), 2, _max_abs_f16x2)
        even, odd = _two_values(w, DTYPE)
        amax = larger(tl.abs(even), tl.abs(odd), ARCH)
    return amax


@triton.jit
def _load_parts(
    x_ptr, row, block, live, NB,
    PARTS: tl.constexpr, BLOCKS: tl.constexpr, DTYPE: tl.constexpr, ARCH: tl.constexpr,
):  # fmt: skip
    """(words, block maxima) of PARTS times BLOCKS blocks of a row, each a tuple of PARTS."""
    parts = ()
    maxima = ()
    for i in tl.static_range(PARTS):
        column = block + i * BLOCKS
        words = _load(x_ptr, row, column, live & (column < NB), NB, DTYPE)
        parts = parts + (words,)  # noqa: RUF005, Triton has no star
        maxima = maxima + (_block_maxima(words, DTYPE, ARCH),)  # noqa: RUF005
    return parts, maxima


@triton.jit
def _or_zero(amax):
    """A maximum of magnitudes, 0 for NaN."""
    return tl.where(amax > 0, amax, 0.0)


@triton.jit
def _read_maximum(x_ptr, row, column, live, NB, DTYPE: tl.constexpr, ARCH: tl.constexpr):
    """Largest magnitudes [ROWS] of the blocks at (row, column)."""
    words = _load(x_ptr, row, column, live & (column < NB), NB, DTYPE)
    return _or_zero(tl.max(_block_maxima(words, DTYPE, ARCH), 1))


@triton.jit
def _row_scales(amax, g, rcp_delta_ptr, RECIPE: tl.constexpr, ARCH: tl.constexpr):
    """(encode scale, per-token scale) of rows with the given maxima."""
    FTZ: tl.constexpr = (RECIPE & 64) == 0
    zero_encode: tl.constexpr = 0.0 if RECIPE & 1 else FLT_MAX
    if RECIPE & 32:
        encode = smaller(div(reciprocal(g, FTZ, ARCH), amax, FTZ, ARCH), FLT_MAX, ARCH)
        encode = tl.where(encode == 0, 1.0, encode)
        encode = tl.where(amax == 0, zero_encode, encode)
        return encode, tl.where(amax == 0, 0.0, reciprocal(encode, FTZ, ARCH))
    scale = mul(amax, g, FTZ, ARCH)
    encode = rcp(scale, rcp_delta_ptr, ARCH)
    if FTZ:
        return tl.where(scale == 0, 0.0, encode), scale
    return tl.where(amax == 0, zero_encode, encode), scale


@triton.jit
def _output_scale(
    sf, encode, rcp_delta_ptr, EXACT: tl.constexpr, FTZ: tl.constexpr, ARCH: tl.constexpr
):
    if EXACT:
        decode = reciprocal(encode, FTZ, ARCH)
        return smaller(reciprocal(mul(sf, decode, FTZ, ARCH), FTZ, ARCH), FLT_MAX, ARCH)
    decode = rcp(encode, rcp_delta_ptr, ARCH)
    return rcp(mul(sf, decode, FTZ, ARCH), rcp_delta_ptr, ARCH)


@triton.jit
def _ordered_sum(terms, FTZ: tl.constexpr, ARCH: tl.constexpr):
    """[R, NB, 16] summed left to right: the order decides near ties."""
    R: tl.constexpr = terms.shape[0]
    NB: tl.constexpr = terms.shape[1]
    halves = tl.permute(tl.reshape(terms, (R, NB, 2, 8)), (0, 1, 3, 2))
    first, second = tl.split(halves)
    a0, a1, a2, a3, a4, a5, a6, a7 = columns(tl.reshape(first, (R, NB, 1, 8)))
    b0, b1, b2, b3, b4, b5, b6, b7 = columns(tl.reshape(second, (R, NB, 1, 8)))
    total = add(add(add(a0, a1, FTZ, ARCH), a2, FTZ, ARCH), a3, FTZ, ARCH)
    total = add(add(add(total, a4, FTZ, ARCH), a5, FTZ, ARCH), a6, FTZ, ARCH)
    total = add(add(add(total, a7, FTZ, ARCH), b0, FTZ, ARCH), b1, FTZ, ARCH)
    total = add(add(add(total, b2, FTZ, ARCH), b3, FTZ, ARCH), b4, FTZ, ARCH)
    total = add(add(add(total, b5, FTZ, ARCH), b6, FTZ, ARCH), b7, FTZ, ARCH)
    return tl.reshape(total, (R, NB))


@triton.jit
def _divide_by_constant(p, D: tl.constexpr):
    """p / D, correctly rounded where nothing in here is subnormal or overflows."""
    INVERSE: tl.constexpr = 1.0 / D
    q = p * INVERSE
    return tl.fma(tl.fma(q, -D, p), INVERSE, q)


@triton.jit
def _candidate(
    a, unrounded, encode, decode, row_amax, rcp_delta_ptr,
    RECIPE: tl.constexpr, MODE: tl.constexpr, NEAR_ONE: tl.constexpr, ARCH: tl.constexpr,
):  # fmt: skip
    """(scale byte, output scale, packed magnitudes, error) of one of 4over6's two block scales.

    Magnitudes a [R, NB, 16] have the differences of signed values, and round alike.
    """
    FTZ: tl.constexpr = (RECIPE & 64) == 0
    byte = e4m3_encode(unrounded, ARCH)
    sf = e4m3_decode(byte)
    output_scale = _output_scale(sf, encode, rcp_delta_ptr, (RECIPE & 32) != 0, FTZ, ARCH)
    words, rounded = e2m1_encode_magnitudes(mul(a, output_scale[:, :, None], FTZ, ARCH), ARCH)
    if NEAR_ONE:
        # sf * row_amax, and its product with a code, are exact: at most 11 + 4 + 2 significant bits.
        # All is 2^-26 of itself until the division.
        SHIFT: tl.constexpr = 2.0**-26
        D: tl.constexpr = (1536.0 if RECIPE & 2 else 2688.0) * SHIFT
        by_row = rounded * (sf * (row_amax * 2.0**100))[:, :, None]
        difference = sub(_divide_by_constant(by_row, D), a, FTZ, ARCH)
    else:
        scaled = rounded * 2.0**126 * sf[:, :, None]  # exact
        if RECIPE & 16:
            difference = sub(scaled, mul(a, encode[:, :, None], FTZ, ARCH), FTZ, ARCH)
        elif MODE == PER_TOKEN:
            # A row maximum of 0 leaves blocks of zeros and of NaN, and both candidates the same.
            by_row = mul(scaled, row_amax[:, :, None], FTZ, ARCH)
            D: tl.constexpr = 1536.0 if RECIPE & 2 else 2688.0
            difference = sub(div(by_row, D, FTZ, ARCH), a, FTZ, ARCH)
        else:
            difference = sub(mul(scaled, decode[:, :, None], FTZ, ARCH), a, FTZ, ARCH)
    if RECIPE & 4:
        term = mul(difference, difference, FTZ, ARCH)
    else:
        term = tl.abs(difference)
    return byte, output_scale, words, _ordered_sum(term, FTZ, ARCH)


@triton.jit
def _four_over_six(
    x, amax, encode, row_amax, rcp_delta_ptr,
    RECIPE: tl.constexpr, MODE: tl.constexpr, NEAR_ONE: tl.constexpr, ARCH: tl.constexpr,
):  # fmt: skip
    """(scale bytes, packed codes): of the block's maximum at 4 if that error is the smaller."""
    FTZ: tl.constexpr = (RECIPE & 64) == 0
    if RECIPE & 32:
        unrounded6 = mul(div(amax, 6.0, FTZ, ARCH), encode, FTZ, ARCH)
        decode = reciprocal(encode, FTZ, ARCH)
    else:
        unrounded6 = mul(encode, mul(amax, SIXTH, FTZ, ARCH), FTZ, ARCH)
        decode = rcp(encode, rcp_delta_ptr, ARCH)
    unrounded4 = mul(unrounded6, 1.5, FTZ, ARCH)
    a = tl.abs(x)
    byte = tl.zeros(amax.shape, tl.int32)
    words = tl.zeros((amax.shape[0], amax.shape[1], 2), tl.int32)
    output = tl.zeros(amax.shape, tl.float32)
    error = tl.zeros(amax.shape, tl.float32)
    unrounded = unrounded6
    # A loop, not two calls: a program of few rows waits for its instructions as much as for its data.
    for i in tl.range(0, 2):
        this_byte, this_output, this_words, this_error = _candidate(
            a, unrounded, encode, decode, row_amax, rcp_delta_ptr, RECIPE, MODE, NEAR_ONE, ARCH
        )
        better = (this_error < error) | (i == 0)
        byte = tl.where(better, this_byte, byte)
        words = tl.where(better[:, :, None], this_words, words)
        output = tl.where(better, this_output, output)
        error = this_error
        unrounded = unrounded4
    y = mul(x, output[:, :, None], FTZ, ARCH)
    words = words | e2m1_signs(y, ARCH)
    zero = amax == 0  # then even -0 gets the code 0
    return tl.where(zero, 0, byte), tl.where(zero[:, :, None], 0, words)


@triton.jit
def _quantize(
    x, amax, encode, row_amax, rcp_delta_ptr,
    RECIPE: tl.constexpr, MODE: tl.constexpr, DTYPE: tl.constexpr, ARCH: tl.constexpr,
):  # fmt: skip
    """(scale bytes [R, NB], packed codes [R, NB, 2]) of blocks x [R, NB, 16] with maxima amax."""
    FTZ: tl.constexpr = (RECIPE & 64) == 0
    EXACT: tl.constexpr = (RECIPE & 32) != 0
    amax = flush(amax, FTZ, ARCH)
    if RECIPE & 1:
        if ARCH != 0 and MODE == PER_TOKEN and not RECIPE & 16:
            far = (row_amax != 0) & ((row_amax < 2.0**-60) | (row_amax > 2.0**16))
            if tl.max(tl.max(far.to(tl.int32), 1), 0) == 0:
                byte, words = _four_over_six(
                    x, amax, encode, row_amax, rcp_delta_ptr, RECIPE, MODE, True, ARCH
                )
            else:
                byte, words = _four_over_six(
                    x, amax, encode, row_amax, rcp_delta_ptr, RECIPE, MODE, False, ARCH
                )
            return byte, words
        return _four_over_six(x, amax, encode, row_amax, rcp_delta_ptr, RECIPE, MODE, False, ARCH)
    if DTYPE == E4M3 and FTZ:  # the CUDA build's kernel for e4m3 has a rule of its own
        unrounded = mul(encode, mul(amax, SIXTH, FTZ, ARCH), FTZ, ARCH)
        byte = e4m3_encode(unrounded, ARCH)
        output_scale = mul(rcp(e4m3_decode(byte), rcp_delta_ptr, ARCH), encode, FTZ, ARCH)
        output_scale = tl.where(unrounded == 0, 0.0, output_scale)
    elif EXACT:
        unrounded = mul(amax, mul(encode, SIXTH, FTZ, ARCH), FTZ, ARCH)
        byte = e4m3_encode(tl.where(amax == 0, 0.0, unrounded), ARCH)
        output_scale = _output_scale(e4m3_decode(byte), encode, rcp_delta_ptr, EXACT, FTZ, ARCH)
        output_scale = tl.where(amax == 0, 0.0, output_scale)
    else:
        unrounded = mul(encode, mul(amax, SIXTH, FTZ, ARCH), FTZ, ARCH)
        byte = e4m3_encode(unrounded, ARCH)
        output_scale = _output_scale(e4m3_decode(byte), encode, rcp_delta_ptr, EXACT, FTZ, ARCH)
        # The CuTe-DSL kernel tests the rounded scale.
        zero = amax == 0 if FTZ else byte == 0
        output_scale = tl.where(zero, 0.0, output_scale)
    return byte, e2m1_encode(x, output_scale, FTZ, ARCH)


@triton.jit
def _quantize_fp32(x, amax, scale, rcp_delta_ptr, ARCH: tl.constexpr):
    """The fp32-input rule: codes from the block's own maximum, the block scale afterwards."""
    amax = flush(_or_zero(amax), True, ARCH)  # a block of nothing but NaN counts as zeros
    output_scale = mul(rcp(amax, rcp_delta_ptr, ARCH), 6.0, True, ARCH)
    output_scale = tl.where(amax == 0, 0.0, output_scale)
    denominator = mul(scale, output_scale, True, ARCH)
    unrounded = tl.where(denominator == 0, 0.0, rcp(denominator, rcp_delta_ptr, ARCH))
    words = e2m1_encode(x, output_scale, True, ARCH)
    return e4m3_encode(unrounded, ARCH), words


@triton.jit
def _scale_offset(row, block, padded_columns, LAYOUT: tl.constexpr):
    """Where the block scales [R, NB] lie; `reference/layouts.py` has the formulas."""
    if LAYOUT == LAYOUT_LINEAR:
        return row * padded_columns + block
    if LAYOUT == LAYOUT_128X4:
        tile = (row // 128) * (padded_columns // 4) + block // 4
        return tile * 512 + (row % 32) * 16 + (row % 128 // 32) * 4 + block % 4
    tile = (row // 8) * (padded_columns // 4) + block // 4
    return tile * 32 + (row % 8) * 4 + block % 4


@triton.jit
def _prescale_e4m3(x, encode, rcp_delta_ptr, RECIPE: tl.constexpr, ARCH: tl.constexpr):
    """e4m3 input is first brought into fp16 (`reference.quantize._e4m3_blocks`)."""
    FTZ: tl.constexpr = (RECIPE & 64) == 0
    if (RECIPE & 32) and not FTZ:
        decode = reciprocal(encode, FTZ, ARCH)
    else:
        decode = rcp(encode, rcp_delta_ptr, ARCH)
    prescale = mul(decode, 6.0, FTZ, ARCH)
    return mul(x, prescale[:, :, None], FTZ, ARCH).to(tl.float16).to(tl.float32)


@triton.jit
def _quantize_and_store(
    words, amax, encode, token, row_amax, row, column, live, codes_ptr, sf_ptr, values_ptr,
    rcp_delta_ptr, NB, padded_columns,
    RECIPE: tl.constexpr, MODE: tl.constexpr, DTYPE: tl.constexpr, LAYOUT: tl.constexpr,
    ARCH: tl.constexpr,
):  # fmt: skip
    """Codes and scales, or values, of the blocks that stand at (row, column), where live."""
    x = _values(words, DTYPE)
    if DTYPE == E4M3:
        x = _prescale_e4m3(x, encode, rcp_delta_ptr, RECIPE, ARCH)
        amax = tl.max(tl.abs(x), 2)
    if DTYPE == FP32 and MODE == PER_TOKEN:
        byte, codes = _quantize_fp32(x, amax, token, rcp_delta_ptr, ARCH)
    else:
        byte, codes = _quantize(x, amax, encode, row_amax, rcp_delta_ptr, RECIPE, MODE, DTYPE, ARCH)
    if values_ptr is not None:
        _store_values(values_ptr, codes, byte, row, column, live & (column < NB), NB, ARCH)
    else:
        _store_codes(codes, byte, row, column, live, codes_ptr, sf_ptr, NB, padded_columns, LAYOUT)


@triton.jit
def _store_codes(
    codes, byte, row, column, live, codes_ptr, sf_ptr, NB, padded_columns, LAYOUT: tl.constexpr
):
    """Codes [R, NB, 2] and block scales of the blocks that stand at (row, column), where live."""
    mask = live & (column < NB)
    word = (row * NB + column)[:, :, None] * 2 + tl.arange(0, 2)[None, None, :]
    tl.store(codes_ptr + word, codes, mask[:, :, None])
    offset = _scale_offset(row, column, padded_columns, LAYOUT)
    byte = tl.where(mask, byte, 0).to(tl.uint8)  # padded columns are zero
    tl.store(sf_ptr + offset, byte, live & (column < padded_columns))


@triton.jit
def _store_values(values_ptr, codes, byte, row, column, mask, NB, ARCH: tl.constexpr):
    """Codes [R, NB, 2] times block scales to [M, 4, K/4] bf16, each fourth column together."""
    halves = codes[:, :, :, None] >> (tl.arange(0, 2) * 16)[None, None, None, :]
    words = tl.reshape(halves.to(tl.uint16), (codes.shape[0], codes.shape[1], 4))
    scale = e4m3_decode(byte)[:, :, None]
    for i in tl.static_range(4):
        offset = ((row * 4 + i) * NB + column)[:, :, None] * 4 + tl.arange(0, 4)[None, None, :]
        tl.store(values_ptr + offset, decode_values(words, scale, i, ARCH), mask[:, :, None])


@triton.jit
def _fill_padding_rows(
    sf_ptr, M, padded_rows, padded_columns, first, N: tl.constexpr, LAYOUT: tl.constexpr
):
    """Zeros to the scales of rows >= M, as words of four, from word `first` of the last row tile."""
    TILE: tl.constexpr = 128 if LAYOUT == LAYOUT_128X4 else 8
    word = first + tl.arange(0, N)
    row = word % TILE
    if LAYOUT == LAYOUT_128X4:
        row = row % 4 * 32 + row // 4
    base = (padded_rows - TILE).to(tl.int64)
    mask = (base + row >= M) & (word < TILE * (padded_columns // 4))
    words = sf_ptr.to(tl.pointer_type(tl.int32)) + base * (padded_columns // 4) + word
    tl.store(words, tl.zeros((N,), tl.int32), mask)


@triton.jit(do_not_specialize=["M", "padded_rows"])  # serving meets every M
def quantize_kernel(
    x_ptr,  # [M, 16 NB] as int32 words
    row_index_ptr,  # [>= M] int32, with HAS_ROW_INDEX
    scale_ptr,  # fp32 [1] or [M], with HAS_SCALE_TENSOR
    out_scale_ptr,  # fp32 [1], with HAS_OUT_SCALE
    rcp_delta_ptr,  # [2^23] int8, in the interpreter
    codes_ptr,  # [M, 2 NB] int32; None with values
    sf_ptr,  # [padded_rows, padded_columns] uint8; None with values
    values_ptr,  # [M, 4, 4 NB] bf16, or None
    token_ptr,  # [M] fp32, with MODE PER_TOKEN
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
    ARCH: tl.constexpr,
):
    await_previous(ARCH)
    FTZ: tl.constexpr = (RECIPE & 64) == 0
    if LAYOUT != LAYOUT_LINEAR:
        row_programs = (M + ROWS - 1) // ROWS
        if tl.program_id(0) >= row_programs:
            first = (tl.program_id(0) - row_programs) * SPLITS + tl.program_id(1)
            _fill_padding_rows(
                sf_ptr, M, padded_rows, padded_columns, first * ROWS * BLOCKS, ROWS * BLOCKS, LAYOUT
            )
            return

    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    live = row < M
    if HAS_ROW_INDEX:
        row = tl.load(row_index_ptr + row, live, other=-1).to(tl.int64)
        live = live & (row >= 0) & (row < M)
    row, live = row[:, None], live[:, None]
    block = tl.program_id(1) * BLOCKS + tl.arange(0, BLOCKS)[None, :]

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
        if READ == 0:
            largest = maxima[0]
            for i in tl.static_range(1, PARTS):
                largest = larger(largest, maxima[i], ARCH)
            row_amax = _or_zero(tl.max(largest, 1))
        else:
            ahead = tl.arange(0, READ)[None, :]
            row_amax = _read_maximum(x_ptr, row, ahead, live, NB, DTYPE, ARCH)
            if SPLITS == 1:
                for start in range(READ, NB, READ):
                    more = _read_maximum(x_ptr, row, start + ahead, live, NB, DTYPE, ARCH)
                    row_amax = tl.maximum(row_amax, more)
        row_amax = flush(row_amax, FTZ, ARCH)[:, None]
        encode, token = _row_scales(row_amax, given, rcp_delta_ptr, RECIPE, ARCH)
        shown = token
        if HAS_OUT_SCALE:
            shown = mul(token, tl.load(out_scale_ptr), FTZ, ARCH)
        if tl.program_id(1) == 0:
            tl.store(token_ptr + row, shown, live)
    else:
        row_amax = given
        encode = given
        if INVERSE:
            if RECIPE & 32:
                encode = reciprocal(given, FTZ, ARCH)
            else:
                # Nothing subnormal comes out; but the assembler would cancel rcp(rcp(x)).
                encode = flush(rcp(given, rcp_delta_ptr, ARCH), True, ARCH)
        encode = flush(encode, FTZ, ARCH)
        token = encode

    if MODE == PER_TOKEN and READ != 0 and SPLITS == 1:
        for start in range(0, padded_columns, BLOCKS):
            column = start + block
            words = _load(x_ptr, row, column, live & (column < NB), NB, DTYPE)
            _quantize_and_store(
                words, _block_maxima(words, DTYPE, ARCH), encode, token, row_amax, row, column, live,
                codes_ptr, sf_ptr, values_ptr, rcp_delta_ptr, NB, padded_columns,
                RECIPE, MODE, DTYPE, LAYOUT, ARCH,
            )  # fmt: skip
    else:
        for i in tl.static_range(PARTS):
            _quantize_and_store(
                parts[i], maxima[i], encode, token, row_amax, row, block + i * BLOCKS, live,
                codes_ptr, sf_ptr, values_ptr, rcp_delta_ptr, NB, padded_columns,
                RECIPE, MODE, DTYPE, LAYOUT, ARCH,
            )  # fmt: skip
