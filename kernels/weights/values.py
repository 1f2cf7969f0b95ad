"""Decode the experts' weights to bf16 in their natural order, as products of training read them."""

# SPDX-License-Identifier: Apache-2.0
import torch
import triton
import triton.language as tl

from ...reference.recipe import BLOCK_SIZE
from ..jit.decode import decode_values
from ..jit.e4m3 import e4m3_decode
from ..jit.formats import LAYOUT_128X4
from ..jit.fragments import join_fourths
from ..jit.layouts import scale_offset
from ..jit.pdl import await_previous
from ..launcher import cdiv, launch, next_power_of_2
from ..triton_target import arch, launch_options

_ROWS = 8


def weight_values(
    codes: torch.Tensor, block_scales: torch.Tensor, places: torch.Tensor, columns: int
) -> torch.Tensor:
    """Code times block scale, exact in bf16, of prepared weights.

    Args:
        codes: [E, R, K/2] uint8, and block_scales [E, R, K/16] in 128x4, as `Experts` holds them.
        places: [M] int32, the prepared row of each natural row that is wanted.
        columns: of the result, a multiple of 16; the first of K.

    Returns:
        [E, M, columns] bf16.
    """
    experts, rows, half = codes.shape
    wanted, blocks = places.numel(), columns // BLOCK_SIZE
    out = torch.empty((experts, wanted, columns), dtype=torch.bfloat16, device=codes.device)
    at_once = min(64, next_power_of_2(blocks))
    launch(weight_values_kernel, (experts * cdiv(wanted, _ROWS), cdiv(blocks, at_once)),
        codes.view(torch.uint16), block_scales.view(torch.uint8), places, out, rows, wanted,
        half * 2 // BLOCK_SIZE, blocks,
        ROWS=_ROWS, BLOCKS=at_once, ARCH=arch(codes.device), num_warps=4,
        **launch_options(codes.device),
    )  # fmt: skip
    return out


@triton.jit
def weight_values_kernel(
    codes_ptr,  # [E, R, K/4] uint16, four codes each
    sf_ptr,  # [E, R, K/16] uint8, 128x4: R is a multiple of 128, K of 64
    place_ptr,  # [M] int32
    out_ptr,  # [E, M, 16 blocks] bf16
    R,
    M,
    NB,  # K / 16
    blocks,  # that are wanted
    ROWS: tl.constexpr,
    BLOCKS: tl.constexpr,
    ARCH: tl.constexpr,
):
    await_previous(ARCH)
    tiles = (M + ROWS - 1) // ROWS
    expert = (tl.program_id(0) // tiles).to(tl.int64)
    m = tl.program_id(0) % tiles * ROWS + tl.arange(0, ROWS)
    live = m < M
    row = expert * R + tl.load(place_ptr + m, live, other=0)
    block = (tl.program_id(1) * BLOCKS + tl.arange(0, BLOCKS))[None, :]
    inside = live[:, None] & (block < blocks)
    four = tl.arange(0, 4)[None, None, :]
    word = (row[:, None] * NB + block)[:, :, None] * 4 + four
    words = tl.load(codes_ptr + word, inside[:, :, None], other=0)
    sf = tl.load(sf_ptr + scale_offset(row[:, None], block, NB, LAYOUT_128X4), inside, other=0)
    scale = e4m3_decode(sf.to(tl.int32))[:, :, None]
    values = join_fourths(
        decode_values(words, scale, 0, ARCH),
        decode_values(words, scale, 1, ARCH),
        decode_values(words, scale, 2, ARCH),
        decode_values(words, scale, 3, ARCH),
    )
    column = tl.program_id(1) * BLOCKS * 16 + tl.arange(0, BLOCKS * 16)
    out = out_ptr + (expert * M + m)[:, None] * (blocks * 16) + column[None, :]
    tl.store(out, values, live[:, None] & (column < blocks * 16)[None, :])
