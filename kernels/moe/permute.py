"""The small kernels around the two grouped GEMMs: permutation and finalize."""

# SPDX-License-Identifier: Apache-2.0
import triton
import triton.language as tl

from ..jit.arithmetic import to_bf16
from ..jit.pdl import await_previous


@triton.jit
def _expert_counted(
    expert, counts, tile_ptr, end_ptr, tiles, E,
    BINS: tl.constexpr, CHUNK: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """The first permuted row of an expert, given every expert's slots; its tiles and end written."""
    bins = tl.arange(0, BINS)
    in_tiles = tl.where(bins < E, (counts + TILE - 1) // TILE, 0)
    first_row = tl.sum(tl.where(bins < expert, counts, 0))
    first_tile = tl.sum(tl.where(bins < expert, in_tiles, 0))
    count = tl.sum(tl.where(bins == expert, counts, 0))
    tl.store(end_ptr + expert, first_row + count)

    # The last expert also marks the tiles that nobody uses.
    own = (count + TILE - 1) // TILE
    until = tl.where(expert == E - 1, tiles - first_tile, own)
    for start in range(0, until, CHUNK):
        i = start + tl.arange(0, CHUNK)
        tl.store(tile_ptr + first_tile + i, tl.where(i < own, expert, -1), i < until)
        tl.store(tile_ptr + tiles + first_tile + i, first_row + i * TILE, i < until)
    return first_row


@triton.jit
def permute_kernel(
    ids_ptr,  # [N] int32 global expert ids, by expanded index
    expanded_ptr,  # [N] int32: the expanded index of a permuted row
    permuted_ptr,  # [N] int32: the permuted row of an expanded index, -1 where held elsewhere
    tile_ptr,  # [2, tiles] int32: a tile's expert (-1: none), its first permuted row
    end_ptr,  # [E] int32: the expert's last permuted row, + 1
    N,
    tiles,
    first_expert,
    E,
    BINS: tl.constexpr,  # a power of two > E
    CHUNK: tl.constexpr,
    TILE: tl.constexpr,
    ARCH: tl.constexpr,
):
    """Sort slots by expert, stably; a program writes what concerns its own expert."""
    await_previous(ARCH)
    expert = tl.program_id(0)
    counts = tl.zeros((BINS,), tl.int32)
    for start in range(0, N, CHUNK):
        index = start + tl.arange(0, CHUNK)
        local = tl.load(ids_ptr + index, index < N, other=first_expert - 1) - first_expert
        counts += tl.histogram(tl.where((local >= 0) & (local < E), local, BINS - 1), BINS)
    row = _expert_counted(expert, counts, tile_ptr, end_ptr, tiles, E, BINS, CHUNK, TILE)

    for start in range(0, N, CHUNK):
        index = start + tl.arange(0, CHUNK)
        local = tl.load(ids_ptr + index, index < N, other=first_expert - 1) - first_expert
        here = (local == expert).to(tl.int32)
        rows = row + tl.cumsum(here, 0) - 1
        tl.store(expanded_ptr + rows, index, here > 0)
        tl.store(permuted_ptr + index, rows, here > 0)
        row += tl.sum(here)
        if expert == 0:
            elsewhere = (local < 0) | (local >= E)
            tl.store(permuted_ptr + index, -1, elsewhere & (index < N))


# The same in three launches, for many slots: the ids are read in chunks, each by one program.


@triton.jit
def count_kernel(
    ids_ptr,
    total_ptr,  # [BINS] int32, zeros: slots of each expert
    count_ptr,  # [E, chunks] int32: of them in a chunk
    N,
    first_expert,
    E,
    BINS: tl.constexpr,
    CHUNK: tl.constexpr,
    ARCH: tl.constexpr,
):
    await_previous(ARCH)
    chunk = tl.program_id(0)
    index = chunk * CHUNK + tl.arange(0, CHUNK)
    local = tl.load(ids_ptr + index, index < N, other=first_expert - 1) - first_expert
    counts = tl.histogram(tl.where((local >= 0) & (local < E), local, BINS - 1), BINS)
    bins = tl.arange(0, BINS)
    tl.store(count_ptr + bins * tl.num_programs(0) + chunk, counts, bins < E)
    tl.atomic_add(total_ptr + bins, counts, (bins < E) & (counts > 0), sem="relaxed")


@triton.jit
def offset_kernel(
    total_ptr,
    count_ptr,  # in: of each chunk; out: the permuted row of its first slot
    tile_ptr,
    end_ptr,
    chunks,
    tiles,
    E,
    BINS: tl.constexpr,
    STEP: tl.constexpr,
    TILE: tl.constexpr,
    ARCH: tl.constexpr,
):
    await_previous(ARCH)
    expert = tl.program_id(0)
    totals = tl.load(total_ptr + tl.arange(0, BINS))
    row = _expert_counted(expert, totals, tile_ptr, end_ptr, tiles, E, BINS, STEP, TILE)
    for start in range(0, chunks, STEP):
        chunk = start + tl.arange(0, STEP)
        at = count_ptr + expert * chunks + chunk
        count = tl.load(at, chunk < chunks, other=0)
        tl.store(at, row + tl.cumsum(count, 0) - count, chunk < chunks)
        row += tl.sum(count)


@triton.jit
def place_kernel(
    ids_ptr,
    row_ptr,  # [E, chunks] int32, by `offset_kernel`
    expanded_ptr,
    permuted_ptr,
    N,
    first_expert,
    E,
    CHUNK: tl.constexpr,
    ARCH: tl.constexpr,
):
    await_previous(ARCH)
    chunk = tl.program_id(0)
    i = tl.arange(0, CHUNK)
    index = chunk * CHUNK + i
    local = tl.load(ids_ptr + index, index < N, other=first_expert - 1) - first_expert
    held = (local >= 0) & (local < E)
    earlier = (local[None, :] == local[:, None]) & (i[None, :] < i[:, None])
    first = tl.load(row_ptr + local * tl.num_programs(0) + chunk, held, other=0)
    row = first + tl.sum(earlier.to(tl.int32), 1)
    tl.store(permuted_ptr + index, tl.where(held, row, -1), index < N)
    tl.store(expanded_ptr + row, index, held)


@triton.jit
def finalize_kernel(
    rows_ptr,  # [rows, H] bf16, by permuted row
    permuted_ptr,  # [T * K] int32
    weights_ptr,  # [T, K] bf16 or fp32
    out_ptr,  # [T, width] bf16, fp16 or fp32
    H,
    width,
    K: tl.constexpr,
    GROUPS: tl.constexpr,  # strided groups of slots, summed apart (`split_k_groups`)
    COLUMNS: tl.constexpr,
    ARCH: tl.constexpr,
):
    await_previous(ARCH)
    token = tl.program_id(0)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = column < width
    total = tl.zeros((COLUMNS,), tl.float32)
    for j in tl.static_range(GROUPS):
        part = tl.zeros((COLUMNS,), tl.float32)
        for k in range(j, K, GROUPS):
            row = tl.load(permuted_ptr + token * K + k)
            weight = tl.load(weights_ptr + token * K + k).to(tl.float32)
            held = tl.where(inside, row, -1) >= 0
            value = tl.load(rows_ptr + row.to(tl.int64) * H + column, held, other=0.0)
            if ARCH == 0:  # the interpreter's tl.fma rounds the product, which is exact in fp64
                added = (value.to(tl.float64) * weight + part).to(tl.float32)
            else:
                added = tl.fma(value.to(tl.float32), tl.zeros_like(part) + weight, part)
            part = tl.where(held, added, part)  # the weight of a slot of no expert may be NaN
        total = part if j == 0 else total + part
    out = out_ptr + token.to(tl.int64) * width + column
    if out_ptr.dtype.element_ty == tl.bfloat16:
        tl.store(out, to_bf16(total, ARCH), inside)
    else:
        tl.store(out, total, inside)
