"""The dense product of NVFP4 matrices, with FlashInfer's orientation and scalars.

    out[m, n] = alpha[m] * sum over k of (a code * a block scale) * (b code * b block scale)

Every product is exact in fp32 (two times 6 significant bits). The sum is taken in fp64 and rounded to
fp32: the contract leaves its order and width open, as it does of the mixture of experts. One fp32
product with alpha follows, then one rounding to the output's dtype (flashinfer-python 0.7.2.post1,
`gemm/gemm_base.py:9538`).

`mm_bf16_fp4` is the product of bf16 rows with NVFP4 weights (W4A16; `gemm/gemm_bf16_fp4.py:372`). A
weight's code times its block scale is exact in bf16, and each product with a bf16 number exact in fp32.
"""

# SPDX-License-Identifier: Apache-2.0
import torch

from .layouts import to_linear
from .numerics.accumulate import Accumulate, matmul
from .numerics.subnormals import kept
from .quantize import dequantize
from .recipe import BLOCK_SIZE, SfLayout


def a_layout(use_8x4_sf_layout: bool) -> SfLayout:
    """Return the layout of the block scales of `a`; those of `b` are always 128x4."""
    return SfLayout.layout_8x4 if use_8x4_sf_layout else SfLayout.layout_128x4


def values(codes: torch.Tensor, block_scales: torch.Tensor, layout: SfLayout) -> torch.Tensor:
    """Decode codes [R, K/2] uint8 to fp32 [R, K]: code times block scale, exact."""
    rows, half = codes.shape
    linear = to_linear(block_scales.contiguous(), rows, half * 2 // BLOCK_SIZE, layout)
    return dequantize(codes, linear.view(torch.uint8), 1.0)


@kept
def operands(
    a: torch.Tensor,
    b: torch.Tensor,
    a_descale: torch.Tensor,
    b_descale: torch.Tensor,
    use_8x4_sf_layout: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Decode the arguments of `mm_fp4` to a [M, K] and b [N, K], fp32."""
    left = values(a, a_descale, a_layout(use_8x4_sf_layout))
    return left, values(b.T, b_descale.T, SfLayout.layout_128x4)


@kept
def mm_fp4(
    a: torch.Tensor,
    b: torch.Tensor,
    a_descale: torch.Tensor,
    b_descale: torch.Tensor,
    alpha: torch.Tensor | None = None,
    out_dtype: torch.dtype = torch.bfloat16,
    *,
    use_8x4_sf_layout: bool = False,
    accumulate: Accumulate = "fp64",
) -> torch.Tensor:
    """Multiply a [M, K/2] by b [K/2, N]: [M, N].

    Contract: bitwise what every implementation gives where the sums are exact in fp32, whatever their
    order; elsewhere inside `bounds.dense.mm_fp4_bounds`. A NaN block scale makes its row or column NaN.
    A block scale has no sign: hardware ignores the bit.

    Args:
        a: uint8, two codes a byte.
        b: uint8, column-major: the transpose of codes [N, K/2].
        a_descale: uint8 e4m3 in 128x4, or 8x4 with `use_8x4_sf_layout`.
        b_descale: uint8 e4m3, the transpose of scales in 128x4.
        alpha: fp32, one element or one a row of a; None counts as 1.
        out_dtype: bfloat16 or float16; what that cannot hold is infinite.
        accumulate: as in `numerics.accumulate.matmul`.
    """
    x, w = operands(a, b, a_descale, b_descale, use_8x4_sf_layout)
    total = matmul(x, w, accumulate)
    if alpha is not None:
        total = total * alpha.reshape(-1, 1)
    return total.to(out_dtype)


@kept
def mm_bf16_fp4(
    a: torch.Tensor,
    b: torch.Tensor,
    b_descale: torch.Tensor,
    alpha: torch.Tensor | None = None,
    out_dtype: torch.dtype = torch.bfloat16,
    *,
    accumulate: Accumulate = "fp64",
) -> torch.Tensor:
    """Multiply a [M, K] by b [K/2, N]: [M, N].

    The contract is that of `mm_fp4`: the order of the sums is open.

    Args:
        a: bf16.
        b, b_descale, alpha, out_dtype, accumulate: as for `mm_fp4`.
    """
    total = matmul(a.float(), values(b.T, b_descale.T, SfLayout.layout_128x4), accumulate)
    if alpha is not None:
        total = total * alpha.reshape(-1, 1)
    return total.to(out_dtype)
