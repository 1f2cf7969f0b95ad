"""The `torch.library` op for an implementation of SiLU and multiply, and RMSNorm, with the quantizer.

Its arguments are the fields of `KernelCall`, then the residual, which the op fills where there is one.
"""

# SPDX-License-Identifier: Apache-2.0
from collections.abc import Callable

import torch

from ...reference import fused_quantize as reference
from ...reference.quantize import quantize_per_token
from .. import op_schema
from ..allocate import allocate
from ..op_schema import Flat
from ..quantize.ops import Triple
from .call import KernelCall

FLAT = Flat(KernelCall)
Implementation = Callable[[KernelCall, torch.Tensor | None], Triple]
"""It returns (codes, block scales, per-token scales)."""


def register(name: str, implementation: Implementation) -> Implementation:
    """Return the op `nvfp4_moe::{name}_fused_quantize` of an implementation, as a function."""
    return op_schema.register(
        f"{name}_fused_quantize",
        FLAT,
        implementation,
        lambda call, residual: allocate(call.values(), call.layout),
        "(Tensor, Tensor, Tensor)",
        tensors="Tensor(a!)? residual",
        mutates=("residual",),
    )


def _in_reference(call: KernelCall, residual: torch.Tensor | None) -> Triple:
    if call.weight is None:
        values = reference.silu_and_mul(call.x, call.recipe.build)
    elif residual is None:
        values = reference.rmsnorm(call.x, call.weight, call.eps)
    else:
        values, total = reference.add_rmsnorm(call.x, residual, call.weight, call.eps)
        residual.copy_(total)
    q = quantize_per_token(values, call.scale, call.recipe, call.layout)
    assert q.per_token_scale is not None
    return q.codes, q.block_scales, q.per_token_scale


REFERENCE = register("reference", _in_reference)
