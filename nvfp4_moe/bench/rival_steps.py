"""The steps of a layer that other libraries' grouped GEMMs leave to their caller, as Triton kernels.

Routing, sorting and the weighted sum are the fused layer's own kernels, the activation is the bf16
layer's. Here is what both libraries need besides: the slots in the forms that their GEMMs read, and a
gather of the hidden states. All experts are local.
"""

# SPDX-License-Identifier: Apache-2.0
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from ..kernels.moe.finalize import finalize
from ..kernels.moe.permute import Permutation, permute
from ..kernels.moe.routing import route
from ..reference.moe.routing import Routing, RoutingMethodType

_TILE = 128
"""The rows of a tile in `permute`'s own list of tiles, which no library here reads."""
_CHUNK = 1024
_COLUMNS = 1024


@dataclass(frozen=True)
class Sorted:
    """The slots of a call by expert, and their routing weights."""

    permutation: Permutation
    weights: torch.Tensor  # [T, K] bf16
    top_k: int


@dataclass(frozen=True)
class Groups:
    """The rows of each expert, one expert after another."""

    token: torch.Tensor  # [T * K] int32: the token of a permuted row
    first: torch.Tensor  # [E + 1] int32: the first permuted row of each expert, then their number


@dataclass(frozen=True)
class Blocks:
    """The slots in blocks of equal size, each of one expert."""

    slots: torch.Tensor  # [blocks * size] int32: expanded index; T * K fills a block
    expert: torch.Tensor  # [blocks] int32
    used: torch.Tensor  # [1] int32: the slots of the blocks in use, fillers included


def sort(logits: torch.Tensor, top_k: int) -> Sorted:
    """Route by the softmax over the largest logits, and sort the slots by expert.

    Args:
        logits: [T, E] fp32.
        top_k: experts of a token.
    """
    ids, weights = route(logits, Routing(RoutingMethodType.Renormalize, top_k))
    return Sorted(permute(ids, logits.shape[1], 0, _TILE), weights, top_k)


def grouped(s: Sorted) -> Groups:
    """Return the token of each permuted row, and where each expert begins."""
    p = s.permutation
    slots, experts = p.expanded.numel(), p.end.numel()
    token, first = torch.empty_like(p.expanded), p.end.new_empty(experts + 1)
    groups_kernel[(triton.cdiv(slots, _CHUNK),)](
        p.expanded, p.end, token, first, slots, experts,
        K=s.top_k, CHUNK=_CHUNK, BINS=triton.next_power_of_2(experts + 1), num_warps=4,
    )  # fmt: skip
    return Groups(token, first)


def blocked(s: Sorted, size: int) -> Blocks:
    """Return the slots in blocks of `size`; an expert's blocks follow one another."""
    p = s.permutation
    slots, experts = p.expanded.numel(), p.end.numel()
    most = min(slots, experts) + slots // size
    new = p.end.new_empty
    blocks = Blocks(new(most * size), new(most), new(1))
    blocks_kernel[(experts,)](
        p.expanded, p.end, blocks.slots, blocks.expert, blocks.used, slots, experts,
        SIZE=size, CHUNK=_CHUNK, BINS=triton.next_power_of_2(experts), num_warps=4,
    )  # fmt: skip
    return blocks


def gathered(x: torch.Tensor, token: torch.Tensor) -> torch.Tensor:
    """Return rows of x.

    Args:
        x: [T, H] bf16.
        token: [T * K] int32.

    Returns:
        [T * K, H] bf16.
    """
    width = x.shape[1]
    out = x.new_empty((token.numel(), width))
    gather_kernel[(token.numel(), triton.cdiv(width, _COLUMNS))](
        x, token, out, width, COLUMNS=_COLUMNS, num_warps=4
    )
    return out


def summed(rows: torch.Tensor, place: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Return the weighted sum of each token's rows.

    Args:
        rows: [T * K, H] bf16.
        place: [T * K] int32, the row of each slot.
        weights: [T, K] bf16.

    Returns:
        [T, H] bf16.
    """
    out = rows.new_empty((weights.shape[0], rows.shape[1]))
    finalize(rows, place, weights, out, "slot")
    return out


@triton.jit
def groups_kernel(
    expanded_ptr,  # [slots] int32
    end_ptr,  # [E] int32
    token_ptr,  # [slots] int32
    first_ptr,  # [E + 1] int32
    slots,
    E,
    K: tl.constexpr,
    CHUNK: tl.constexpr,
    BINS: tl.constexpr,
):
    row = tl.program_id(0) * CHUNK + tl.arange(0, CHUNK)
    tl.store(token_ptr + row, tl.load(expanded_ptr + row, row < slots, other=0) // K, row < slots)
    if tl.program_id(0) == 0:
        e = tl.arange(0, BINS)
        first = tl.load(end_ptr + e - 1, (e > 0) & (e <= E), other=0)
        tl.store(first_ptr + e, first, e <= E)


@triton.jit
def blocks_kernel(
    expanded_ptr,  # [slots] int32
    end_ptr,  # [E] int32
    slots_ptr,  # [blocks * SIZE] int32
    expert_ptr,  # [blocks] int32
    used_ptr,  # [1] int32
    slots,
    E,
    SIZE: tl.constexpr,
    CHUNK: tl.constexpr,
    BINS: tl.constexpr,
):
    # A program writes one expert's blocks.
    own = tl.program_id(0)
    e = tl.arange(0, BINS)
    end = tl.load(end_ptr + e, e < E, other=0)
    begin = tl.load(end_ptr + e - 1, (e > 0) & (e < E), other=0)
    blocks = (end - begin + SIZE - 1) // SIZE
    first_block = tl.sum(tl.where(e < own, blocks, 0))
    own_blocks = tl.sum(tl.where(e == own, blocks, 0))
    first_row = tl.sum(tl.where(e == own, begin, 0))
    rows = tl.sum(tl.where(e == own, end - begin, 0))
    for start in range(0, own_blocks * SIZE, CHUNK):
        i = start + tl.arange(0, CHUNK)
        slot = tl.load(expanded_ptr + first_row + i, i < rows, other=0)
        slot = tl.where(i < rows, slot, slots)
        tl.store(slots_ptr + first_block * SIZE + i, slot, i < own_blocks * SIZE)
    for start in range(0, own_blocks, CHUNK):
        i = start + tl.arange(0, CHUNK)
        tl.store(expert_ptr + first_block + i, own, i < own_blocks)
    if own == E - 1:
        tl.store(used_ptr, (first_block + own_blocks) * SIZE)


@triton.jit
def gather_kernel(
    x_ptr,  # [T, H] bf16
    token_ptr,  # [rows] int32
    out_ptr,  # [rows, H] bf16
    H,
    COLUMNS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    token = tl.load(token_ptr + row).to(tl.int64)
    tl.store(
        out_ptr + row * H + column, tl.load(x_ptr + token * H + column, column < H), column < H
    )
