"""Codes and block scales to bf16, as the K loops of `jit/mma.py` read decoded rows: the launch."""

# SPDX-License-Identifier: Apache-2.0
import torch
import triton

from ..reference.layouts import padded_shape
from ..reference.recipe import BLOCK_SIZE, SfLayout
from .jit.decode import decode_kernel
from .jit.fragments import padded_to_fragments
from .triton_target import arch, launch_options


def decode(
    codes: torch.Tensor,
    block_scales: torch.Tensor,
    layout: SfLayout,
    *,
    columns: int | None = None,
    operand: bool = False,
    row_index: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
    fragments: bool = False,
    place: torch.Tensor | None = None,
) -> torch.Tensor:
    """Code times block scale, exact; columns 0, 4, 8 ... of a row together, then 1, 5, 9 ....

    Args:
        codes: [R, K/2] uint8, contiguous.
        block_scales: of `layout`, a byte each.
        columns: of the result, a multiple of 16 and zero beyond K; K by default.
        operand: values times 2^-8, as `jit.mma.decoded_sums` takes the weights.
        row_index: [R] int32, a row itself, or -1 for a row that is neither read nor written.
        out: [>= R, 4, columns / 4] bf16, written up to R; new by default.
        fragments: in the order of `jit/fragments.py`, [R * S, columns rounded up to 128].
        place: with `fragments` int32, S for each row, where its values go; -1: nowhere.
    """
    rows, half = codes.shape
    blocks, columns = half * 2 // BLOCK_SIZE, columns or half * 2
    if fragments:
        size = (rows if place is None else place.numel(), padded_to_fragments(columns))
        out = torch.empty(size, dtype=torch.bfloat16, device=codes.device)
    elif out is None:
        out = torch.empty((rows, 4, columns // 4), dtype=torch.bfloat16, device=codes.device)
    padded = columns // BLOCK_SIZE
    at_once = min(64, triton.next_power_of_2(max(padded, 8) if fragments else padded))
    tile = 128 if layout == SfLayout.layout_128x4 else 8
    programs = triton.cdiv(rows, tile) * (tile // 8)
    decode_kernel[(programs, triton.cdiv(padded, at_once))](
        codes.view(torch.uint16), block_scales.view(torch.uint8), row_index, out, place, rows, blocks,
        padded,
        padded_shape(rows, blocks, layout)[1], OPERAND=operand, LAYOUT=int(layout), BLOCKS=at_once,
        FRAGMENTS=fragments, SLOTS=0 if place is None else place.numel() // rows,
        ARCH=arch(codes.device), num_warps=4, **launch_options(codes.device),
    )  # fmt: skip
    return out
