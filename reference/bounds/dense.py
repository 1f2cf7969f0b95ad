"""Intervals that hold the dense products of every implementation that keeps its contract.

`moe.py` has the argument: points 1 (the sums), 2 (alpha, one factor) and 4 (one rounding).
"""

# SPDX-License-Identifier: Apache-2.0
import torch

from ..dense import operands, values
from ..numerics.subnormals import kept
from ..recipe import SfLayout
from .accumulation import ANY_ORDER, Accumulation, sum_of_products
from .interval import Interval, rounded
from .product import Product


@kept
def mm_fp4_bounds(
    a: torch.Tensor,
    b: torch.Tensor,
    a_descale: torch.Tensor,
    b_descale: torch.Tensor,
    alpha: torch.Tensor | None = None,
    out_dtype: torch.dtype = torch.bfloat16,
    *,
    use_8x4_sf_layout: bool = False,
    accumulation: Accumulation = ANY_ORDER,
) -> Interval:
    """Bound [M, N] the result of `reference.dense.mm_fp4`, whose arguments these are."""
    x, w = operands(a, b, a_descale, b_descale, use_8x4_sf_layout)
    return _bounds(x, w, alpha, out_dtype, accumulation)


@kept
def mm_bf16_fp4_bounds(
    a: torch.Tensor,
    b: torch.Tensor,
    b_descale: torch.Tensor,
    alpha: torch.Tensor | None = None,
    out_dtype: torch.dtype = torch.bfloat16,
    *,
    accumulation: Accumulation = ANY_ORDER,
) -> Interval:
    """Bound [M, N] the result of `reference.dense.mm_bf16_fp4`, whose arguments these are."""
    w = values(b.T, b_descale.T, SfLayout.layout_128x4)
    return _bounds(a.float(), w, alpha, out_dtype, accumulation)


def _bounds(
    x: torch.Tensor,
    w: torch.Tensor,
    alpha: torch.Tensor | None,
    out_dtype: torch.dtype,
    accumulation: Accumulation,
) -> Interval:
    """Bound the product of x [M, K] and w [N, K], fp32, with alpha."""
    total = sum_of_products(Interval.point(x), w, accumulation)
    if alpha is not None:
        total = Product.of(total).times(alpha.reshape(-1, 1)).result()
    return rounded(out_dtype, total)
