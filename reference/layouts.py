"""The three layouts of block scales, and the row orders of shuffled weights.

For R rows of C = K/16 scales each:

    linear   row-major [R, C]
    128x4    rows padded to 128, columns to 4;
             offset(r, c) = ((r/128 * C4/4) + c/4) * 512 + (r%32) * 16 + (r%128/32) * 4 + c%4
    8x4      rows padded to 8, columns to 4;
             offset(r, c) = ((r/8 * C4/4) + c/4) * 32 + (r%8) * 4 + c%4

with C4 the padded columns and all divisions rounding down (FlashInfer 0.7.2,
`quantization_utils.cuh:995` and `:1026`). Padding is zero. The swizzled layouts are returned as
[padded rows, padded columns], the shape FlashInfer gives the buffer; it is not an index.

TensorRT-LLM's row orders of weights are here too. Each such function returns int64 indices `i` such that
`w[i]` is the reordered matrix; block scales, biases and per-row scales take the same order. Source:
flashinfer-python 0.7.2, `utils.py:1053-1120` (shuffle) and `fused_moe/core.py:548` (gated interleave).
"""

# SPDX-License-Identifier: Apache-2.0
import math

import torch

from .recipe import SfLayout

_ROW_TILE = {SfLayout.layout_128x4: 128, SfLayout.layout_8x4: 8, SfLayout.layout_linear: 1}
_COLUMN_TILE = {SfLayout.layout_128x4: 4, SfLayout.layout_8x4: 4, SfLayout.layout_linear: 1}


def padded_shape(rows: int, columns: int, layout: SfLayout) -> tuple[int, int]:
    """Rows and columns of the buffer that holds [rows, columns] scales."""
    row_tile, column_tile = _ROW_TILE[layout], _COLUMN_TILE[layout]
    return -(-rows // row_tile) * row_tile, -(-columns // column_tile) * column_tile


def from_linear(scales: torch.Tensor, layout: SfLayout) -> torch.Tensor:
    """Put scales [..., R, C] of any dtype into the layout: [..., padded R, padded C], padding 0."""
    *batch, rows, columns = scales.shape
    padded_rows, padded_columns = padded_shape(rows, columns, layout)
    padded = scales.new_zeros((*batch, padded_rows, padded_columns))
    padded[..., :rows, :columns] = scales
    if layout == SfLayout.layout_128x4:
        tiles = padded.reshape(math.prod(batch), padded_rows // 128, 4, 32, padded_columns // 4, 4)
        padded = tiles.permute(0, 1, 4, 3, 2, 5).reshape(padded.shape)
    elif layout == SfLayout.layout_8x4:
        tiles = padded.reshape(math.prod(batch), padded_rows // 8, 8, padded_columns // 4, 4)
        padded = tiles.permute(0, 1, 3, 2, 4).reshape(padded.shape)
    return padded


def to_linear(scales: torch.Tensor, rows: int, columns: int, layout: SfLayout) -> torch.Tensor:
    """The layout's [..., padded R, padded C] (or flat) to [..., rows, columns], padding dropped.

    Raises:
        ValueError: the buffer is not a whole number of padded matrices.
    """
    padded_rows, padded_columns = padded_shape(rows, columns, layout)
    size = padded_rows * padded_columns
    tail = scales.shape[-2:].numel() if scales.dim() > 1 else scales.numel()
    if tail != size:
        raise ValueError(
            f"scales of shape {tuple(scales.shape)} do not hold [{rows}, {columns}] in "
            f"{layout.name}, which takes {padded_rows} x {padded_columns}"
        )
    batch = scales.shape[:-2]
    count = math.prod(batch)
    flat = scales.reshape(count, size)
    if layout == SfLayout.layout_128x4:
        tiles = flat.reshape(count, padded_rows // 128, padded_columns // 4, 32, 4, 4)
        flat = tiles.permute(0, 1, 4, 3, 2, 5)
    elif layout == SfLayout.layout_8x4:
        tiles = flat.reshape(count, padded_rows // 8, padded_columns // 4, 8, 4)
        flat = tiles.permute(0, 1, 3, 2, 4)
    matrix = flat.reshape(*batch, padded_rows, padded_columns)
    return matrix[..., :rows, :columns].contiguous()


def convert(
    scales: torch.Tensor, rows: int, columns: int, source: SfLayout, target: SfLayout
) -> torch.Tensor:
    """Scales of [rows, columns] from one layout to another, padding zero in the result."""
    return from_linear(to_linear(scales, rows, columns, source), target)


def shuffle_rows(
    rows: int, epilogue_tile_m: int = 128, device: torch.device | str = "cpu"
) -> torch.Tensor:
    """Order in which the GEMM's epilogue wants the rows of its A operand.

    Within each group of 32 rows (16 if `epilogue_tile_m` is no multiple of 128), row 4a + b (2a + b)
    goes to place 8b + a.

    Raises:
        ValueError: `rows` is no multiple of the group.
    """
    group = 32 if epilogue_tile_m % 128 == 0 else 16
    if rows % group:
        raise ValueError(f"rows is {rows}; the row shuffle needs a multiple of {group}")
    order = (
        torch.arange(group, dtype=torch.int64, device=device).reshape(8, group // 8).T.reshape(-1)
    )
    return (
        torch.arange(0, rows, group, dtype=torch.int64, device=device)[:, None] + order
    ).reshape(-1)


def interleave_gated_rows(rows: int, device: torch.device | str = "cpu") -> torch.Tensor:
    """[first half; second half] to row 0 of each half, row 1 of each half, ...

    Raises:
        ValueError: `rows` is odd.
    """
    if rows % 2:
        raise ValueError(f"rows is {rows}; a gated matrix has an even number")
    return torch.arange(rows, dtype=torch.int64, device=device).reshape(2, rows // 2).T.reshape(-1)


def inverse(indices: torch.Tensor) -> torch.Tensor:
    """The indices that undo `indices`: `w[indices][inverse(indices)]` is `w`."""
    undo = torch.empty_like(indices)
    undo[indices] = torch.arange(indices.numel(), dtype=torch.int64, device=indices.device)
    return undo
