"""The small kernels around the two grouped GEMMs: permutation, decoding of activations, finalize."""

# SPDX-License-Identifier: Apache-2.0
import triton
import triton.language as tl

from .leaves import e4m3_decode, to_bf16
from .moe_gemm import decode_fourth


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
):
    """Sort slots by expert, stably; a program writes what concerns its own expert."""
    expert = tl.program_id(0)
    counts = tl.zeros((BINS,), tl.int32)
    for start in range(0, N, CHUNK):
        index = start + tl.arange(0, CHUNK)
        local = tl.load(ids_ptr + index, index < N, other=first_expert - 1) - first_expert
        counts += tl.histogram(tl.where((local >= 0) & (local < E), local, BINS - 1), BINS)
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

    for start in range(0, N, CHUNK):
        index = start + tl.arange(0, CHUNK)
        local = tl.load(ids_ptr + index, index < N, other=first_expert - 1) - first_expert
        here = local == expert
        row = first_row + tl.cumsum(here.to(tl.int32), 0) - 1
        tl.store(expanded_ptr + row, index, here)
        tl.store(permuted_ptr + index, row, here)
        first_row += tl.sum(here.to(tl.int32))
        if expert == 0:
            elsewhere = (local < 0) | (local >= E)
            tl.store(permuted_ptr + index, -1, elsewhere & (index < N))


@triton.jit
def decode_kernel(
    codes_ptr,  # [M, K/4] uint16, four codes each
    sf_ptr,  # [M, K/16] uint8, linear
    x_ptr,  # [M, 4, K/4] bf16: columns 0, 4, 8 ..., columns 1, 5, 9 ...
    K,
    WORDS: tl.constexpr,
    ARCH: tl.constexpr,
):
    """Code times block scale, exact in bf16."""
    row = tl.program_id(0).to(tl.int64)
    word = tl.program_id(1) * WORDS + tl.arange(0, WORDS)
    inside = word < K // 4
    words = tl.load(codes_ptr + row * (K // 4) + word, inside, other=0)
    sf = tl.load(sf_ptr + row * (K // 16) + word // 4, inside, other=0)
    scale = e4m3_decode(sf.to(tl.int32))
    out = x_ptr + row * K + word
    for i in tl.static_range(4):
        value = (
            decode_fourth(words, i, ARCH).to(tl.float32) * 8.507059173023462e37
        )  # 2^126, which decoded codes lack
        tl.store(out + i * (K // 4), (value * scale).to(tl.bfloat16), inside)


@triton.jit
def finalize_kernel(
    rows_ptr,  # [rows, H] bf16, by permuted row
    permuted_ptr,  # [T * K] int32
    weights_ptr,  # [T, K] bf16 or fp32
    out_ptr,  # [T, width] bf16
    H,
    width,
    K: tl.constexpr,
    GROUPS: tl.constexpr,  # strided groups of slots, summed apart (`reference.moe.split_k_groups`)
    COLUMNS: tl.constexpr,
    ARCH: tl.constexpr,
):
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
            part = tl.fma(value.to(tl.float32), tl.zeros_like(part) + weight, part)
        total = part if j == 0 else total + part
    out = out_ptr + token.to(tl.int64) * width + column
    tl.store(out, to_bf16(total, ARCH), inside)
