"""Intervals that hold the dense product of every implementation that keeps its contract.

`bounds.py` has the argument: points 1 (the sums), 2 (alpha, one factor) and 4 (one rounding).
"""

# SPDX-License-Identifier: Apache-2.0
import torch

from .dense import operands
from .interval import ANY_ORDER, Accumulation, Interval, rounded, sum_of_products, times, unless

_LARGEST = torch.finfo(torch.float32).max
_SMALLEST_ALPHA = 2.0**-106  # a product is a multiple of 2^-20, so that above nothing is subnormal


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
    """[M, N]: what a call of `reference.dense.mm_fp4`, whose arguments these are, may return.

    Infinite where alpha carries a sum out of fp32's normal range, and where a value is NaN.
    """
    x, w = operands(a, b, a_descale, b_descale, use_8x4_sf_layout)
    unknown = x.isnan().any(1)[:, None] | w.isnan().any(1)[None, :]
    total = sum_of_products(Interval.point(x.nan_to_num()), w.nan_to_num(), accumulation)
    if alpha is not None:
        factor = alpha.reshape(-1, 1)
        unknown = unknown | ~factor.isfinite() | (factor.abs() < _SMALLEST_ALPHA) & (factor != 0)
        total = times(total, factor.nan_to_num(posinf=0.0, neginf=0.0))
    return unless(unknown | (total.magnitude > _LARGEST), rounded(out_dtype, total))
