"""Write codes and block scales to memory, the scales in any layout of `layouts.py`."""

# SPDX-License-Identifier: Apache-2.0
import triton
import triton.language as tl

from .formats import LAYOUT_128X4, LAYOUT_LINEAR
from .layouts import scale_offset


@triton.jit
def store_codes(
    codes, byte, row, column, live, codes_ptr, sf_ptr, NB, padded_columns, LAYOUT: tl.constexpr,
    SHIFT: tl.constexpr = 0,
):  # fmt: skip
    """Write codes [R, NB, 2] and block scales of the blocks at (row, column + SHIFT) of live rows.

    SHIFT is a multiple of 4, and becomes a part of the instructions, as in `load_blocks`.
    """
    tl.static_assert(SHIFT % 4 == 0)
    mask = live & (column < NB - SHIFT)
    word = (row * NB + column)[:, :, None] * 2 + tl.arange(0, 2)[None, None, :]
    tl.store(codes_ptr + word + 2 * SHIFT, codes, mask[:, :, None])
    offset = scale_offset(row, column, padded_columns, LAYOUT)
    BYTES: tl.constexpr = 1 if LAYOUT == LAYOUT_LINEAR else 128 if LAYOUT == LAYOUT_128X4 else 8
    byte = tl.where(mask, byte, 0).to(tl.uint8)  # padded columns are zero
    tl.store(sf_ptr + offset + BYTES * SHIFT, byte, live & (column < padded_columns - SHIFT))


@triton.jit
def zero_padding_rows(
    sf_ptr, M, padded_rows, padded_columns, first, N: tl.constexpr, LAYOUT: tl.constexpr
):
    """Zero the scales of rows >= M: N words of four, from word `first` of the last tile of rows."""
    TILE: tl.constexpr = 128 if LAYOUT == LAYOUT_128X4 else 8
    word = first + tl.arange(0, N)
    row = word % TILE
    if LAYOUT == LAYOUT_128X4:
        row = row % 4 * 32 + row // 4
    base = (padded_rows - TILE).to(tl.int64)
    mask = (base + row >= M) & (word < TILE * (padded_columns // 4))
    words = sf_ptr.to(tl.pointer_type(tl.int32)) + base * (padded_columns // 4) + word
    tl.store(words, tl.zeros((N,), tl.int32), mask)
