"""FP8 e4m3 (OCP's e4m3fn: no infinity, largest number 448) from fp32 and to fp32.

The conversion instruction exists from sm_89 on. Elsewhere integer arithmetic gives the same byte.
`reference/numerics/e4m3.py` is the specification.
"""

# SPDX-License-Identifier: Apache-2.0
import triton
import triton.language as tl


@triton.jit
def e4m3_encode(x, ARCH: tl.constexpr):
    """Round fp32 >= 0 to e4m3, to nearest, ties to even, at most 448; the byte as int32. NaN is 0x7F."""
    if ARCH >= 89:
        return tl.inline_asm_elementwise(
            "{ .reg .b16 pair; cvt.rn.satfinite.e4m3x2.f32 pair, 0f00000000, $1;"
            " cvt.u32.u16 $0, pair; }",
            "=r,f",
            [x],
            tl.int32,
            True,
            1,
        )
    bits = x.to(tl.int32, bitcast=True)
    # Round the significand to 3 bits, ties to even, and move the exponent's bias from 127 to 7.
    normal = ((bits + 0x7FFFF + ((bits >> 20) & 1)) >> 20) - 960
    # An addend whose ulp is the subnormals' step leaves the byte in its low bits.
    subnormal = (x + 16384.0).to(tl.int32, bitcast=True) & 15
    byte = tl.where(x < 0.015625, subnormal, tl.minimum(normal, 0x7E))
    return tl.where((bits & 0x7FFFFFFF) > 0x7F800000, 0x7F, byte)


@triton.jit
def e4m3_decode(byte):
    """Convert an e4m3 byte (0 to 255, int32) to fp32, exactly; a zero keeps its sign."""
    # Exponent and significand move to their places in fp32. The exponent's bias is 7 there and 127 in
    # fp32, which the factor 2^120 makes up for; it is exact for e4m3's subnormal numbers too.
    bits = ((byte & 0x80) << 24) | ((byte & 0x7F) << 20)
    value = bits.to(tl.float32, bitcast=True) * 2.0**120
    return tl.where((byte & 0x7F) == 0x7F, float("nan"), value)


@triton.jit
def e4m3_round(x, ARCH: tl.constexpr):
    """Round fp32 >= 0 to e4m3 by `e4m3_encode`: (the byte as int32, its value as fp32)."""
    if ARCH >= 89:
        return tl.inline_asm_elementwise(
            "{ .reg .b16 pair, low, high; .reg .b32 both;"
            " cvt.rn.satfinite.e4m3x2.f32 pair, 0f00000000, $2;"
            " cvt.u32.u16 $0, pair;"
            " cvt.rn.f16x2.e4m3x2 both, pair;"
            " mov.b32 {low, high}, both;"
            " cvt.f32.f16 $1, low; }",
            "=r,=f,f",
            [x],
            (tl.int32, tl.float32),
            True,
            1,
        )
    byte = e4m3_encode(x, ARCH)
    return byte, e4m3_decode(byte)
