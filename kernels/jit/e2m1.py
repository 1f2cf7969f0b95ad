"""fp32 to packed e2m1 codes, whose magnitudes are 0, 0.5, 1, 1.5, 2, 3, 4 and 6.

The conversion instruction exists from sm_100 on. Elsewhere fp32 additions round to the same code.
`reference/numerics/e2m1.py` is the specification: to nearest, ties to even, at most 6.
"""

# SPDX-License-Identifier: Apache-2.0
import triton
import triton.language as tl

from .arithmetic import mul, mul_magnitude, smaller


@triton.constexpr_function
def magnitude_unit(arch):
    """The unit in which `e2m1_encode_magnitudes` takes magnitudes with the least work.

    e4m3 of a code's magnitude times 2^-6 is the code times four: below 2^-6 e4m3's numbers are 2^-9
    apart, as e2m1's are 1/2 apart below 1.
    """
    return 2.0**-6 if 89 <= arch < 100 else 1.0


@triton.jit
def columns(x):
    """Split [R, NB, N, 8] into its eight columns [R, NB, N], first to last."""
    shape: tl.constexpr = (x.shape[0], x.shape[1], x.shape[2], 2, 2)
    even, odd = tl.split(tl.reshape(x, (x.shape[0], x.shape[1], x.shape[2], 4, 2)))
    x04, x26 = tl.split(tl.reshape(even, shape))
    x15, x37 = tl.split(tl.reshape(odd, shape))
    x0, x4 = tl.split(x04)
    x2, x6 = tl.split(x26)
    x1, x5 = tl.split(x15)
    x3, x7 = tl.split(x37)
    return x0, x1, x2, x3, x4, x5, x6, x7


@triton.jit
def _native_e2m1_words(y):
    """Convert fp32 [R, NB, 16] to packed codes, int32 [R, NB, 2], by the GPU's instruction."""
    y0, y1, y2, y3, y4, y5, y6, y7 = columns(tl.reshape(y, (y.shape[0], y.shape[1], 2, 8)))
    return tl.inline_asm_elementwise(
        "{ .reg .b8 b0, b1, b2, b3;"
        " cvt.rn.satfinite.e2m1x2.f32 b0, $2, $1;"
        " cvt.rn.satfinite.e2m1x2.f32 b1, $4, $3;"
        " cvt.rn.satfinite.e2m1x2.f32 b2, $6, $5;"
        " cvt.rn.satfinite.e2m1x2.f32 b3, $8, $7;"
        " mov.b32 $0, {b0, b1, b2, b3}; }",
        "=r,f,f,f,f,f,f,f,f",
        [y0, y1, y2, y3, y4, y5, y6, y7],
        tl.int32,
        True,
        1,
    )


@triton.jit
def _e2m1_round(a, UNIT: tl.constexpr = 1.0):
    """Round fp32 magnitudes, in UNIT, to e2m1's steps of 1/2, 1 and 2, ties to even. NaN stays NaN.

    2^22 times a number of [1, 2) has the step 1/2 in fp32, of [2, 4) 1, of [4, 8) 2. Subtracting it from
    a rounds a to that step, and adding it again is exact. The number is a, or 1.5 for smaller ones.
    Its significand is even wherever a is a tie. Where it is next to 2 or 4, the difference may have the
    finer step of the lower binade; a rounds to 2 or 4 by both steps. A power of two as UNIT moves every
    exponent and changes no significand.
    """
    near = tl.maximum(a, 1.5 * UNIT)
    return tl.fma(near, 4194304.0, tl.fma(near, -4194304.0, a))


@triton.jit
def _e4m3_bytes(x0, x1, x2, x3):
    """Convert four fp32 to e4m3 with the sign, saturated at 448: one int32, x0 in the lowest byte."""
    return tl.inline_asm_elementwise(
        "{ .reg .b16 low, high;"
        " cvt.rn.satfinite.e4m3x2.f32 low, $2, $1;"
        " cvt.rn.satfinite.e4m3x2.f32 high, $4, $3;"
        " mov.b32 $0, {low, high}; }",
        "=r,f,f,f,f",
        [x0, x1, x2, x3],
        tl.int32,
        True,
        1,
    )


@triton.jit
def _even_and_odd_bytes(x):
    """Convert fp32 [R, NB, 16] to e4m3: (even elements, odd elements), int32 [R, NB, 2] each."""
    x0, x1, x2, x3, x4, x5, x6, x7 = columns(tl.reshape(x, (x.shape[0], x.shape[1], 2, 8)))
    return _e4m3_bytes(x0, x2, x4, x6), _e4m3_bytes(x1, x3, x5, x7)


