"""FP8 e4m3 bytes from fp32 and to fp32."""

# SPDX-License-Identifier: Apache-2.0
import triton
import triton.language as tl


@triton.jit
def e4m3_encode(x, ARCH: tl.constexpr):
    """fp32 >= 0 or NaN to its e4m3 byte, int32."""
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
    """e4m3 byte 0..255 (int32) to fp32, exactly; the sign of zero is kept."""
    # Exponent and significand stand where fp32 has them; the product with 2^120 mends the bias.
    bits = ((byte & 0x80) << 24) | ((byte & 0x7F) << 20)
    value = bits.to(tl.float32, bitcast=True) * 2.0**120
    return tl.where((byte & 0x7F) == 0x7F, float("nan"), value)
