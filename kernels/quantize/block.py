"""Quantize blocks of 16 elements in registers; `reference/quantize.py` has the arithmetic.

Names are those of the reference. x is [R, NB, 16] fp32, amax [R, NB] the blocks' largest magnitudes.
"""

# SPDX-License-Identifier: Apache-2.0
import triton
import triton.language as tl

from ..jit.arithmetic import (
    FLT_MAX,
    SIXTH,
    add_magnitudes,
    div,
    flush,
    fma,
    mul,
    rcp,
    reciprocal,
    smaller,
    sub,
)
from ..jit.e2m1 import (
    columns,
    e2m1_encode,
    e2m1_encode_magnitudes,
    e2m1_signs,
    magnitude_unit,
)
from ..jit.e4m3 import e4m3_encode, e4m3_round
from ..jit.formats import E4M3, PER_TOKEN
from ..jit.recipe import (
    flushes,
    has_fast_error,
    is_exact,
    is_four_over_six,
    largest_value,
    squares_error,
    tests_rounded_scale,
)


@triton.jit
def or_zero(amax):
    """Replace NaN by 0 in a maximum of magnitudes."""
    return tl.where(amax > 0, amax, 0.0)


@triton.jit
def row_scales(amax, g, rcp_delta_ptr, RECIPE: tl.constexpr, ARCH: tl.constexpr):
    """Return (encode scales, per-token scales) of rows whose largest magnitudes are amax."""
    FTZ: tl.constexpr = flushes(RECIPE)
    zero_encode: tl.constexpr = 0.0 if is_four_over_six(RECIPE) else FLT_MAX
    if is_exact(RECIPE):
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
def _output_scale(sf, encode, rcp_delta_ptr, RECIPE: tl.constexpr, ARCH: tl.constexpr):
    FTZ: tl.constexpr = flushes(RECIPE)
    if is_exact(RECIPE):
        decode = reciprocal(encode, FTZ, ARCH)
        return smaller(reciprocal(mul(sf, decode, FTZ, ARCH), FTZ, ARCH), FLT_MAX, ARCH)
    decode = rcp(encode, rcp_delta_ptr, ARCH)
    return rcp(mul(sf, decode, FTZ, ARCH), rcp_delta_ptr, ARCH)


@triton.jit
def _ordered_magnitudes(terms, FTZ: tl.constexpr, ARCH: tl.constexpr):
    """Sum the magnitudes of [R, NB, 16] from left to right; the order decides near ties of 4over6."""
    R: tl.constexpr = terms.shape[0]
    NB: tl.constexpr = terms.shape[1]
    halves = tl.permute(tl.reshape(terms, (R, NB, 2, 8)), (0, 1, 3, 2))
    first, second = tl.split(halves)
    a0, a1, a2, a3, a4, a5, a6, a7 = columns(tl.reshape(first, (R, NB, 1, 8)))
    b0, b1, b2, b3, b4, b5, b6, b7 = columns(tl.reshape(second, (R, NB, 1, 8)))
    total = a0
    after = (a1, a2, a3, a4, a5, a6, a7, b0, b1, b2, b3, b4, b5, b6, b7)
    for i in tl.static_range(15):
        total = add_magnitudes(total, after[i], FTZ, ARCH)
    return tl.reshape(total, (R, NB))


@triton.jit
def _quotients(codes, p, D: tl.constexpr):
    """Return codes [R, NB, 16] times p [R, NB] over D, each rounded once.

    p / D is taken as the sum of two fp32 numbers, whose error is 2^-48 of it. Nothing in here may be
    subnormal or overflow. codes * p has at most 17 significant bits, and D is 3 or 21 times a power of
    two, so that a quotient is 2^-30 of itself or more away from where the rounding changes.
    """
    INVERSE: tl.constexpr = 1.0 / D
    q = p * INVERSE
    high = tl.fma(tl.fma(q, -D, p), INVERSE, q)
    low = tl.fma(high, -D, p) * INVERSE
    return tl.fma(codes, high[:, :, None], codes * low[:, :, None])


