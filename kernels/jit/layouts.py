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
    tile = (row // TILE) * tiles + column // 4
    if TILE == 8:
        offset = tile * 32 + row % 8 * 4 + column % 4
    else:
        offset = tile * 512 + (row % 32) * 16 + row % 128 // 32 * 4 + column % 4
    return offset


@triton.jit
def scale_offset(row, column, columns, LAYOUT: tl.constexpr):
    """Offset in any layout, with `columns` blocks a row, the padded ones included."""
    if LAYOUT == LAYOUT_LINEAR:
        return row * columns + column
    return tiled_scale_offset(row, column, columns // 4, 128 if LAYOUT == LAYOUT_128X4 else 8)
