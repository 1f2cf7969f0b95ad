"""Offsets of block scales by row and block; `reference/layouts.py` has the formulas."""

# SPDX-License-Identifier: Apache-2.0
import triton
import triton.language as tl

from .formats import LAYOUT_128X4, LAYOUT_LINEAR


@triton.jit
def tiled_scale_offset(row, column, tiles, TILE: tl.constexpr = 128):
    """Offset in the layout 128x4, or with TILE 8 in 8x4.

    `tiles` is the number of tiles along K: of 4 blocks each, K / 64 rounded up.
    """
    # Shifts and masks: a quotient of signed numbers, and a remainder, take several instructions more.
    if TILE == 8:
        in_tile = (row & 7) << 2
        tile = (row >> 3) * tiles + (column >> 2)
        offset = (tile << 5) + in_tile + (column & 3)
    else:
        in_tile = ((row & 31) << 4) + ((row >> 5 & 3) << 2)
        tile = (row >> 7) * tiles + (column >> 2)
        offset = (tile << 9) + in_tile + (column & 3)
    return offset


@triton.jit
def scale_offset(row, column, columns, LAYOUT: tl.constexpr):
    """Offset in any layout, with `columns` blocks a row, the padded ones included."""
    if LAYOUT == LAYOUT_LINEAR:
        return row * columns + column
    return tiled_scale_offset(row, column, columns // 4, 128 if LAYOUT == LAYOUT_128X4 else 8)
