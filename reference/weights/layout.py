"""The order of weight rows in FlashInfer's TRT-LLM kernels, and its inverse.

The first GEMM's rows are [up; gate], interleaved row by row and shuffled; block scales are shuffled
alike and lie in 128x4. Source: flashinfer-python 0.7.2, `fused_moe/prepare.py:468-672` and
`fused_moe/core.py:475-560`.
"""

# SPDX-License-Identifier: Apache-2.0
import torch

from ..layouts import from_linear, interleave_gated_rows, inverse, shuffle_rows, to_linear
from ..numerics import e2m1, e4m3
from ..recipe import BLOCK_SIZE, SfLayout
from .experts import Experts
from .scalars import in_raw_units

_128X4 = SfLayout.layout_128x4


def padded_sizes(hidden_size: int, intermediate_size: int, gated: bool) -> tuple[int, int]:
    """Return H and I of the prepared tensors: whole tiles of 128 rows in both GEMMs."""
    tile = 64 if gated else 128
    return -(-hidden_size // 128) * 128, -(-intermediate_size // tile) * tile


def lay_out(
    codes: torch.Tensor, scales: torch.Tensor, gated: bool, rows: int, columns: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return codes and block scales of natural rows, as the prepared tensors hold them.

    Args:
        codes: [E, rows, K/2] uint8, of `gated` [up; gate]; scales: [E, rows, K/16], linear.
        rows: padded ones, of each half; columns: padded ones, not packed.
    """
    return (
        _pad_columns(lay_out_rows(codes, gated, rows), columns // 2),
        _swizzle(_pad_columns(lay_out_rows(_bytes(scales), gated, rows), columns // BLOCK_SIZE)),
    )


def lay_out_rows(t: torch.Tensor, gated: bool, rows: int) -> torch.Tensor:
    """Pad each half of [E, natural rows, C] to `rows`, interleave and shuffle."""
    halves = t.chunk(2, 1) if gated else (t,)
    full = torch.cat([_pad_rows(half, rows) for half in halves], 1)
    return full[:, row_order(full.shape[1], gated, t.device)].contiguous()


def lay_out_bias(bias: torch.Tensor, divisor: torch.Tensor, gated: bool, rows: int) -> torch.Tensor:
    """Prepare a physical bias [E, rows]: [E, padded rows] fp32, divided by the scalar after it."""
    return lay_out_rows(in_raw_units(bias, divisor)[..., None], gated, rows)[..., 0]


def gemm1_values(experts: Experts, expert: int) -> torch.Tensor:
    """Decode one expert's w13: [M1, H] fp32, code times block scale (exact), rows [up; gate]."""
    codes, scales = experts.gemm1_weights[expert], experts.gemm1_weights_scale[expert]
    return decoded_rows(codes, scales)[
        inverse(row_order(codes.shape[0], experts.activation.gated, codes.device))
    ]


def gemm2_values(experts: Experts, expert: int) -> torch.Tensor:
    """Decode one expert's w2: [H, I] fp32, code times block scale (exact)."""
    codes, scales = experts.gemm2_weights[expert], experts.gemm2_weights_scale[expert]
    return decoded_rows(codes, scales)[inverse(row_order(codes.shape[0], False, codes.device))]


def decoded_rows(codes: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """Decode prepared rows [R, K/2] and their scales in 128x4: [R, K] fp32, in the prepared order."""
    rows, half = codes.shape
    linear = to_linear(_bytes(scales), rows, half * 2 // BLOCK_SIZE, _128X4)
    values = e2m1.decode(e2m1.unpack(codes)).unflatten(-1, (-1, BLOCK_SIZE))
    return (values * e4m3.decode(linear)[..., None]).flatten(-2)


def unshuffled_bias(bias: torch.Tensor, gated: bool) -> torch.Tensor:
    """Return a prepared bias [..., rows] in the order [up; gate]."""
    return bias[..., inverse(row_order(bias.shape[-1], gated, bias.device))]


def reordered(
    codes: torch.Tensor, scales: torch.Tensor, order: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Reorder rows: codes and block scales in 128x4, [E, rows, ...] both."""
    rows, half = codes.shape[1:]
    linear = to_linear(_bytes(scales), rows, half * 2 // BLOCK_SIZE, _128X4)
    return codes[:, order].contiguous(), _swizzle(linear[:, order])


def row_order(rows: int, gated: bool, device: torch.device | str = "cpu") -> torch.Tensor:
    """Indices that bring natural rows into the order of the prepared tensors."""
    order = shuffle_rows(rows, device=device)
    return interleave_gated_rows(rows, device)[order] if gated else order


def _bytes(scales: torch.Tensor) -> torch.Tensor:
    return scales.view(torch.uint8)


def _pad_rows(t: torch.Tensor, rows: int) -> torch.Tensor:
    full = t.new_zeros((t.shape[0], rows, *t.shape[2:]))
    full[:, : t.shape[1]] = t
    return full


def _pad_columns(t: torch.Tensor, columns: int) -> torch.Tensor:
    full = t.new_zeros((*t.shape[:2], columns))
    full[..., : t.shape[2]] = t
    return full


def _swizzle(scales: torch.Tensor) -> torch.Tensor:
    return from_linear(scales, _128X4).view(torch.float8_e4m3fn)
