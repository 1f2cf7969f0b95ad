"""Where block scales lie: 128x4, 8x4 and linear (`reference/layouts.py`)."""

# SPDX-License-Identifier: Apache-2.0
import triton
import triton.language as tl

from .formats import LAYOUT_128X4, LAYOUT_LINEAR


@triton.jit
def scale_offset(row, column, sf_tiles, TILE: tl.constexpr = 128):
    """128x4, or with TILE 8 8x4 (`reference/layouts.py`); `sf_tiles` along K, K / 64 rounded up."""
    tile = (row // TILE) * sf_tiles + column // 4
    if TILE == 8:
        offset = tile * 32 + row % 8 * 4 + column % 4
    else:
        offset = tile * 512 + (row % 32) * 16 + row % 128 // 32 * 4 + column % 4
    return offset


@triton.jit
def _scale_offset(row, block, padded_columns, LAYOUT: tl.constexpr):
    """Where the block scales [R, NB] lie; `reference/layouts.py` has the formulas."""
    if LAYOUT == LAYOUT_LINEAR:
        return row * padded_columns + block
    if LAYOUT == LAYOUT_128X4:
        tile = (row // 128) * (padded_columns // 4) + block // 4
        return tile * 512 + (row % 32) * 16 + (row % 128 // 32) * 4 + block % 4
    tile = (row // 8) * (padded_columns // 4) + block // 4
    return tile * 32 + (row % 8) * 4 + block % 4
