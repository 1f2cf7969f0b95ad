"""Sort the slots of a call by expert: the launch and its kernels."""

# SPDX-License-Identifier: Apache-2.0
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from ..jit.pdl import await_previous
from ..launcher import cdiv, launch, next_power_of_2
from ..triton_target import arch, launch_options

_ONE_LAUNCH_SLOTS = 4096
"""Up to this many slots one launch sorts them: the program of each expert reads all slots twice."""
_CHUNK = 128
"""Slots of a program where three launches sort them."""


@dataclass(frozen=True)
class Permutation:
    """The slots sorted by expert, and the tiles of the GEMM over them."""

    expanded: torch.Tensor  # [T * K] int32: expanded index of a permuted row
    permuted: torch.Tensor  # [T * K] int32: permuted row of an expanded index, -1: not on this rank
    tiles: torch.Tensor  # [tiles, 4] int32, as `write_tiles` writes it
    end: torch.Tensor  # [E] int32: the expert's last permuted row, + 1


def permute(ids: torch.Tensor, num_local: int, local_expert_offset: int, tile: int) -> Permutation:
    """Sort the slots by expert; slots of one expert stay in their order.

    Args:
        ids: [T, K] int32, global expert ids. Slots of experts that are not local get no row.
        tile: rows of a tile of the GEMM.
    """
    slots = ids.numel()
    tiles = min(slots, num_local) + slots // tile

    def empty(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=torch.int32, device=ids.device)

    p = Permutation(empty(slots), empty(slots), empty(tiles, 4), empty(num_local))
    ids = ids.contiguous()
    bins = max(16, next_power_of_2(num_local + 1))
    options = {"ARCH": arch(ids.device), **launch_options(ids.device)}
    if slots <= _ONE_LAUNCH_SLOTS:
        chunk = max(16, next_power_of_2(slots))
        launch(permute_kernel, (num_local,),
            ids, p.expanded, p.permuted, p.tiles, p.end,
            slots, tiles, local_expert_offset, num_local,
            BINS=bins, CHUNK=chunk, TILE=tile, num_warps=4 if chunk <= 2048 else 8, **options,
        )  # fmt: skip
        return p
    chunks = cdiv(slots, _CHUNK)
    counts, total = empty(num_local, chunks), empty(num_local)
    launch(count_kernel, (chunks,),
        ids, counts, slots, local_expert_offset, num_local,
        BINS=bins, CHUNK=_CHUNK, **options,
    )  # fmt: skip
    launch(before_kernel, (num_local,), counts, total, chunks, STEP=1024, **options)
    launch(place_kernel, (num_local + chunks,),
        ids, counts, total, p.expanded, p.permuted, p.tiles, p.end,
        slots, chunks, tiles, local_expert_offset, num_local,
        BINS=bins, CHUNK=_CHUNK, AT_ONCE=16, TILE=tile, **options,
    )  # fmt: skip
    return p


@triton.jit
def _store_tiles(tile_ptr, tile, expert, first, rows, used, live):
    """Store the records of tiles [N, 1], or of one tile."""
    field = tl.arange(0, 4)[None, :]
    of_tile = tl.where(field == 0, expert, tl.where(field == 1, first, rows))
    tl.store(tile_ptr + tile * 4 + field, tl.where(field == 3, used, of_tile), live)