@triton.jit
def _candidate(
    a,
    encoded,
    unrounded,
    encode,
    decode,
    row_amax,
    saturates,
    rcp_delta_ptr,
    RECIPE: tl.constexpr,
    MODE: tl.constexpr,
    NEAR_ONE: tl.constexpr,
    ARCH: tl.constexpr,
):
    """Return (scale byte, output scale, packed magnitudes, error) of one of 4over6's block scales.

    Magnitudes a [R, NB, 16] have the differences of signed values, and round alike. `encoded` is a times
    the encode scale, with FAST_ERROR.
    """
    FTZ: tl.constexpr = flushes(RECIPE)
    byte, sf = e4m3_round(unrounded, ARCH)
    output_scale = _output_scale(sf, encode, rcp_delta_ptr, RECIPE, ARCH)
    UNIT: tl.constexpr = magnitude_unit(ARCH) if NEAR_ONE else 1.0
    scaled = mul(a, (output_scale * UNIT)[:, :, None], FTZ, ARCH)
    words, rounded = e2m1_encode_magnitudes(scaled, ARCH, UNIT, saturates)
    if NEAR_ONE:
        # sf * row_amax, and its product with a code, have at most 11 + 4 + 2 significant bits. The row's
        # maximum and D are 2^-26 of themselves, so that nothing overflows.
        SHIFT: tl.constexpr = 2.0**-26
        D: tl.constexpr = largest_value(RECIPE) * SHIFT
        quotients = _quotients(rounded, sf * (row_amax * (SHIFT / UNIT)), D)
        difference = sub(quotients, a, FTZ, ARCH)
    else:
        scale = sf[:, :, None]
        scaled = rounded * scale  # exact
        if has_fast_error(RECIPE):
            difference = fma(rounded, -scale, encoded, FTZ, ARCH)
        elif MODE == PER_TOKEN:
            # A row maximum of 0 leaves blocks of zeros and of NaN, and both candidates the same.
            by_row = mul(scaled, row_amax[:, :, None], FTZ, ARCH)
            D: tl.constexpr = largest_value(RECIPE)  # type: ignore[no-redef]
            difference = sub(div(by_row, D, FTZ, ARCH), a, FTZ, ARCH)
        else:
            difference = sub(mul(scaled, decode[:, :, None], FTZ, ARCH), a, FTZ, ARCH)
    if squares_error(RECIPE):
        difference = mul(difference, difference, FTZ, ARCH)
    return byte, output_scale, words, _ordered_magnitudes(difference, FTZ, ARCH)


@triton.jit
def may_saturate(least, encode, row_amax):
    """Return false only if no magnitude of the rows rounds above 6, under both of 4over6's block scales.

    A block's largest magnitude is 6 / sf times the unrounded scale, or 4 / sf with the block's maximum
    at 4. Rounding gives at most 17/16 of 6 where sf is normal, 9/8 where it is 4 steps of 2^-9 or more,
    and saturation at 448 nearly 1. 7 is the first magnitude that rounds above 6.
    """
    sixth = encode * SIXTH
    small = (least * sixth >= 2.0**-7) | (row_amax == 0)
    inside = small & (row_amax * sixth <= 450.0)
    return tl.min(tl.min(inside.to(tl.int32), 1), 0) == 0


