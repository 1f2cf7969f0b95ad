"""The rows of masked input: where they are, and their tiles; the launches and their kernels."""

# SPDX-License-Identifier: Apache-2.0
import torch
import triton
import triton.language as tl

from ...jit.pdl import await_previous
from ...launcher import cdiv, launch, next_power_of_2
from ...triton_target import arch, launch_options
from ..permute import Permutation, write_tiles


def masked_rows(masked_m: torch.Tensor, max_m: int, tile: int) -> Permutation:
    """The permutation that leaves every row of [E * max_m] in its place; those beyond have none.

    Args:
        masked_m: [E] int32 or int64, rows of each expert; a value outside 0 ... max_m counts as the
            nearest inside.
        tile: rows of a tile of the GEMM.
    """
    experts = masked_m.shape[0]
    tiles = experts * cdiv(max_m, tile)

    def empty(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=torch.int32, device=masked_m.device)

    rows, table, end = empty(experts * max_m), empty(tiles, 4), empty(experts)
    launch(masked_rows_kernel, (experts,),
        masked_m.contiguous(), rows, table, end, max_m, tiles, experts,
        BINS=max(16, next_power_of_2(experts)), CHUNK=1024, TILE=tile,
        ARCH=arch(masked_m.device), **launch_options(masked_m.device),
    )  # fmt: skip
    return Permutation(rows, rows, table, end)


def copy_rows(
    x: torch.Tensor, row_index: torch.Tensor, *, columns: int | None = None, fourths: bool = False
) -> torch.Tensor:
    """Copy the rows [N, K] bf16 that are there into [N, columns]; other rows are undefined.

    Args:
        row_index: [N] int32, a row itself, or -1 for a row that is neither read nor written.
        columns: of the result, zero beyond K; K by default.
        fourths: into [N, 4, columns / 4], columns 0, 4, 8 ..., then 1, 5, 9 ....
    """
    (rows, given), columns = x.shape, columns or x.shape[1]
    out = x.new_empty((rows, 4, columns // 4) if fourths else (rows, columns))
    block = min(1024, next_power_of_2(columns // 4))
    launch(copy_rows_kernel, (rows, cdiv(columns // 4, block)),
        x, row_index, out, given // 4, columns // 4, FOURTHS=fourths, BLOCK=block,
        ARCH=arch(x.device), num_warps=4, **launch_options(x.device),
    )  # fmt: skip
    return out


@triton.jit
def masked_rows_kernel(
    masked_ptr,  # [E] int32 or int64
    row_ptr,  # [E * max_m] int32: the row itself, -1 beyond `masked_m`
    tile_ptr,  # [tiles, 4] int32, as `write_tiles` writes it
    end_ptr,  # [E] int32: the expert's last row, + 1
    max_m,
    tiles,
    E,
    BINS: tl.constexpr,  # a power of two >= E
    CHUNK: tl.constexpr,
    TILE: tl.constexpr,
    ARCH: tl.constexpr,
):
    await_previous(ARCH)
    expert = tl.program_id(0)
    bins = tl.arange(0, BINS)
    given = tl.load(masked_ptr + bins, bins < E, other=0)
    counts = tl.minimum(tl.maximum(given, 0), max_m).to(tl.int32)
    first_row = expert * max_m
    write_tiles(expert, counts, first_row, tile_ptr, end_ptr, tiles, E, BINS, CHUNK, TILE)
    count = tl.sum(tl.where(bins == expert, counts, 0))
    for start in range(0, max_m, CHUNK):
        i = start + tl.arange(0, CHUNK)
        tl.store(row_ptr + first_row + i, tl.where(i < count, first_row + i, -1), i < max_m)


@triton.jit
def copy_rows_kernel(
    x_ptr,  # [N, 4 K4] bf16
    row_index_ptr,  # [N] int32
    out_ptr,  # [N, 4 P4] bf16, or [N, 4, P4] with FOURTHS
    K4,
    P4,  # >= K4
    FOURTHS: tl.constexpr,
    BLOCK: tl.constexpr,
    ARCH: tl.constexpr,
):
    await_previous(ARCH)
    row = tl.program_id(0)
    if tl.load(row_index_ptr + row) == row:
        place = row.to(tl.int64)
        i = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        for j in tl.static_range(4):
            value = tl.load(x_ptr + place * K4 * 4 + i * 4 + j, i < K4, other=0.0)
            column = j * P4 + i if FOURTHS else i * 4 + j
            tl.store(out_ptr + place * P4 * 4 + column, value, i < P4)
