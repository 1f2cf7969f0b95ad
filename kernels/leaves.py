"""The arithmetic that NVFP4 kernels are made of, each operation rounding once, in Triton.

Every function takes ARCH (10 * major + minor, or 0 in the interpreter, which has neither inline
assembly nor a right e4m3 cast) and picks the GPU's own instruction where there is one: e4m3 from
sm_89, e2m1 from sm_100. Elsewhere the same bits come from integer arithmetic. FTZ makes an operation
flush subnormal inputs and results, as FlashInfer's CUDA build does. `reference/` is the
specification; the assembly also keeps the compiler from fusing a multiply into an add.
"""

# SPDX-License-Identifier: Apache-2.0
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_wait

FLT_MAX = tl.constexpr(3.4028234663852886e38)
SIXTH = tl.constexpr(0.16666667163372039794921875)  # fp32 of 1/6, which is also rcp.approx(6)
_MIN_NORMAL = tl.constexpr(1.1754943508222875e-38)


@triton.jit
def _flushed(x):
    """Subnormals to zero of the same sign, without assembly."""
    return tl.where(tl.abs(x) < _MIN_NORMAL, x * 0.0, x)


@triton.jit
def flush(x, FTZ: tl.constexpr, ARCH: tl.constexpr):
    """What an operation of the build reads where x is stored."""
    if FTZ:
        if ARCH == 0:
            return _flushed(x)
        return tl.inline_asm_elementwise(
            "mul.rn.ftz.f32 $0, $1, 0f3F800000;", "=f,f", [x], tl.float32, True, 1
        )
    return x


@triton.jit
def mul(a, b, FTZ: tl.constexpr, ARCH: tl.constexpr):
    if ARCH == 0:
        if FTZ:
            return _flushed(_flushed(a) * _flushed(b))
        return a * b
    if FTZ:
        return tl.inline_asm_elementwise(
            "mul.rn.ftz.f32 $0, $1, $2;", "=f,f,f", [a, b], tl.float32, True, 1
        )
    return tl.inline_asm_elementwise(
        "mul.rn.f32 $0, $1, $2;", "=f,f,f", [a, b], tl.float32, True, 1
    )


@triton.jit
def mul_magnitude(a, b, FTZ: tl.constexpr, ARCH: tl.constexpr):
    """|a| * b; the assembly keeps the magnitude a modifier of the multiplication, which is free."""
    if ARCH == 0:
        return mul(tl.abs(a), b, FTZ, ARCH)
    if FTZ:
        return tl.inline_asm_elementwise(
            "{ .reg .f32 a; abs.f32 a, $1; mul.rn.ftz.f32 $0, a, $2; }",
            "=f,f,f",
            [a, b],
            tl.float32,
            True,
            1,
        )
    return tl.inline_asm_elementwise(
        "{ .reg .f32 a; abs.f32 a, $1; mul.rn.f32 $0, a, $2; }",
        "=f,f,f",
        [a, b],
        tl.float32,
        True,
        1,
    )


@triton.jit
def sub(a, b, FTZ: tl.constexpr, ARCH: tl.constexpr):
    if ARCH == 0:
        if FTZ:
            return _flushed(_flushed(a) - _flushed(b))
        return a - b
    if FTZ:
        return tl.inline_asm_elementwise(
            "sub.rn.ftz.f32 $0, $1, $2;", "=f,f,f", [a, b], tl.float32, True, 1
        )
    return tl.inline_asm_elementwise(
        "sub.rn.f32 $0, $1, $2;", "=f,f,f", [a, b], tl.float32, True, 1
    )


@triton.jit
def add(a, b, FTZ: tl.constexpr, ARCH: tl.constexpr):
    if ARCH == 0:
        if FTZ:
            return _flushed(_flushed(a) + _flushed(b))
        return a + b
    if FTZ:
        return tl.inline_asm_elementwise(
            "add.rn.ftz.f32 $0, $1, $2;", "=f,f,f", [a, b], tl.float32, True, 1
        )
    return tl.inline_asm_elementwise(
        "add.rn.f32 $0, $1, $2;", "=f,f,f", [a, b], tl.float32, True, 1
    )


@triton.jit
def div(a, b, FTZ: tl.constexpr, ARCH: tl.constexpr):
    """Correctly rounded a / b."""
    if ARCH == 0:
        if FTZ:
            return _flushed(tl.div_rn(_flushed(a), _flushed(b)))
        return tl.div_rn(a, b)
    if FTZ:
        return tl.inline_asm_elementwise(
            "div.rn.ftz.f32 $0, $1, $2;", "=f,f,f", [a, b], tl.float32, True, 1
        )
    return tl.inline_asm_elementwise(
        "div.rn.f32 $0, $1, $2;", "=f,f,f", [a, b], tl.float32, True, 1
    )


@triton.jit
def reciprocal(x, FTZ: tl.constexpr, ARCH: tl.constexpr):
    """Correctly rounded 1 / x: the bits of `div(1.0, x)`, in fewer instructions."""
    if ARCH == 0:
        return div(1.0, x, FTZ, ARCH)
    if FTZ:
        return tl.inline_asm_elementwise("rcp.rn.ftz.f32 $0, $1;", "=f,f", [x], tl.float32, True, 1)
    return tl.inline_asm_elementwise("rcp.rn.f32 $0, $1;", "=f,f", [x], tl.float32, True, 1)


@triton.jit
def rcp(x, rcp_delta_ptr, ARCH: tl.constexpr):
    """`rcp.approx.ftz.f32`; `rcp_delta_ptr` is the reference's table, read in the interpreter only."""
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
    """fminf, for which NaN is no number; the interpreter's minimum is NaN then."""
    if ARCH == 0:
        return tl.where((a < b) | (b != b), a, b)
    return tl.minimum(a, b)


@triton.jit
def larger(a, b, ARCH: tl.constexpr):
    """fmaxf, likewise."""
    if ARCH == 0:
        return tl.where((a > b) | (b != b), a, b)
    return tl.maximum(a, b)


@triton.jit
def to_bf16(x, ARCH: tl.constexpr):
    """fp32 to bf16, to nearest, ties to even; the interpreter's cast truncates and loses subnormals."""
    if ARCH == 0:
        bits = x.to(tl.int32, bitcast=True)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) & -65536
        rounded = tl.where(x == x, rounded, 0x7FC00000)
        y = (rounded >> 16).to(tl.int16).to(tl.bfloat16, bitcast=True)
    else:
        y = x.to(tl.bfloat16)
    return y


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
    value = bits.to(tl.float32, bitcast=True) * 1.329227995784916e36
    return tl.where((byte & 0x7F) == 0x7F, float("nan"), value)


@triton.jit
def columns(x):
    """[R, NB, N, 8] as its eight columns [R, NB, N], first to last."""
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
    """fp32 [R, NB, 16] to packed e2m1 codes, int32 [R, NB, 2], by the GPU's own conversion."""
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


@triton.jit
def await_previous(ARCH: tl.constexpr):
    """Wait until what the kernels before wrote is visible: this one may be here before they end."""
    if ARCH >= 90:
        gdc_wait()


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
    return (e4m3_decode(sf.to(tl.int32)) * 3.3230699894622e35).to(tl.bfloat16)


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
    value = decode_fourth(words, WHICH, ARCH).to(tl.float32) * 8.507059173023462e37  # 2^126
    return (value * scale).to(tl.bfloat16)
