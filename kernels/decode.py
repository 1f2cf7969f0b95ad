"""Codes and block scales to bf16, as the K loops of `jit/mma.py` read decoded rows: the launch."""

# SPDX-License-Identifier: Apache-2.0
import torch

from ..reference.layouts import padded_shape
from ..reference.recipe import BLOCK_SIZE, SfLayout
from .jit.decode import decode_kernel
from .jit.fragments import padded_to_fragments
from .launcher import cdiv, launch, next_power_of_2
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
) -> torch.Tensor:
    """Code times block scale, exact; columns 0, 4, 8 ... of a row together, then 1, 5, 9 ....

    Args:
        codes: [R, K/2] uint8, contiguous.
        block_scales: of `layout`, a byte each.
        columns: of the result, a multiple of 16 and zero beyond K; K by default.
        operand: values times 2^-8, as `jit.mma.decoded_sums` takes the weights.
        row_index: [R] int32, a row itself, or -1 for a row that is neither read nor written.
        out: [>= R, 4, columns / 4] bf16, written up to R; new by default.
    """
    rows, half = codes.shape
    padded = (columns or half * 2) // BLOCK_SIZE
    if out is None:
        out = torch.empty((rows, 4, padded * 4), dtype=torch.bfloat16, device=codes.device)
    at_once = min(64, next_power_of_2(padded))
    tile = 128 if layout == SfLayout.layout_128x4 else 8
    blocks = half * 2 // BLOCK_SIZE
    launch(decode_kernel, (cdiv(rows, tile) * (tile // 8), cdiv(padded, at_once)),
        codes.view(torch.uint16), block_scales.view(torch.uint8), row_index, out, None, None, None,
        rows, blocks, padded, padded_shape(rows, blocks, layout)[1],
        OPERAND=operand, LAYOUT=int(layout), BLOCKS=at_once, FRAGMENTS=False, SLOTS=0,
        ARCH=arch(codes.device), num_warps=4, **launch_options(codes.device),
    )  # fmt: skip
    return out


def decode_to_fragments(
    codes: torch.Tensor,
    block_scales: torch.Tensor,
    token_scale: torch.Tensor | None,
    layout: SfLayout = SfLayout.layout_linear,
    *,
    row_index: torch.Tensor | None = None,
    place: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Code times block scale in the order of `jit/fragments.py`, at the rows where they are wanted.

    Args:
        codes: [R, K/2] uint8, contiguous.
        block_scales: of `layout`, a byte each.
        token_scale: [R] fp32, or None.
        row_index: as for `decode`.
        place: int32, S for each row, where its values and its scale go; -1: nowhere. None: to its own
            row.

    Returns:
        ([R * S, K rounded up to 128] bf16, zeros beyond K; [R * S] fp32 or None). Rows that no place
        names are not written.
    """
    rows, half = codes.shape
    wanted = rows if place is None else place.numel()
    blocks, columns = half * 2 // BLOCK_SIZE, padded_to_fragments(half * 2)
    out = torch.empty((wanted, columns), dtype=torch.bfloat16, device=codes.device)
    token = None if token_scale is None else token_scale.new_empty(wanted)
    at_once = min(64, next_power_of_2(max(blocks, 8)))
    tile = 128 if layout == SfLayout.layout_128x4 else 8
    launch(decode_kernel, (cdiv(rows, tile) * (tile // 8), cdiv(blocks, at_once)),
        codes.view(torch.uint16), block_scales.view(torch.uint8), row_index, out, place, token_scale,
        token, rows, blocks, blocks, padded_shape(rows, blocks, layout)[1],
        OPERAND=False, LAYOUT=int(layout), BLOCKS=at_once, FRAGMENTS=True,
        SLOTS=0 if place is None else place.numel() // rows,
        ARCH=arch(codes.device), num_warps=4, **launch_options(codes.device),
    )  # fmt: skip
    return out, token
