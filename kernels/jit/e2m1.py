"""fp32 to packed e2m1 codes, whose magnitudes are 0, 0.5, 1, 1.5, 2, 3, 4 and 6.

The conversion instruction exists from sm_100 on. Elsewhere fp32 additions round to the same code.
`reference/numerics/e2m1.py` is the specification: to nearest, ties to even, at most 6.
"""

# SPDX-License-Identifier: Apache-2.0
import triton
import triton.language as tl

from .arithmetic import mul, mul_magnitude


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
def _e2m1_round(a):
    """Magnitudes to e2m1 magnitude codes, each plus 0x4b000000, uint32.

    Each addition rounds to the step of one binade of e2m1 (1/2, 1, 2), ties to even, and leaves the
    code in its low bits: the code is the smallest of the three, at most 7. Unsigned, so that NaN
    stays above all.
    """
    halves = tl.fma(a, 2.0, 8388608.0).to(tl.uint32, bitcast=True)
    ones = (a + 8388610.0).to(tl.uint32, bitcast=True)
    twos = tl.fma(a, 0.5, 8388612.0).to(tl.uint32, bitcast=True)
    return tl.minimum(tl.minimum(tl.minimum(halves, ones), twos), 0x4B000007)


@triton.jit
def _pack(code):
    """Codes of `_e2m1_round`, [R, NB, 16], to words [R, NB, 2], element 0 in the lowest nibble."""
    groups = tl.reshape(code, (code.shape[0], code.shape[1], 2, 8))
    shift = (tl.arange(0, 8) * 4)[None, None, None, :].to(tl.uint32)
    # 0x4b000000, which every code still carries, sums to 0xfb000000 modulo 2^32.
    return (tl.sum(groups << shift, 3) - 0xFB000000).to(tl.int32, bitcast=True)


@triton.jit
def e2m1_signs(y, ARCH: tl.constexpr):
    """The sign bits of packed codes, int32 [R, NB, 2], of fp32 [R, NB, 16]; none for NaN."""
    bits = y.to(tl.uint32, bitcast=True)
    if ARCH == 0:  # a GPU's arithmetic makes positive NaN only; the host's does not
        bits = tl.where(y == y, bits, 0)
    groups = tl.reshape(bits, (y.shape[0], y.shape[1], 2, 8))
    b0, b1, b2, b3, b4, b5, b6, b7 = columns(groups)
    # Four bits enter for each element, by one funnel shift; the sign is the top one.
    word = (b7 >> 28 << 4) | (b6 >> 28)
    word = (word << 4) | (b5 >> 28)
    word = (word << 4) | (b4 >> 28)
    word = (word << 4) | (b3 >> 28)
    word = (word << 4) | (b2 >> 28)
    word = (word << 4) | (b1 >> 28)
    word = (word << 4) | (b0 >> 28)
    return (word & 0x88888888).to(tl.int32, bitcast=True)


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
    magnitudes = _pack(_e2m1_round(mul_magnitude(x, scale, FTZ, ARCH)))
    return magnitudes | e2m1_signs(y, ARCH)


@triton.jit
def e2m1_encode_magnitudes(a, ARCH: tl.constexpr):
    """Magnitudes [R, NB, 16] to (packed codes [R, NB, 2], the rounded magnitudes times 2^-126).

    Exponent and significand of a code, shifted, stand where those of fp32 do. NaN rounds to 6.
    """
    if ARCH >= 100:
        word = _native_e2m1_words(a)
        shift = (tl.arange(0, 8) * 4)[None, None, None, :]
        bits = tl.reshape((word[:, :, :, None] >> shift) & 7, a.shape) << 22
    else:
        code = _e2m1_round(a)
        word = _pack(code)
        bits = (code << 22).to(tl.int32, bitcast=True)  # shifts 0x4b000000 out
    return word, bits.to(tl.float32, bitcast=True)
