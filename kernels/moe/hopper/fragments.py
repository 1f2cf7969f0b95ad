"""NVFP4 weights from shared memory to the registers in which a wgmma takes its A operand.

A wgmma's thread has, of 16 columns, two pairs: columns 2q, 2q + 1 and 8 more, for q = lane % 4. A
thread that reads 16 bytes has 32 successive codes instead. So each 128 columns are multiplied in another
order, the same for weights and tokens: column k = 32c + 8j + 4b + i, with bits i0 i1 b j0 j1 c0 c1 from
the lowest, has place b c0 c1 i0 i1 j0 j1. Then lane c's 32 codes are its own operands of the 128
columns, no code moves to another thread, and the codes of a pair (b = 0, 1) lie 16 bits apart in a word.
`jit/fragments.py` puts tokens into this order.
"""

# SPDX-License-Identifier: Apache-2.0
from .gluon import gl, gluon, reinterpreted

ROWS = gl.constexpr(128)
"""Rows of weights of a whole tile, 16 for each of 8 warps, and of a tile of block scales in 128x4.

A half tile has 64 rows and 4 warps.
"""
WARPS = gl.constexpr(8)
WORDS = gl.constexpr(16)
"""Words of 8 codes in 128 columns."""


@gluon.constexpr_function
def warps_of(rows):
    """Return the warps that multiply a tile of so many rows of weights."""
    return WARPS.value * rows // ROWS.value


@gluon.constexpr_function
def word_layout(rows):
    """Lay out int32 [rows, WORDS]: a thread reads 4 successive words of rows r and r + 8."""
    return gl.DistributedLinearLayout(
        reg_bases=[[0, 1], [0, 2], [8, 0]],
        lane_bases=[[0, 4], [0, 8], [1, 0], [2, 0], [4, 0]],
        warp_bases=[[16, 0], [32, 0], [64, 0]][: 3 if rows == ROWS.value else 2],
        block_bases=[],
        shape=[rows, WORDS.value],
    )


@gluon.constexpr_function
def scale_layout(rows):
    """Lay out uint16 [ROWS, 4]: a thread reads the two scales of its 32 codes of rows r and r + 8.

    In a half tile it reads those of rows r + 64 and r + 72, too.
    """
    whole = rows == ROWS.value
    return gl.DistributedLinearLayout(
        reg_bases=[[8, 0]] if whole else [[8, 0], [64, 0]],
        lane_bases=[[0, 1], [0, 2], [1, 0], [2, 0], [4, 0]],
        warp_bases=[[16, 0], [32, 0], [64, 0]] if whole else [[16, 0], [32, 0]],
        block_bases=[],
        shape=[ROWS.value, 4],
    )


@gluon.constexpr_function
def scale_memory():
    """Address two tiles of the layout 128x4, successive along K, as uint16 [ROWS, 4].

    The offset's bits, from the lowest: a pair of blocks within the tile, row / 32, row % 32, the tile.
    """
    rows = [[32, 0], [64, 0], [1, 0], [2, 0], [4, 0], [8, 0], [16, 0]]
    return gl.SharedLinearLayout(offset_bases=[[0, 1], *rows, [0, 2]])


@gluon.jit
def _scale_pairs(scales):
    """Turn uint16 of two e4m3 scales into two words, each a scale times 2^118 in bf16, twice."""
    return gl.inline_asm_elementwise(
        """{ .reg .b16 both, first, second; .reg .b32 halves; .reg .f32 f, s;
        cvt.u16.u32 both, $2;
        cvt.rn.f16x2.e4m3x2 halves, both;
        mov.b32 {first, second}, halves;
        cvt.f32.f16 f, first; mul.f32 f, f, 0f7A800000; prmt.b32 $0, f, 0, 0x3232;
        cvt.f32.f16 s, second; mul.f32 s, s, 0f7A800000; prmt.b32 $1, s, 0, 0x3232; }""",
        "=r,=r,r", [scales.to(gl.int32)], dtype=(gl.int32, gl.int32), is_pure=True, pack=1,
    )  # fmt: skip


