"""fp32 operations that round once each; `reference/numerics/fp32.py` is their specification.

Every function takes ARCH: 10 * major + minor of the GPU, or 0 in the interpreter. On a GPU an operation
is one instruction of inline assembly, which keeps the compiler from fusing a multiplication into an
addition. The interpreter has no inline assembly, so NumPy's operation takes its place. With FTZ an
operation takes subnormal inputs for zeros and gives zeros for subnormal results, as FlashInfer's CUDA
build does; which results are subnormal is decided as `flush_result` of the specification does it.
"""

# SPDX-License-Identifier: Apache-2.0
import triton
import triton.language as tl

FLT_MAX = tl.constexpr(3.4028234663852886e38)
SIXTH = tl.constexpr(0.16666667163372039794921875)  # fp32 of 1/6, which is also rcp.approx(6)
_MIN_NORMAL = tl.constexpr(2.0**-126)
_LEAST_RESULT = tl.constexpr(2.0**-126 * (1 - 2.0**-25))


@triton.constexpr_function
def log2(n):
    """The logarithm of a power of two."""
    return n.bit_length() - 1


@triton.jit
def flush(x, FTZ: tl.constexpr, ARCH: tl.constexpr):
    """With FTZ, a subnormal x to zero of its sign."""
    if FTZ:
        if ARCH == 0:
            return tl.where(tl.abs(x) < _MIN_NORMAL, x * 0.0, x)
        return tl.inline_asm_elementwise(
            "mul.rn.ftz.f32 $0, $1, 0f3F800000;", "=f,f", [x], tl.float32, True, 1
        )
    return x


@triton.jit
def _flushed_result(rounded, exact):
    """The interpreter's fp32 result of an operation, flushed by its value in fp64."""
    return tl.where(tl.abs(exact) < _LEAST_RESULT, rounded * 0.0, rounded)


@triton.jit
def _instruction(a, b, NAME: tl.constexpr, FTZ: tl.constexpr):
    """The instruction NAME.rn of two fp32 operands, which the compiler fuses with no other."""
    ASM: tl.constexpr = NAME + (".rn.ftz.f32 $0, $1, $2;" if FTZ else ".rn.f32 $0, $1, $2;")
    return tl.inline_asm_elementwise(ASM, "=f,f,f", [a, b], tl.float32, True, 1)


@triton.jit
def mul(a, b, FTZ: tl.constexpr, ARCH: tl.constexpr):
    """a * b."""
    if ARCH == 0:
        if FTZ:
            a, b = flush(a, FTZ, ARCH), flush(b, FTZ, ARCH)
            return _flushed_result(a * b, a.to(tl.float64) * b)
        return a * b
    return _instruction(a, b, "mul", FTZ)


@triton.jit
def mul_magnitude(a, b, FTZ: tl.constexpr, ARCH: tl.constexpr):
    """|a| * b; the assembly keeps the magnitude a modifier of the multiplication, which is free."""
    if ARCH == 0:
        return mul(tl.abs(a), b, FTZ, ARCH)
    ASM: tl.constexpr = (
        "{ .reg .f32 a; abs.f32 a, $1; mul.rn.ftz.f32 $0, a, $2; }"
        if FTZ
        else "{ .reg .f32 a; abs.f32 a, $1; mul.rn.f32 $0, a, $2; }"
    )
    return tl.inline_asm_elementwise(ASM, "=f,f,f", [a, b], tl.float32, True, 1)


@triton.jit
def sub(a, b, FTZ: tl.constexpr, ARCH: tl.constexpr):
    """a - b."""
    if ARCH == 0:
        return flush(flush(a, FTZ, ARCH) - flush(b, FTZ, ARCH), FTZ, ARCH)
    return _instruction(a, b, "sub", FTZ)


@triton.jit
def add(a, b, FTZ: tl.constexpr, ARCH: tl.constexpr):
    """a + b."""
    if ARCH == 0:
        return flush(flush(a, FTZ, ARCH) + flush(b, FTZ, ARCH), FTZ, ARCH)
    return _instruction(a, b, "add", FTZ)


@triton.jit
def add_magnitudes(a, b, FTZ: tl.constexpr, ARCH: tl.constexpr):
    """|a| + |b|; the assembly keeps the magnitudes modifiers of the addition, which are free."""
    if ARCH == 0:
        return add(tl.abs(a), tl.abs(b), FTZ, ARCH)
    ASM: tl.constexpr = (
        "{ .reg .f32 a, b; abs.f32 a, $1; abs.f32 b, $2; add.rn.ftz.f32 $0, a, b; }"
        if FTZ
        else "{ .reg .f32 a, b; abs.f32 a, $1; abs.f32 b, $2; add.rn.f32 $0, a, b; }"
    )
    return tl.inline_asm_elementwise(ASM, "=f,f,f", [a, b], tl.float32, True, 1)


@triton.jit
def div(a, b, FTZ: tl.constexpr, ARCH: tl.constexpr):
    """a / b, correctly rounded."""
    if ARCH == 0:
        if FTZ:
            a, b = flush(a, FTZ, ARCH), flush(b, FTZ, ARCH)
            return _flushed_result(tl.div_rn(a, b), a.to(tl.float64) / b)
        return tl.div_rn(a, b)
    return _instruction(a, b, "div", FTZ)


