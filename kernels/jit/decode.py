"""e2m1 codes times e4m3 block scales, in bf16.

The product is exact: a code has at most 2 significant bits and a block scale 4, and bf16 holds 8.
"""

# SPDX-License-Identifier: Apache-2.0
import triton
import triton.language as tl

from .e4m3 import e4m3_decode
from .formats import LAYOUT_128X4
from .fragments import join_fourths, load_places, store_at_places, store_fragments
from .layouts import scale_offset
from .pdl import await_previous


@triton.jit
def decode_fourth(words, WHICH: tl.constexpr, ARCH: tl.constexpr):
    """Nibble WHICH of 16-bit words of four codes, as values times 2^-126: bf16, fp32 in the interpreter.

    Exponent and significand of a code move to their places in bf16, two codes in one 32-bit register.
    The exponent's bias is 1 in e2m1 and 127 in bf16, hence the factor.
    """
    # One operation for each nibble: the compiler then decodes in the layout of the MMA's operand.
    if ARCH == 0:
        w = (words.to(tl.int32) >> (4 * WHICH)) & 15
        value = (((w & 7) << 22) | ((w & 8) << 28)).to(tl.float32, bitcast=True)
    elif WHICH == 0:  # 0xEA is (a & b) | c
        value = tl.inline_asm_elementwise(
            """{ .reg .b32 m, s; shl.b32 m, $1, 6; shl.b32 s, $1, 12; and.b32 m, m, 0x01C001C0;
            lop3.b32 $0, s, 0x80008000, m, 0xEA; }""",
            "=r,r",
            [words],
            tl.bfloat16,
            True,
            2,
        )
    elif WHICH == 1:
        value = tl.inline_asm_elementwise(
            """{ .reg .b32 m, s; shl.b32 m, $1, 2; shl.b32 s, $1, 8; and.b32 m, m, 0x01C001C0;
            lop3.b32 $0, s, 0x80008000, m, 0xEA; }""",
            "=r,r",
            [words],
            tl.bfloat16,
            True,
            2,
        )
    elif WHICH == 2:
        value = tl.inline_asm_elementwise(
            """{ .reg .b32 m, s; shr.u32 m, $1, 2; shl.b32 s, $1, 4; and.b32 m, m, 0x01C001C0;
            lop3.b32 $0, s, 0x80008000, m, 0xEA; }""",
            "=r,r",
            [words],
            tl.bfloat16,
            True,
            2,
        )
    else:
        value = tl.inline_asm_elementwise(
            """{ .reg .b32 m; shr.u32 m, $1, 6; and.b32 m, m, 0x01C001C0;
            lop3.b32 $0, $1, 0x80008000, m, 0xEA; }""",
            "=r,r",
            [words],
            tl.bfloat16,
            True,
            2,
        )
    return value


@triton.jit
def operand_scale(sf):
    """e4m3 bytes as bf16, times 2^118, which keeps 448 within bf16's range."""
    return (e4m3_decode(sf.to(tl.int32)) * 2.0**118).to(tl.bfloat16)


@triton.jit
def scaled(a, scale, ARCH: tl.constexpr):
    """`decode_fourth` (times 2^-126) times `operand_scale` (times 2^118): values times 2^-8, exactly."""
    if ARCH == 0:
        product = a * scale.to(tl.float32)
    else:
        product = a * scale
    return product


@triton.jit
def decode_values(words, scale, WHICH: tl.constexpr, ARCH: tl.constexpr):
    """Nibble WHICH of 16-bit words of four codes, times their block scales in fp32: bf16, exact."""
    value = decode_fourth(words, WHICH, ARCH).to(tl.float32) * 2.0**126
    return (value * scale).to(tl.bfloat16)


