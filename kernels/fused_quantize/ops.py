"""`torch.library` ops of fixed arity for SiLU and multiply, and for RMSNorm, with the quantizer.

The norm fills its residual, where there is one.
"""

# SPDX-License-Identifier: Apache-2.0
from typing import NamedTuple, Protocol

import torch

from ...reference import fused_quantize as reference
from ...reference.quantize import quantize_per_token
from ...reference.recipe import Recipe, SfLayout
from ..allocate import allocate
from ..op_schema import two_arguments
from ..quantize.ops import Triple


class SiluAndMul(Protocol):
    """(codes, block scales, per-token scales) of x [M, 2K], contiguous."""

    def __call__(
        self,
        x: torch.Tensor,
        base_scale_inv: float | torch.Tensor,
        recipe: Recipe,
        layout: SfLayout,
    ) -> Triple: ...


class RmsNorm(Protocol):
    """Normalizes and quantizes x [M, K], or x + residual, which it leaves in `residual`."""

    def __call__(
        self,
        x: torch.Tensor,
        residual: torch.Tensor | None,
        weight: torch.Tensor,
        eps: float,
        base_scale_inv: float | torch.Tensor,
        recipe: Recipe,
        layout: SfLayout,
    ) -> Triple: ...


class Producers(NamedTuple):
    """The two functions of an implementation."""

    silu_and_mul_quantize: SiluAndMul
    rmsnorm_quantize: RmsNorm


def register(name: str, implementation: Producers) -> Producers:
    """Ops `nvfp4_moe::{name}_silu_and_mul_quantize` and `_rmsnorm_quantize`, as functions."""

    @torch.library.custom_op(f"nvfp4_moe::{name}_silu_and_mul_quantize", mutates_args=())
    def silu_and_mul_op(
        x: torch.Tensor,
        scale: torch.Tensor | None,
        scale_value: float,
        recipe_code: int,
        layout: int,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        return implementation.silu_and_mul_quantize(
            x,
            scale_value if scale is None else scale,
            Recipe.from_code(recipe_code),
            SfLayout(layout),
        )

    @torch.library.custom_op(f"nvfp4_moe::{name}_rmsnorm_quantize", mutates_args=("residual",))
    def rmsnorm_op(
        x: torch.Tensor,
        residual: torch.Tensor | None,
        weight: torch.Tensor,
        eps: float,
        scale: torch.Tensor | None,
        scale_value: float,
        recipe_code: int,
        layout: int,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        return implementation.rmsnorm_quantize(
            x,
            residual,
            weight,
            eps,
            scale_value if scale is None else scale,
            Recipe.from_code(recipe_code),
            SfLayout(layout),
        )

    @silu_and_mul_op.register_fake
    def _(x, scale, scale_value, recipe_code, layout):  # type: ignore[no-untyped-def]
        return allocate(x[:, : x.shape[1] // 2], layout)

    @rmsnorm_op.register_fake
    def _(x, residual, weight, eps, scale, scale_value, recipe_code, layout):  # type: ignore[no-untyped-def]
        return allocate(x, layout)

    def silu_and_mul(
        x: torch.Tensor, base_scale_inv: float | torch.Tensor, recipe: Recipe, layout: SfLayout
    ) -> Triple:
        return silu_and_mul_op(x, *two_arguments(base_scale_inv), recipe.code, int(layout))

    def rmsnorm(
        x: torch.Tensor,
        residual: torch.Tensor | None,
        weight: torch.Tensor,
        eps: float,
        base_scale_inv: float | torch.Tensor,
        recipe: Recipe,
        layout: SfLayout,
    ) -> Triple:
        scale = two_arguments(base_scale_inv)
        return rmsnorm_op(x, residual, weight, eps, *scale, recipe.code, int(layout))

    return Producers(silu_and_mul, rmsnorm)


def _quantized(
    values: torch.Tensor, scale: float | torch.Tensor, recipe: Recipe, layout: SfLayout
) -> Triple:
    q = quantize_per_token(values, scale, recipe, layout)
    assert q.per_token_scale is not None
    return q.codes, q.block_scales, q.per_token_scale


def _silu_and_mul(
    x: torch.Tensor, base_scale_inv: float | torch.Tensor, recipe: Recipe, layout: SfLayout
) -> Triple:
    return _quantized(reference.silu_and_mul(x, recipe.build), base_scale_inv, recipe, layout)


def _rmsnorm(
    x: torch.Tensor,
    residual: torch.Tensor | None,
    weight: torch.Tensor,
    eps: float,
    base_scale_inv: float | torch.Tensor,
    recipe: Recipe,
    layout: SfLayout,
) -> Triple:
    if residual is None:
        values = reference.rmsnorm(x, weight, eps)
    else:
        values, total = reference.add_rmsnorm(x, residual, weight, eps)
        residual.copy_(total)
    return _quantized(values, base_scale_inv, recipe, layout)


REFERENCE = register("reference", Producers(_silu_and_mul, _rmsnorm))