@triton.jit
def reciprocal(x, FTZ: tl.constexpr, ARCH: tl.constexpr):
    """1 / x, correctly rounded: the bits of `div(1.0, x)`, in fewer instructions."""
    if ARCH == 0:
        return div(1.0, x, FTZ, ARCH)
    ASM: tl.constexpr = "rcp.rn.ftz.f32 $0, $1;" if FTZ else "rcp.rn.f32 $0, $1;"
    return tl.inline_asm_elementwise(ASM, "=f,f", [x], tl.float32, True, 1)


@triton.jit
def rcp(x, rcp_delta_ptr, ARCH: tl.constexpr):
    """The instruction `rcp.approx.ftz.f32`.

    The interpreter reads its result from `rcp_delta_ptr`, the table of `reference.numerics.fp32`: int8
    [2^23], the difference in ulp from the correctly rounded reciprocal for each significand.
    """
    if ARCH == 0:
        bits = x.to(tl.int32, bitcast=True)
        magnitude = bits & 0x7FFFFFFF
        significand = magnitude & 0x007FFFFF
        unit = (significand | 0x3F800000).to(tl.float32, bitcast=True)
        delta = tl.load(rcp_delta_ptr + significand).to(tl.int32)
        scaled = tl.div_rn(1.0, unit).to(tl.int32, bitcast=True) + delta
        scaled -= ((magnitude >> 23) - 127) << 23
        scaled = tl.where(scaled < 0x00800000, 0, scaled)
        scaled = tl.where(magnitude < 0x00800000, 0x7F800000, scaled)
        scaled = tl.where(magnitude == 0x7F800000, 0, scaled)
        scaled = tl.where(magnitude > 0x7F800000, 0x7FFFFFFF, scaled | (bits ^ magnitude))
        return scaled.to(tl.float32, bitcast=True)
    return tl.inline_asm_elementwise("rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], tl.float32, True, 1)


@triton.jit
def smaller(a, b, ARCH: tl.constexpr):
    """The smaller of both, or the other if one is NaN (C's fminf).

    The interpreter's minimum would give NaN.
    """
    if ARCH == 0:
        return tl.where((a < b) | (b != b), a, b)
    return tl.minimum(a, b)


@triton.jit
def larger(a, b, ARCH: tl.constexpr):
    """The larger of both, or the other if one is NaN (C's fmaxf)."""
    if ARCH == 0:
        return tl.where((a > b) | (b != b), a, b)
    return tl.maximum(a, b)


@triton.jit
def to_bf16(x, ARCH: tl.constexpr):
    """Round fp32 to bf16, to nearest, ties to even.

    The interpreter's own cast truncates, and takes subnormal numbers for zeros.
    """
    if ARCH == 0:
        bits = x.to(tl.int32, bitcast=True)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) & -65536
        rounded = tl.where(x == x, rounded, 0x7FC00000)
        y = (rounded >> 16).to(tl.int16).to(tl.bfloat16, bitcast=True)
    else:
        y = x.to(tl.bfloat16)
    return y


@triton.jit
def widened_bits(x):
    """Widen bf16 to fp32 by its bits. The interpreter's own cast takes subnormal numbers for zeros."""
    bits = x.to(tl.int16, bitcast=True).to(tl.int32) << 16
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def from_bf16(x, ARCH: tl.constexpr):
    """Widen bf16 or fp16 to fp32: on a GPU by its cast, bf16 in the interpreter by its bits."""
    if ARCH == 0 and x.dtype == tl.bfloat16:
        y = widened_bits(x)
    else:
        y = x.to(tl.float32)
    return y


@triton.jit
def fma(a, b, c, FTZ: tl.constexpr, ARCH: tl.constexpr):
    """a * b + c, rounded once, of a that came from bf16; b may be a scalar.

    The interpreter's own rounds the product, which is exact in fp64. There the sum is made odd where
    fp64 has lost a part of it, as in `reference.numerics.accumulate.fma`.
    """
    if ARCH == 0:
        a, b, c = flush(a, FTZ, ARCH), flush(b, FTZ, ARCH), flush(c, FTZ, ARCH)
        product = a.to(tl.float64) * b
        total = product + c
        virtual = total - product
        error = (product - (total - virtual)) + (c - virtual)
        bits = total.to(tl.int64, bitcast=True)
        step = tl.where((error > 0) == (total > 0), 1, -1)
        lost = ((error > 0) | (error < 0)) & (bits & 1 == 0)  # not where the sum is no number
        total = tl.where(lost, bits + step, bits).to(tl.float64, bitcast=True)
        y = total.to(tl.float32)
        return _flushed_result(y, total) if FTZ else y
    ASM: tl.constexpr = "fma.rn.ftz.f32 $0, $1, $2, $3;" if FTZ else "fma.rn.f32 $0, $1, $2, $3;"
    return tl.inline_asm_elementwise(ASM, "=f,f,f,f", [a, b, c], tl.float32, True, 1)
