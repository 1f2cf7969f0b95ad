"""Rows of tokens that the grouped GEMM for sm_90 gathers into its ring, each from where it lies.

A few warps copy them, 16 bytes a lane, and take turns with each eight rows of a tile. A place in x is
counted in such eights of columns.
"""

# SPDX-License-Identifier: Apache-2.0
from .gluon import async_copy, gl, gluon

COPIERS = gl.constexpr(3)
"""Warps that copy rows of tokens. Beside the one for TMA, Triton starts as many in any case."""


@gluon.constexpr_function
def eights_of(part, tokens):
    """Return how many eights of a tile's rows a copier brings: they take turns."""
    return (tokens // 8 - part + COPIERS.value - 1) // COPIERS.value


@gluon.constexpr_function
def rows_of_copier(tokens):
    """Return the most rows that a copier brings of a tile, rounded up to a power of two."""
    eights = eights_of(0, tokens)
    return 8 << (eights - 1).bit_length()


@gluon.jit
def load_slots(expanded_ptr, row, slots):
    """Load the expanded indices of permuted rows, undefined where a row is no expert's.

    So no load waits for an expert's count of rows. Where no expert has any, not even `row` is defined.
    """
    return gl.load(expanded_ptr + row, (row >= 0) & (row < slots), other=0)


@gluon.jit
def copy_eight(
    x_ptr, x_bufs, place_buf, stage, k, K,
    FIRST: gl.constexpr, STAGES: gl.constexpr, GROUPS: gl.constexpr,
):  # fmt: skip
    """Bring step k of eight rows of a tile, from FIRST; `place_buf` has where they begin in x, or -1."""
    # Eight lanes copy 128 successive bytes of a row. More rows need more than 24 registers.
    L: gl.constexpr = gl.BlockedLayout([2, 8], [4, 8], [1, 1], [1, 0])
    BOX: gl.constexpr = x_bufs.shape[1]
    BOXES: gl.constexpr = x_bufs.shape[0] // (STAGES * GROUPS * 2)
    place = place_buf.load(gl.SliceLayout(1, L))
    column = gl.arange(0, 64, layout=gl.SliceLayout(0, L))
    # Only now 64 bits: Triton would keep a lane's own pointer in registers of every warp.
    eight = gl.expand_dims(place + k * (GROUPS * 16), 1) + gl.expand_dims(column // 8, 0)
    x = x_ptr + (eight.to(gl.int64) * 8 + gl.expand_dims(column % 8, 0))
    for g in gl.static_range(GROUPS):
        live = gl.expand_dims(place >= 0, 1)
        if g > 0:
            live = live & ((k * GROUPS + g) * 128 < K)
        for half in gl.static_range(2):
            box = x_bufs.index(((stage * GROUPS + g) * 2 + half) * BOXES + FIRST // BOX)
            async_copy.async_copy_global_to_shared(
                box.slice(FIRST % BOX, 8, dim=0), x + (g * 128 + half * 64), live
            )
