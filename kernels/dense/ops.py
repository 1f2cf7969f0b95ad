"""The `torch.library` op of fixed arity for an implementation of the dense product.

The output is an argument that the op fills, since the caller may bring it.
"""

# SPDX-License-Identifier: Apache-2.0
from typing import Protocol

import torch

from ...reference import dense


class MmFp4(Protocol):
    """Fill `out` [M, N] with alpha times the product; all tensors are contiguous but `a`.

    Codes a [M, K/2] and b_rows [N, K/2], and their block scales, are uint8; b's scales are 128x4, a's
    too unless `use_8x4`. alpha is fp32 [1] or [M].
    """

    def __call__(
        self,
        a: torch.Tensor,
        b_rows: torch.Tensor,
        a_scales: torch.Tensor,
        b_scales: torch.Tensor,
        alpha: torch.Tensor | None,
        out: torch.Tensor,
        use_8x4: bool,
    ) -> None: ...


def register(name: str, implementation: MmFp4) -> MmFp4:
    """The op `nvfp4_moe::{name}_mm_fp4` of an implementation."""

    @torch.library.custom_op(f"nvfp4_moe::{name}_mm_fp4", mutates_args=("out",))
    def op(
        a: torch.Tensor,
        b_rows: torch.Tensor,
        a_scales: torch.Tensor,
        b_scales: torch.Tensor,
        alpha: torch.Tensor | None,
        out: torch.Tensor,
        use_8x4: bool,
    ) -> None:
        if out.numel():
            implementation(a, b_rows, a_scales, b_scales, alpha, out, use_8x4)

    @op.register_fake
    def _(a, b_rows, a_scales, b_scales, alpha, out, use_8x4):  # type: ignore[no-untyped-def]
        return None

    return op


def _in_reference(
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


REFERENCE = register("reference", _in_reference)