@triton.jit(do_not_specialize=["R"])
def decode_kernel(
    codes_ptr,  # [R, K/4] uint16, four codes each
    sf_ptr,  # uint8, of the layout
    row_index_ptr,  # [R] int32, a row itself, or -1: it is not read or written; or None: every row is
    out_ptr,  # bf16 [R, 4, P/4]: columns 0, 4, 8 ..., columns 1, 5, 9 ...; or of FRAGMENTS
    place_ptr,  # [R, SLOTS] int32, with SLOTS: the rows of `out_ptr` that a row goes to, -1: none
    token_ptr,  # [R] fp32, with FRAGMENTS, or None
    placed_token_ptr,  # [rows] fp32, which go to the same rows
    R,
    NB,  # K / 16
    padded,  # P / 16 >= K / 16; what is more is zero
    sf_columns,  # blocks of a row of the layout
    OPERAND: tl.constexpr,  # values times 2^-8, as `mma.decoded_sums` takes the weights
    LAYOUT: tl.constexpr,
    BLOCKS: tl.constexpr,
    FRAGMENTS: tl.constexpr,  # [rows, P rounded up to 128], as `fragments.py`; 8 divides BLOCKS
    SLOTS: tl.constexpr,
    ARCH: tl.constexpr,
):
    """Code times block scale, exact in bf16, of eight rows."""
    await_previous(ARCH)
    i = tl.arange(0, 8)
    if LAYOUT == LAYOUT_128X4:  # rows whose block scales share sectors of memory: a pair in each 32
        row = tl.program_id(0).to(tl.int64) // 16 * 128
        row += tl.program_id(0) % 16 * 2 + i % 2 + i // 2 * 32
    else:
        row = tl.program_id(0).to(tl.int64) * 8 + i
    live = row < R
    if row_index_ptr is not None:
        live = live & (tl.load(row_index_ptr + row, live) == row)
    row, live = row[:, None], live[:, None]
    block = (tl.program_id(1) * BLOCKS + tl.arange(0, BLOCKS))[None, :]
    inside = live & (block < NB)
    four = tl.arange(0, 4)[None, None, :]
    word = (row * NB + block)[:, :, None] * 4 + four
    words = tl.load(codes_ptr + word, inside[:, :, None], other=0)
    sf = tl.load(sf_ptr + scale_offset(row, block, sf_columns, LAYOUT), inside, other=0)
    scale = operand_scale(sf)[:, :, None]
    if FRAGMENTS:
        x = join_fourths(
            scaled(decode_fourth(words, 0, ARCH), scale, ARCH),
            scaled(decode_fourth(words, 1, ARCH), scale, ARCH),
            scaled(decode_fourth(words, 2, ARCH), scale, ARCH),
            scaled(decode_fourth(words, 3, ARCH), scale, ARCH),
        )
        first = tl.program_id(1) * BLOCKS * 16
        x = (x * 256.0).to(tl.bfloat16)
        places = load_places(place_ptr, row, live, SLOTS)
        if token_ptr is not None:
            token = tl.load(token_ptr + row, live, other=0.0)
            store_at_places(token, placed_token_ptr, places, tl.program_id(1) == 0, 1, SLOTS)
        store_fragments(x, out_ptr, places, first, padded * 16, SLOTS)
    else:
        written = (live & (block < padded))[:, :, None]
        for j in tl.static_range(4):
            value = scaled(decode_fourth(words, j, ARCH), scale, ARCH)
            if not OPERAND:
                value = value * 256.0
            out = out_ptr + ((row * 4 + j) * padded + block)[:, :, None] * 4 + four
            tl.store(out, value, written)


@triton.jit
def decode_row_to_places(
    codes_ptr, sf_ptr, given_ptr, row, first, places, values_ptr, token_ptr, NB,
    BLOCKS: tl.constexpr, SLOTS: tl.constexpr, ARCH: tl.constexpr,
):  # fmt: skip
    """Write what `decode_kernel` does with FRAGMENTS, of BLOCKS blocks of one row from block `first`.

    Args:
        codes_ptr: [M, 4 NB] uint16, four codes each.
        sf_ptr: [M, NB] uint8.
        given_ptr: [M] fp32, or None.
        row: [1, 1] int64.
    """
    block = first + tl.arange(0, BLOCKS)[None, :]
    inside = block < NB
    word = (row * NB + block)[:, :, None] * 4 + tl.arange(0, 4)[None, None, :]
    words = tl.load(codes_ptr + word, inside[:, :, None], other=0)
    sf = tl.load(sf_ptr + row * NB + block, inside, other=0)
    scale = operand_scale(sf)[:, :, None]
    x = join_fourths(
        scaled(decode_fourth(words, 0, ARCH), scale, ARCH),
        scaled(decode_fourth(words, 1, ARCH), scale, ARCH),
        scaled(decode_fourth(words, 2, ARCH), scale, ARCH),
        scaled(decode_fourth(words, 3, ARCH), scale, ARCH),
    )
    if given_ptr is not None:
        store_at_places(tl.load(given_ptr + row), token_ptr, places, first == 0, 1, SLOTS)
    store_fragments((x * 256.0).to(tl.bfloat16), values_ptr, places, first * 16, NB * 16, SLOTS)
