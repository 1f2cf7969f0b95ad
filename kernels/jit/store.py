"""Write codes and block scales to memory, the scales in any layout of `layouts.py`."""

# SPDX-License-Identifier: Apache-2.0
import triton
import triton.language as tl

from .formats import LAYOUT_128X4
from .layouts import scale_offset


@triton.jit
def _store_words(codes, row, column, mask, codes_ptr, NB):
    """Write codes [R, NB, 2] of the blocks at (row, column) under a mask."""
    word = (row * NB + column)[:, :, None] * 2 + tl.arange(0, 2)[None, None, :]
    tl.store(codes_ptr + word, codes, mask[:, :, None])


@triton.jit
def store_codes(
    codes, byte, row, column, live, codes_ptr, sf_ptr, NB, padded_columns, LAYOUT: tl.constexpr
):
    """Write codes [R, NB, 2] and block scales of the blocks at (row, column) of live rows."""
    mask = live & (column < NB)
    _store_words(codes, row, column, mask, codes_ptr, NB)
    offset = scale_offset(row, column, padded_columns, LAYOUT)
    byte = tl.where(mask, byte, 0).to(tl.uint8)  # padded columns are zero
    tl.store(sf_ptr + offset, byte, live & (column < padded_columns))


@triton.jit
def first_of_four_rows():
    """Return the first row of a program that has rows r, r + 32, r + 64 and r + 96 of 128."""
    program = tl.program_id(0).to(tl.int64)
    return (program >> 5) * 128 + (program & 31)


@triton.jit
def store_codes_of_four_rows(
    codes, byte, row, column, live, first, codes_ptr, sf_ptr, M, NB, padded_columns
):
    """Write codes [4, N, 2] and block scales of four rows from block `first`, scales in 128x4.

    Four blocks of the rows of `first_of_four_rows` are 16 bytes there. A byte of one row alone is a
    write to memory's smallest unit of 32 bytes for four of them.
    """
    N: tl.constexpr = codes.shape[1]
    mask = live & (column < NB)
    _store_words(codes, row, column, mask, codes_ptr, NB)
    byte = tl.where(mask, byte, 0).to(tl.uint8)  # padded columns are zero
    byte = tl.reshape(tl.permute(tl.reshape(byte, (4, N // 4, 4)), (1, 0, 2)), (N // 4, 16))
    of_tile = tl.arange(0, 16)[None, :]
    four = (first >> 2) + tl.arange(0, N // 4)[:, None]
    start = first_of_four_rows()
    offset = ((start >> 7) * (padded_columns >> 2) + four) * 512 + (start & 31) * 16 + of_tile
    written = (start + (of_tile >> 2) * 32 < M) & (four * 4 < padded_columns)
    tl.store(sf_ptr + offset, byte, written)


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
