"""Sums of exact products: the matrix product of the reference, and a fused multiply-add.

A product of two NVFP4 values (code times block scale) has at most 12 significant bits and is exact. The
sum of K of them in fp64 errs by less than K * 2^-53 of the sum of magnitudes before its one rounding to
fp32.
"""

# SPDX-License-Identifier: Apache-2.0
from typing import Literal

import torch

from .fp32 import flush, flush_result

Accumulate = Literal["fp64", "fp32"]


def matmul(x: torch.Tensor, w: torch.Tensor, accumulate: Accumulate) -> torch.Tensor:
    """Multiply x [N, K] by w [M, K] transposed: fp32 [N, M], every product exact."""
    if accumulate == "fp64":
        return (x.double() @ w.double().T).float()
    total = x.new_zeros(x.shape[0], w.shape[0])
    for k in range(x.shape[1]):
        total = total + x[:, k, None] * w[None, :, k]
    return total


def fma(a: torch.Tensor, b: torch.Tensor, c: torch.Tensor, *, ftz: bool = False) -> torch.Tensor:
    """Return a * b + c with one rounding to fp32: bf16 b leaves the product exact in fp64.

    With `ftz` subnormal c and results are zeros; subnormal a and b are the caller's to flush.

    The fp64 sum may round before the fp32 rounding does; it is made odd where it was not exact, so
    that the second rounding is the only one that shows.
    """
    product, addend = a.double() * b.double(), (flush(c) if ftz else c).double()
    total = product + addend
    virtual = total - product
    error = (product - (total - virtual)) + (addend - virtual)
    bits = total.view(torch.int64)
    # Round to odd: step towards the error where the last bit is even and something was lost.
    away = (error > 0) == (total > 0)
    odd = torch.where(away, bits + 1, bits - 1)
    inexact = (error != 0) & (bits & 1 == 0) & total.isfinite()
    total = torch.where(inexact, odd, bits).view(torch.float64)
    return flush_result(total.float(), total) if ftz else total.float()