@triton.jit
def _four_over_six(
    x,
    amax,
    encode,
    row_amax,
    saturates,
    rcp_delta_ptr,
    RECIPE: tl.constexpr,
    MODE: tl.constexpr,
    NEAR_ONE: tl.constexpr,
    TWICE: tl.constexpr,
    ARCH: tl.constexpr,
):
    """Return (scale bytes, packed codes), with the block's maximum at 4 if that error is smaller.

    TWICE has the instructions of both candidates one after the other. They take less time than a loop,
    but more to arrive, which a program of few rows waits for as much as for its data.
    """
    FTZ: tl.constexpr = flushes(RECIPE)
    if is_exact(RECIPE):
        unrounded6 = mul(div(amax, 6.0, FTZ, ARCH), encode, FTZ, ARCH)
        decode = reciprocal(encode, FTZ, ARCH)
    else:
        unrounded6 = mul(encode, mul(amax, SIXTH, FTZ, ARCH), FTZ, ARCH)
        decode = rcp(encode, rcp_delta_ptr, ARCH)
    unrounded4 = mul(unrounded6, 1.5, FTZ, ARCH)
    a = tl.abs(x)
    encoded = mul(a, encode[:, :, None], FTZ, ARCH)
    if TWICE:
        byte, output, words, error = _candidate(
            a, encoded, unrounded6, encode, decode, row_amax, saturates, rcp_delta_ptr,
            RECIPE, MODE, NEAR_ONE, ARCH,
        )  # fmt: skip
        byte4, output4, words4, error4 = _candidate(
            a, encoded, unrounded4, encode, decode, row_amax, saturates, rcp_delta_ptr,
            RECIPE, MODE, NEAR_ONE, ARCH,
        )  # fmt: skip
        better = error4 < error
        byte = tl.where(better, byte4, byte)
        words = tl.where(better[:, :, None], words4, words)
        output = tl.where(better, output4, output)
    else:
        byte = tl.zeros(amax.shape, tl.int32)
        words = tl.zeros((amax.shape[0], amax.shape[1], 2), tl.int32)
        output = tl.zeros(amax.shape, tl.float32)
        error = tl.zeros(amax.shape, tl.float32)
        unrounded = unrounded6
        for i in tl.range(0, 2):
            this_byte, this_output, this_words, this_error = _candidate(
                a, encoded, unrounded, encode, decode, row_amax, saturates, rcp_delta_ptr,
                RECIPE, MODE, NEAR_ONE, ARCH,
            )  # fmt: skip
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
def quantize_block(
    x,
    amax,
    encode,
    row_amax,
    rcp_delta_ptr,
    RECIPE: tl.constexpr,
    MODE: tl.constexpr,
    DTYPE: tl.constexpr,
    ARCH: tl.constexpr,
    saturates=None,
    TWICE: tl.constexpr = False,
):
    """Quantize x [R, NB, 16] with maxima amax: (scale bytes [R, NB], packed codes [R, NB, 2]).

    Args:
        saturates: by `may_saturate`, for 4over6 per token; None: not known.
        TWICE: as `_four_over_six` has it, where a row's maximum is in its usual range.
    """
    FTZ: tl.constexpr = flushes(RECIPE)
    amax = flush(amax, FTZ, ARCH)
    if is_four_over_six(RECIPE):
        if ARCH != 0 and MODE == PER_TOKEN and not has_fast_error(RECIPE):
            far = (row_amax != 0) & ((row_amax < 2.0**-60) | (row_amax > 2.0**16))
            if tl.max(tl.max(far.to(tl.int32), 1), 0) == 0:
                byte, words = _four_over_six(
                    x, amax, encode, row_amax, saturates, rcp_delta_ptr,
                    RECIPE, MODE, True, TWICE, ARCH,
                )  # fmt: skip
            else:
                byte, words = _four_over_six(
                    x, amax, encode, row_amax, None, rcp_delta_ptr,
                    RECIPE, MODE, False, False, ARCH,
                )  # fmt: skip
            return byte, words
        return _four_over_six(
            x, amax, encode, row_amax, None, rcp_delta_ptr, RECIPE, MODE, False, False, ARCH
        )
    if DTYPE == E4M3 and FTZ:  # the CUDA build's kernel for e4m3 has a rule of its own
        unrounded = mul(encode, mul(amax, SIXTH, FTZ, ARCH), FTZ, ARCH)
        byte, sf = e4m3_round(unrounded, ARCH)
        output_scale = mul(rcp(sf, rcp_delta_ptr, ARCH), encode, FTZ, ARCH)
        output_scale = tl.where(unrounded == 0, 0.0, output_scale)
    elif is_exact(RECIPE):
        unrounded = mul(amax, mul(encode, SIXTH, FTZ, ARCH), FTZ, ARCH)
        byte, sf = e4m3_round(tl.where(amax == 0, 0.0, unrounded), ARCH)
        output_scale = _output_scale(sf, encode, rcp_delta_ptr, RECIPE, ARCH)
        output_scale = tl.where(amax == 0, 0.0, output_scale)
    else:
        unrounded = mul(encode, mul(amax, SIXTH, FTZ, ARCH), FTZ, ARCH)
        byte, sf = e4m3_round(unrounded, ARCH)
        output_scale = _output_scale(sf, encode, rcp_delta_ptr, RECIPE, ARCH)
        zero = byte == 0 if tests_rounded_scale(RECIPE) else amax == 0
        output_scale = tl.where(zero, 0.0, output_scale)
    return byte, e2m1_encode(x, output_scale, FTZ, ARCH)


@triton.jit
def quantize_fp32_block(x, amax, scale, rcp_delta_ptr, ARCH: tl.constexpr):
    """Apply the fp32-input rule: codes from the block's own maximum, the block scale afterwards."""
    amax = flush(or_zero(amax), True, ARCH)  # a block of nothing but NaN counts as zeros
    output_scale = mul(rcp(amax, rcp_delta_ptr, ARCH), 6.0, True, ARCH)
    output_scale = tl.where(amax == 0, 0.0, output_scale)
    denominator = mul(scale, output_scale, True, ARCH)
    unrounded = tl.where(denominator == 0, 0.0, rcp(denominator, rcp_delta_ptr, ARCH))
    words = e2m1_encode(x, output_scale, True, ARCH)
    return e4m3_encode(unrounded, ARCH), words


@triton.jit
def prescale_e4m3(x, encode, rcp_delta_ptr, RECIPE: tl.constexpr, ARCH: tl.constexpr):
    """Scale e4m3 input and round it to fp16, as `reference.quantize._e4m3_blocks` does."""
    FTZ: tl.constexpr = flushes(RECIPE)
    if is_exact(RECIPE) and not FTZ:
        decode = reciprocal(encode, FTZ, ARCH)
    else:
        decode = rcp(encode, rcp_delta_ptr, ARCH)
    prescale = mul(decode, 6.0, FTZ, ARCH)
    return mul(x, prescale[:, :, None], FTZ, ARCH).to(tl.float16).to(tl.float32)
