"""The `torch.library` op for an implementation of the dense product.

Its arguments are the fields of `KernelCall`, then the output, which the op fills, since the caller may
bring it.
"""

# SPDX-License-Identifier: Apache-2.0
from collections.abc import Callable

import torch

from ...reference import dense
from .. import op_schema
from ..op_schema import Flat
from .call import KernelCall

FLAT = Flat(KernelCall)
Implementation = Callable[[KernelCall, torch.Tensor], None]
"""It fills the output [M, N] with alpha times the product."""


def register(name: str, implementation: Implementation) -> Implementation:
    """Return the op `nvfp4_moe::{name}_mm_fp4` of an implementation, as a function."""

    def filled(call: KernelCall, out: torch.Tensor) -> None:
        if out.numel():
            implementation(call, out)

    return op_schema.register(
        f"{name}_mm_fp4",
        FLAT,
        filled,
        lambda call, out: None,
        "()",
        tensors="Tensor(a!) out",
        mutates=("out",),
    )


def _in_reference(call: KernelCall, out: torch.Tensor) -> None:
    b = call.b_rows.T, call.b_scales.T
    if call.a_scales is None:
        product = dense.mm_bf16_fp4(call.a, *b, call.alpha, out.dtype)
    else:
        product = dense.mm_fp4(
            call.a, b[0], call.a_scales, b[1], call.alpha, out.dtype, use_8x4_sf_layout=call.use_8x4
        )
    out.copy_(product)


REFERENCE = register("reference", _in_reference)
