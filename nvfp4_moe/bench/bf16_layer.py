"""The bf16 layer that NVFP4 is compared with: fused Triton kernels as a serving stack has them.

Routing and sorting are our own kernels'. A GEMM's program owns BM permuted rows of one expert, on the
MMA's M side, and BN rows of its weights; the second multiplies by the routing weight. Activation and
the sum over slots are kernels of their own. `tune` measures which tiles are fastest for given inputs.

    y = x[token] @ w13[expert].T + bias;  a = activation(y);  out = sum of weight * (a @ w2.T + bias)
"""

# SPDX-License-Identifier: Apache-2.0
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import triton
import triton.language as tl
from triton.runtime.errors import OutOfResources

from ..kernels.jit.arithmetic import to_bf16
from ..kernels.moe.permute import Permutation, permute
from ..kernels.moe.routing import route
from ..kernels.triton_target import arch
from ..reference.moe.routing import Routing, RoutingMethodType
from .bf16_weights import Weights
from .clock import microseconds


@dataclass(frozen=True)
class Tiles:
    """One GEMM's tiles."""

    bm: int  # permuted rows; the same in both GEMMs of a call
    bn: int  # rows of weights
    bk: int
    group: int  # tiles of permuted rows that share weights in the L2 cache, one after another
    stages: int
    warps: int


TILES = (
    Tiles(16, 64, 128, 1, 4, 4),
    Tiles(16, 128, 64, 1, 5, 4),
    Tiles(16, 128, 128, 1, 4, 4),
    Tiles(16, 256, 64, 1, 4, 8),
    Tiles(32, 64, 128, 1, 4, 4),
    Tiles(32, 128, 64, 8, 4, 4),
    Tiles(32, 128, 128, 8, 3, 4),
    Tiles(64, 128, 64, 8, 4, 4),
    Tiles(64, 128, 128, 8, 3, 4),
    Tiles(64, 256, 64, 16, 4, 8),
    Tiles(128, 128, 64, 16, 4, 8),
    Tiles(128, 128, 128, 16, 3, 8),
    Tiles(128, 256, 64, 8, 4, 8),
    Tiles(128, 256, 64, 32, 3, 8),
)


def candidates(each: float) -> list[Tiles]:
    """The tiles worth trying where an expert has `each` tokens on average."""
    if each <= 8:
        heights: tuple[int, ...] = (16,)
    elif each <= 48:
        heights = (16, 32, 64)
    elif each <= 192:
        heights = (32, 64, 128)
    else:
        heights = (64, 128)
    return [t for t in TILES if t.bm in heights]


@triton.jit(do_not_specialize=["divisor", "tiles"])
def gemm_kernel(
    x_ptr,  # [rows, K] bf16
    w_ptr,  # [E, N, K] bf16
    bias_ptr,  # [E, N] bf16, or None
    weight_ptr,  # [slots] bf16 routing weights by expanded index, or None
    out_ptr,  # [slots, N] bf16, by permuted row
    expanded_ptr,  # [slots] int32
    tile_ptr,  # [tiles, 4] int32: a tile's expert (-1: none), its first permuted row, its rows
    divisor,  # with GATHER, x's row is expanded index / divisor
    tiles,
    N,
    K,
    GATHER: tl.constexpr,  # otherwise x's row is the permuted one
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    GROUP: tl.constexpr,
    STAGES: tl.constexpr,
    EVEN: tl.constexpr,  # BK divides K
    ARCH: tl.constexpr,
):
    # GROUP tiles of rows for one tile of weights, then the next tile of weights.
    in_group = GROUP * tl.cdiv(N, BN)
    first_tile = tl.program_id(0) // in_group * GROUP
    height = tl.minimum(tiles - first_tile, GROUP)
    place = tl.program_id(0) % in_group
    tile = first_tile + place % height
    tile_ptr += tile * 4
    expert = tl.load(tile_ptr).to(tl.int64)
    if expert < 0:
        return
    i = tl.arange(0, BM)
    live = i < tl.load(tile_ptr + 2)
    row = tl.where(live, tl.load(tile_ptr + 1) + i, 0)
    source = tl.load(expanded_ptr + row, live, other=0) // divisor if GATHER else row
    column = place // height * BN + tl.arange(0, BN)
    inside = column < N
    k = tl.arange(0, BK)
    # Rows that are not there repeat one that is: loads need no mask, and nothing of them is stored.
    x = x_ptr + source.to(tl.int64)[:, None] * K + k[None, :]
    w = w_ptr + (expert * N + column % N)[None, :] * K + k[:, None]

    acc = tl.zeros((BM, BN), tl.float32)
    for start in tl.range(0, K, BK, num_stages=STAGES):
        if EVEN:
            a = tl.load(x)
            b = tl.load(w)
        else:
            a = tl.load(x, (k < K - start)[None, :], other=0.0)
            b = tl.load(w, (k < K - start)[:, None], other=0.0)
        if ARCH == 0:  # the interpreter multiplies the bit patterns of bf16
            a = a.to(tl.float32)
            b = b.to(tl.float32)
        acc = tl.dot(a, b, acc)
        x += BK
        w += BK
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + expert * N + column, inside, other=0.0).to(tl.float32)[None, :]
    if weight_ptr is not None:
        slot = tl.load(expanded_ptr + row, live, other=0)
        acc *= tl.load(weight_ptr + slot, live, other=0.0).to(tl.float32)[:, None]
    out = out_ptr + row.to(tl.int64)[:, None] * N + column[None, :]
    tl.store(out, to_bf16(acc, ARCH), live[:, None] & inside[None, :])