@triton.jit
def write_tiles(
    expert, counts, first_row, tile_ptr, end_ptr, tiles, E,
    BINS: tl.constexpr, CHUNK: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Write an expert's tiles and end, given its first row and the slots of every expert.

    A tile's record is its expert (-1: none), its first row, its rows, and how many tiles are in use of
    all: a program of the GEMM begins after one load of 16 bytes.

    Whole tiles come first, then each expert's last one, from the fullest to the emptiest: programs that
    take tile after tile then end together.
    """
    bins = tl.arange(0, BINS)
    counts = tl.where(bins < E, counts, 0)
    count = tl.sum(tl.where(bins == expert, counts, 0))
    tl.store(end_ptr + expert, first_row + count)

    whole = counts // TILE
    own = count // TILE
    last = counts % TILE
    rest = count % TILE
    used = tl.sum(whole) + tl.sum((last > 0).to(tl.int32))
    first_tile = tl.sum(tl.where(bins < expert, whole, 0))
    for start in range(0, own, CHUNK):
        i = start + tl.arange(0, CHUNK)[:, None]
        _store_tiles(tile_ptr, first_tile + i, expert, first_row + i * TILE, TILE, used, i < own)
    before = (last > rest) | ((last == rest) & (bins < expert))
    place = tl.sum(whole) + tl.sum(before.to(tl.int32))
    _store_tiles(tile_ptr, place, expert, first_row + own * TILE, rest, used, rest > 0)

    # The last expert also marks the tiles that nobody uses. With an `if`, ptxas keeps a register of
    # `prologue_kernel` in local memory.
    for start in range(tl.where(expert == E - 1, used, tiles), tiles, CHUNK):
        i = start + tl.arange(0, CHUNK)[:, None]
        _store_tiles(tile_ptr, i, -1, 0, 0, used, i < tiles)


@triton.jit
def _expert_counted(
    expert, counts, tile_ptr, end_ptr, tiles, E,
    BINS: tl.constexpr, CHUNK: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Return an expert's first permuted row from every expert's slots; write its tiles and its end."""
    first_row = tl.sum(tl.where(tl.arange(0, BINS) < expert, counts, 0))
    write_tiles(expert, counts, first_row, tile_ptr, end_ptr, tiles, E, BINS, CHUNK, TILE)
    return first_row


@triton.jit
def permute_kernel(
    ids_ptr,  # [N] int32 global expert ids, by expanded index
    expanded_ptr,  # [N] int32: the expanded index of a permuted row
    permuted_ptr,  # [N] int32: the permuted row of an expanded index, -1: not on this rank
    tile_ptr,  # [tiles, 4] int32, as `write_tiles` writes it
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
    count_ptr,  # [E, chunks] int32: slots of an expert in a chunk
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


@triton.jit
def before_kernel(
    count_ptr,  # in: of each chunk; out: of the chunks before it
    total_ptr,  # [E] int32: of all chunks
    chunks,
    STEP: tl.constexpr,
    ARCH: tl.constexpr,
):
    """Add an expert's counts. Programs share no sum, as atomic additions to few addresses take long."""
    await_previous(ARCH)
    expert = tl.program_id(0)
    before = tl.zeros((), tl.int32)
    for start in range(0, chunks, STEP):
        chunk = start + tl.arange(0, STEP)
        at = count_ptr + expert * chunks + chunk
        count = tl.load(at, chunk < chunks, other=0)
        tl.store(at, before + tl.cumsum(count, 0) - count, chunk < chunks)
        before += tl.sum(count)
    tl.store(total_ptr + expert, before)


@triton.jit
def place_kernel(
    ids_ptr,
    before_ptr, total_ptr,  # as `before_kernel` writes them
    expanded_ptr, permuted_ptr, tile_ptr, end_ptr,
    N,
    chunks,
    tiles,
    first_expert,
    E,
    BINS: tl.constexpr,
    CHUNK: tl.constexpr,
    AT_ONCE: tl.constexpr,  # slots that are compared with a chunk's at a time: more need more registers
    TILE: tl.constexpr,
    ARCH: tl.constexpr,
):  # fmt: skip
    """Write an expert's tiles and its end, or the rows of a chunk's slots."""
    await_previous(ARCH)
    bins = tl.arange(0, BINS)
    totals = tl.load(total_ptr + bins, bins < E, other=0)
    if tl.program_id(0) < E:
        _expert_counted(tl.program_id(0), totals, tile_ptr, end_ptr, tiles, E, BINS, CHUNK, TILE)
    else:
        chunk = tl.program_id(0) - E
        i = tl.arange(0, CHUNK)
        index = chunk * CHUNK + i
        local = tl.load(ids_ptr + index, index < N, other=first_expert - 1) - first_expert
        is_local = (local >= 0) & (local < E)
        local = tl.where(is_local, local, BINS - 1)
        before = tl.load(before_ptr + local * chunks + chunk, is_local, other=0)
        earlier = tl.zeros((CHUNK, AT_ONCE), tl.int32)
        for start in tl.static_range(0, CHUNK, AT_ONCE):
            j = start + tl.arange(0, AT_ONCE)
            other_index = chunk * CHUNK + j
            other = tl.load(ids_ptr + other_index, other_index < N, other=0) - first_expert
            same = (local[:, None] == other[None, :]) & (j[None, :] < i[:, None])
            earlier += same.to(tl.int32)
        first = tl.gather(tl.cumsum(totals, 0) - totals, local, 0)
        row = first + before + tl.sum(earlier, 1)
        tl.store(permuted_ptr + index, tl.where(is_local, row, -1), index < N)
        tl.store(expanded_ptr + row, index, is_local)