@triton.jit
def _select(a, b, MASK: tl.constexpr):
    """Take the bits of a where MASK has ones, else those of b."""
    return (a & MASK) | (b & ~MASK)


@triton.jit
def _pack(rounded, ARCH: tl.constexpr, UNIT: tl.constexpr = 1.0):
    """Pack the results of `_e2m1_round`, [R, NB, 16], into magnitude codes of words [R, NB, 2].

    Element 0 has the lowest nibble. From sm_89 on, NaN gives the code of 6, and so do results above 6
    with the UNIT 1.
    """
    if UNIT != 1.0:  # 2^-6: e4m3 is the code times four, and that of NaN ends in ones
        even, odd = _even_and_odd_bytes(rounded)
        word = _select(even >> 2, odd << 2, 0x0F0F0F0F) & 0x77777777
    elif ARCH >= 89:
        # e4m3 of 64 (r + 2) ends in the three bits of the code and one more. What is above 6 saturates
        # to 448, which ends as 6 does, and so does NaN.
        even, odd = _even_and_odd_bytes(tl.fma(rounded, 64.0, 128.0))
        word = _select(even >> 1, odd << 3, 0x0F0F0F0F) & 0x77777777
    else:
        # Exponent and significand of a code, shifted, stand where those of r * 2^-126 do.
        code = (rounded * 2.0**-126).to(tl.int32, bitcast=True) >> 22
        groups = tl.reshape(code, (code.shape[0], code.shape[1], 2, 8))
        word = tl.sum(groups << (tl.arange(0, 8) * 4)[None, None, None, :], 3)
    return word


@triton.jit
def e2m1_signs(y, ARCH: tl.constexpr):
    """Return fp32 [R, NB, 16]'s signs as the top bits of packed codes, int32 [R, NB, 2]; none for NaN.

    Other bits are zero.
    """
    if ARCH >= 89:  # a GPU's arithmetic makes positive NaN only
        even, odd = _even_and_odd_bytes(y)
        word = _select(even >> 4, odd, 0x0F0F0F0F)
    else:
        bits = y.to(tl.uint32, bitcast=True)
        if ARCH == 0:  # the host's does not
            bits = tl.where(y == y, bits, 0)
        groups = tl.reshape(bits >> 31, (y.shape[0], y.shape[1], 2, 8))
        shift = (tl.arange(0, 8) * 4 + 3)[None, None, None, :].to(tl.uint32)
        word = tl.sum(groups << shift, 3).to(tl.int32, bitcast=True)
    return word & ~0x77777777


@triton.jit
def e2m1_encode(x, output_scale, FTZ: tl.constexpr, ARCH: tl.constexpr):
    """x [R, NB, 16] times output_scale [R, NB] to packed e2m1 codes, int32 [R, NB, 2].

    Element 0 has the lowest nibble.
    """
    scale = output_scale[:, :, None]
    y = mul(x, scale, FTZ, ARCH)
    if ARCH >= 100:
        return _native_e2m1_words(y)
    # |x| is free in a multiplication, |y| is an instruction of the busier pipe.
    a = mul_magnitude(x, scale, FTZ, ARCH)
    if ARCH < 89:
        a = smaller(a, 6.0, ARCH)
    return _pack(_e2m1_round(a), ARCH) | e2m1_signs(y, ARCH)


@triton.jit
def e2m1_encode_magnitudes(a, ARCH: tl.constexpr, UNIT: tl.constexpr = 1.0, saturates=None):
    """Magnitudes in UNIT, [R, NB, 16], to (packed codes [R, NB, 2], the rounded magnitudes in UNIT).

    UNIT is 1 or `magnitude_unit(ARCH)`. Without `saturates`, results above 6 and NaN become 6. With it,
    from sm_89 on, a program in which it is false has no magnitude that rounds above 6, and NaN stays NaN
    with code 6.
    """
    if ARCH >= 100:
        word = _native_e2m1_words(a)
        shift = (tl.arange(0, 8) * 4)[None, None, None, :]
        # Exponent and significand of a code, shifted, stand where those of 2^-126 times it do.
        bits = tl.reshape((word[:, :, :, None] >> shift) & 7, a.shape) << 22
        return word, bits.to(tl.float32, bitcast=True) * 2.0**126
    if saturates is None or ARCH < 89:  # below sm_89 the bits of NaN would go into other codes
        a = smaller(a, 6.0 * UNIT, ARCH)
    else:
        if saturates:
            a = smaller(a, 6.0 * UNIT, ARCH)
    rounded = _e2m1_round(a, UNIT)
    return _pack(rounded, ARCH, UNIT), rounded