@triton.jit
def activation_kernel(
    y_ptr,  # [slots, 2 I or I] bf16
    out_ptr,  # [slots, I] bf16
    end_ptr,  # [E] int32; rows from the last end on are of no expert
    E,
    inner,  # I
    alpha,
    beta,
    limit,
    GATED: tl.constexpr,  # SwiGLU, rows [up; gate]; otherwise the square of ReLU
    COLUMNS: tl.constexpr,
    ARCH: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    if row >= tl.load(end_ptr + E - 1):
        return
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = column < inner
    if GATED:
        y = y_ptr + row * 2 * inner + column
        up = tl.load(y, inside, other=0.0).to(tl.float32)
        gate = tl.load(y + inner, inside, other=0.0).to(tl.float32)
        up = tl.minimum(tl.maximum(up, -limit), limit)
        gate = tl.minimum(gate, limit)
        a = gate / (1.0 + tl.exp(-alpha * gate)) * (up + beta)
    else:
        a = tl.maximum(tl.load(y_ptr + row * inner + column, inside, other=0.0).to(tl.float32), 0.0)
        a = a * a
    tl.store(out_ptr + row * inner + column, to_bf16(a, ARCH), inside)


@triton.jit
def sum_kernel(
    rows_ptr,  # [slots, H] bf16, by permuted row
    permuted_ptr,  # [T * K] int32, -1: of another rank
    out_ptr,  # [T, H] bf16
    H,
    K: tl.constexpr,
    COLUMNS: tl.constexpr,
    ARCH: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    total = tl.zeros((COLUMNS,), tl.float32)
    for k in range(K):
        row = tl.load(permuted_ptr + token * K + k).to(tl.int64)
        here = tl.where(column < H, row, -1) >= 0
        total += tl.load(rows_ptr + row * H + column, here, other=0.0).to(tl.float32)
    tl.store(out_ptr + token * H + column, to_bf16(total, ARCH), column < H)


def gemm(
    x: torch.Tensor,
    w: torch.Tensor,
    bias: torch.Tensor | None,
    routing_weights: torch.Tensor | None,
    p: Permutation,
    divisor: int,
    t: Tiles,
) -> torch.Tensor:
    """[slots, N] bf16 by permuted row; with `divisor` 0, x is by permuted row too."""
    _, n, k = w.shape
    tiles = p.tiles.shape[0]
    out = x.new_empty((p.expanded.shape[0], n))
    gemm_kernel[(tiles * triton.cdiv(n, t.bn),)](
        x, w, bias, routing_weights, out, p.expanded, p.tiles, divisor, tiles, n, k,
        GATHER=divisor > 0, BM=t.bm, BN=t.bn, BK=t.bk, GROUP=t.group, STAGES=t.stages,
        EVEN=k % t.bk == 0, ARCH=arch(x.device), num_warps=t.warps,
    )  # fmt: skip
    return out


def activated(
    y: torch.Tensor,
    end: torch.Tensor,
    *,
    gated: bool = True,
    alpha: float = 1.0,
    beta: float = 0.0,
    limit: float = float("inf"),
) -> torch.Tensor:
    """Compute the activation of the first GEMM's rows.

    Args:
        y: [slots, 2 I] bf16, columns [up; gate], or [slots, I] if not `gated`.
        end: [E] int32, the end of each expert's rows; rows from the last end on are left as they are.
        gated: SwiGLU with these parameters; otherwise the square of ReLU.

    Returns:
        [slots, I] bf16.
    """
    i = y.shape[1] // (2 if gated else 1)
    out = y.new_empty((y.shape[0], i))
    columns = min(1024, triton.next_power_of_2(i))
    activation_kernel[(y.shape[0], triton.cdiv(i, columns))](
        y, out, end, end.shape[0], i, alpha, beta, limit,
        GATED=gated, COLUMNS=columns, ARCH=arch(y.device), num_warps=4,
    )  # fmt: skip
    return out


def _activated(y: torch.Tensor, w: Weights, p: Permutation) -> torch.Tensor:
    gated = w.activation.gated
    return activated(y, p.end, gated=gated, alpha=w.alpha, beta=w.beta, limit=w.limit)


def layer(
    x: torch.Tensor, logits: torch.Tensor, w: Weights, top_k: int, tiles: tuple[Tiles, Tiles]
) -> torch.Tensor:
    """[T, H] bf16 of x [T, H] bf16 and logits [T, all experts] fp32; what E experts here add."""
    ids, routing_weights = route(logits, Routing(RoutingMethodType.Renormalize, top_k))
    p = permute(ids, w.w13.shape[0], 0, tiles[0].bm)
    y = gemm(x, w.w13, w.w13_bias, None, p, top_k, tiles[0])
    rows = gemm(_activated(y, w, p), w.w2, w.w2_bias, routing_weights, p, 0, tiles[1])
    out = torch.empty_like(x)
    tokens, h = x.shape
    columns = min(1024, triton.next_power_of_2(h))
    sum_kernel[(tokens, triton.cdiv(h, columns))](
        rows, p.permuted, out, h, K=top_k, COLUMNS=columns, ARCH=arch(x.device), num_warps=4
    )
    return out


def tune(
    x: torch.Tensor, logits: torch.Tensor, w: Weights, top_k: int, calls: int
) -> tuple[Tiles, Tiles]:
    """The fastest tiles of both GEMMs for these inputs, each GEMM measured alone.

    Raises:
        RuntimeError: no candidate fits this GPU.
    """
    ids, routing_weights = route(logits, Routing(RoutingMethodType.Renormalize, top_k))
    found = []
    tried = candidates(ids.numel() / logits.shape[1])
    for bm in sorted({t.bm for t in tried}):
        p = permute(ids, w.w13.shape[0], 0, bm)
        some = [t for t in tried if t.bm == bm]
        us1, first = _fastest(partial(gemm, x, w.w13, w.w13_bias, None, p, top_k), some, calls)
        if first is None:
            continue
        a = _activated(gemm(x, w.w13, w.w13_bias, None, p, top_k, first), w, p)
        us2, second = _fastest(
            partial(gemm, a, w.w2, w.w2_bias, routing_weights, p, 0), some, calls
        )
        if second is not None:
            found.append((us1 + us2, first, second))
    if not found:
        raise RuntimeError(f"none of {tried} fits this GPU")
    return min(found, key=lambda f: f[0])[1:]


def _fastest(
    run: Callable[[Tiles], object], tried: list[Tiles], calls: int
) -> tuple[float, Tiles | None]:
    best: tuple[float, Tiles | None] = (float("inf"), None)
    for t in tried:
        try:
            us = microseconds(partial(run, t), calls, 3)
        except OutOfResources:  # of a smaller GPU's shared memory
            continue
        if us < best[0]:
            best = us, t
    return best
