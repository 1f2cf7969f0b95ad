"""The reference's dense product as a `torch.library` op."""

# SPDX-License-Identifier: Apache-2.0
import torch

from ..reference import dense
from .dense_ops import register


def _mm_fp4(
    a: torch.Tensor,
    b_rows: torch.Tensor,
    a_scales: torch.Tensor,
    b_scales: torch.Tensor,
    alpha: torch.Tensor | None,
    out: torch.Tensor,
    use_8x4: bool,
) -> None:
    product = dense.mm_fp4(
        a, b_rows.T, a_scales, b_scales.T, alpha, out.dtype, use_8x4_sf_layout=use_8x4
    )
    out.copy_(product)


mm_fp4 = register("reference", _mm_fp4)