@gluon.jit
def _products(words, scales):
    """Multiply words [R, c, j0] of 8 codes by their scales: bf16 [R, 64] in the order above, times 2^-8.

    A product of a nibble and 0x1040 has the code's sign in bit 15 and its exponent and significand in
    bits 8 to 6, where bf16 has them, with a bias of 127 in the place of 1.
    """
    b0i0, b1i0, b0i1, b1i1, b0i2, b1i2, b0i3, b1i3 = gl.inline_asm_elementwise(
        """{ .reg .b32 v, q;
        and.b32 q, $8, 0x000F000F; mul.lo.u32 q, q, 0x1040; and.b32 q, q, 0x81C081C0;
        mul.rn.bf16x2 q, q, $9; mov.b32 {$0, $1}, q;
        and.b32 q, $8, 0x00F000F0; mul.lo.u32 q, q, 0x0104; and.b32 q, q, 0x81C081C0;
        mul.rn.bf16x2 q, q, $9; mov.b32 {$2, $3}, q;
        shr.u32 v, $8, 8;
        and.b32 q, v, 0x000F000F; mul.lo.u32 q, q, 0x1040; and.b32 q, q, 0x81C081C0;
        mul.rn.bf16x2 q, q, $9; mov.b32 {$4, $5}, q;
        and.b32 q, v, 0x00F000F0; mul.lo.u32 q, q, 0x0104; and.b32 q, q, 0x81C081C0;
        mul.rn.bf16x2 q, q, $9; mov.b32 {$6, $7}, q; }""",
        "=h,=h,=h,=h,=h,=h,=h,=h,r,r", [words, scales],
        dtype=(gl.bfloat16, gl.bfloat16, gl.bfloat16, gl.bfloat16,
               gl.bfloat16, gl.bfloat16, gl.bfloat16, gl.bfloat16),
        is_pure=True, pack=1,
    )  # fmt: skip
    low = gl.join(gl.join(b0i0, b1i0), gl.join(b0i1, b1i1))  # [R, c, j0, b, i0]
    high = gl.join(gl.join(b0i2, b1i2), gl.join(b0i3, b1i3))
    places = gl.permute(gl.join(low, high), (0, 2, 5, 4, 1, 3))  # [R, j0, i1, i0, c, b]
    return gl.reshape(places, (words.shape[0], 64))


@gluon.jit
def load_codes(words, scales, upper):
    """Load codes and scales of 128 columns, for `halves`.


    `words` is int32 [R, WORDS] in shared memory, `scales` int32 [1, 2, 128] there: the block scales of
    ROWS rows. Where R is half of that, `upper` says that the words are of rows 64 to 127. TMA cannot
    bring half of the scales: they begin 8 bytes into 16.
    """
    R: gl.constexpr = words.shape[0]
    pairs = reinterpreted(scales, gl.uint16, [ROWS, 4], scale_memory()).load(scale_layout(R))
    if R < ROWS:
        low, high = gl.split(gl.permute(gl.reshape(pairs, (2, R, 4)), (1, 2, 0)))
        pairs = gl.where(upper, high, low)
    return words.load(word_layout(R)), pairs


@gluon.jit
def halves(words, scales):
    """Return (words, scale) of j1 = 0, then of j1 = 1, of what `load_codes` loaded, for `fragment`."""
    w = gl.reshape(words, (words.shape[0], 4, 2, 2))  # [R, c, j1, j0]
    w0, w1 = gl.split(gl.permute(w, (0, 1, 3, 2)))
    s0, s1 = _scale_pairs(scales)
    OF_PAIR: gl.constexpr = gl.SliceLayout(2, w0.type.layout)
    s0 = gl.expand_dims(gl.convert_layout(s0, OF_PAIR, assert_trivial=True), 2)
    s1 = gl.expand_dims(gl.convert_layout(s1, OF_PAIR, assert_trivial=True), 2)
    w0, s0 = gl.broadcast(w0, s0)
    w1, s1 = gl.broadcast(w1, s1)
    return w0, s0, w1, s1


@gluon.jit
def fragment(words, scales, LAYOUT: gl.constexpr):
    """Return the A operand of 64 columns, values times 2^-8, exactly; no value changes its thread."""
    return gl.convert_layout(_products(words, scales), LAYOUT, assert_trivial=True)
