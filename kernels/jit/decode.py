"""Codes and block scales to bf16."""

# SPDX-License-Identifier: Apache-2.0
import triton
import triton.language as tl

from .e4m3 import e4m3_decode


@triton.jit
def decode_fourth(words, WHICH: tl.constexpr, ARCH: tl.constexpr):
    """Nibble WHICH of 16-bit words of four codes: values times 2^-126, bf16, two at a time.

    Exponent and significand of a code stand where those of bf16 do. In the interpreter: fp32.
    """
    # One operation for each nibble: the compiler then decodes in the layout of the MMA's operand.
    if ARCH == 0:
        w = (words.to(tl.int32) >> (4 * WHICH)) & 15
        value = (((w & 7) << 22) | ((w & 8) << 28)).to(tl.float32, bitcast=True)
    elif WHICH == 0:  # 0xEA is (a & b) | c
        value = tl.inline_asm_elementwise(
            """{ .reg .b32 m, s; shl.b32 m, $1, 6; shl.b32 s, $1, 12; and.b32 m, m, 0x01C001C0;
            lop3.b32 $0, s, 0x80008000, m, 0xEA; }""",
            "=r,r", [words], tl.bfloat16, True, 2,
        )  # fmt: skip
    elif WHICH == 1:
        value = tl.inline_asm_elementwise(
            """{ .reg .b32 m, s; shl.b32 m, $1, 2; shl.b32 s, $1, 8; and.b32 m, m, 0x01C001C0;
            lop3.b32 $0, s, 0x80008000, m, 0xEA; }""",
            "=r,r", [words], tl.bfloat16, True, 2,
        )  # fmt: skip
    elif WHICH == 2:
        value = tl.inline_asm_elementwise(
            """{ .reg .b32 m, s; shr.u32 m, $1, 2; shl.b32 s, $1, 4; and.b32 m, m, 0x01C001C0;
            lop3.b32 $0, s, 0x80008000, m, 0xEA; }""",
            "=r,r", [words], tl.bfloat16, True, 2,
        )  # fmt: skip
    else:
        value = tl.inline_asm_elementwise(
            """{ .reg .b32 m; shr.u32 m, $1, 6; and.b32 m, m, 0x01C001C0;
            lop3.b32 $0, $1, 0x80008000, m, 0xEA; }""",
            "=r,r", [words], tl.bfloat16, True, 2,
        )  # fmt: skip
    return value


@triton.jit
def operand_scale(sf):
    """e4m3 bytes for `scaled`, bf16: times 2^118, so that nothing overflows on the way."""
    return (e4m3_decode(sf.to(tl.int32)) * 2.0**118).to(tl.bfloat16)


@triton.jit
def scaled(a, scale, ARCH: tl.constexpr):
    """What `decode_fourth` gives times `operand_scale`: values times 2^-8, exactly."""
    if ARCH == 0:
        product = a * scale.to(tl.float32)
    else:
        product = a * scale
    return product


@triton.jit
def decode_values(words, scale, WHICH: tl.constexpr, ARCH: tl.constexpr):
    """Nibble WHICH of 16-bit words of four codes times fp32 of their block scale: bf16, exact."""
    value = decode_fourth(words, WHICH, ARCH).to(tl.float32) * 2.0**126
    return (value * scale).to(tl.bfloat16)
