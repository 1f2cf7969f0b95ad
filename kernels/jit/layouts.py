"""Offsets of block scales by row and block; `reference/layouts.py` has the formulas."""

# SPDX-License-Identifier: Apache-2.0
import triton
import triton.language as tl

from .formats import LAYOUT_128X4, LAYOUT_LINEAR


@triton.jit
def tiled_scale_offset(row, four, in_four, tiles, TILE: tl.constexpr = 128):
    """Offset in the layout 128x4, or with TILE 8 in 8x4, of block 4 * `four` + `in_four` of a row.

    `tiles` is the number of tiles along K: of 4 blocks each, K / 64 rounded up.
    """
    # Shifts and masks: a quotient of signed numbers, and a remainder, take several instructions more.
    if TILE == 8:
        in_tile = (row & 7) << 2
        tile = (row >> 3) * tiles + four
        offset = (tile << 5) + in_tile + in_four
    else:
        in_tile = ((row & 31) << 4) + ((row >> 5 & 3) << 2)
        tile = (row >> 7) * tiles + four
        offset = (tile << 9) + in_tile + in_four
    return offset


@triton.jit
def scale_offset(row, column, columns, LAYOUT: tl.constexpr):
    """Offset in any layout, with `columns` blocks a row, the padded ones included."""
    if LAYOUT == LAYOUT_LINEAR:
        return row * columns + column
    TILE: tl.constexpr = 128 if LAYOUT == LAYOUT_128X4 else 8
    return tiled_scale_offset(row, column >> 2, column & 3, columns // 4, TILE)
