"""`torch.library` ops of fixed arity for a pair of quantizers, and the plain functions over them.

The Triton kernels are ops so that a compiler can call them. The reference is an op so that a compiler
cannot fuse or reorder its arithmetic. A recipe crosses as its integer code, a scale as a tensor or as a
number.
"""

# SPDX-License-Identifier: Apache-2.0
from typing import Any, NamedTuple, Protocol

import torch

from ...reference import quantize as reference
from ...reference.recipe import Recipe, SfLayout
from ..allocate import allocate
from ..op_schema import two_arguments

_LINEAR = SfLayout.layout_linear
Pair = tuple[torch.Tensor, torch.Tensor]
Triple = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


class PerToken(Protocol):
    """Returns (codes, block scales, per-token scales); arguments as `reference.quantize` has them."""

    def __call__(
        self,
        x: torch.Tensor,
        base_scale_inv: float | torch.Tensor,
        recipe: Recipe,
        layout: SfLayout = _LINEAR,
        *,
        row_index: torch.Tensor | None = None,
        out_scale: torch.Tensor | None = None,
    ) -> Triple: ...


class GlobalScale(Protocol):
    """Returns (codes, block scales); arguments as `reference.quantize` has them."""

    def __call__(
        self,
        x: torch.Tensor,
        global_scale: float | torch.Tensor | None,
        recipe: Recipe,
        layout: SfLayout = _LINEAR,
        *,
        inverse: bool = False,
    ) -> Pair: ...


class Quantizers(NamedTuple):
    """The two functions of an implementation."""

    quantize_per_token: PerToken
    quantize_global_scale: GlobalScale


def register(name: str, implementation: Quantizers) -> Quantizers:
    """Register the ops `nvfp4_moe::{name}_per_token` and `_global_scale`; return them as functions."""

    @torch.library.custom_op(f"nvfp4_moe::{name}_per_token", mutates_args=())
    def per_token_op(
        x: torch.Tensor,
        scale: torch.Tensor | None,
        scale_value: float,
        recipe_code: int,
        layout: int,
        row_index: torch.Tensor | None,
        out_scale: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        return implementation.quantize_per_token(
            x,
            scale_value if scale is None else scale,
            Recipe.from_code(recipe_code),
            SfLayout(layout),
            row_index=row_index,
            out_scale=out_scale,
        )

    @torch.library.custom_op(f"nvfp4_moe::{name}_global_scale", mutates_args=())
    def global_scale_op(
        x: torch.Tensor,
        scale: torch.Tensor | None,
        scale_value: float,
        recipe_code: int,
        layout: int,
        inverse: bool,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return implementation.quantize_global_scale(
            x,
            scale_value if scale is None else scale,
            Recipe.from_code(recipe_code),
            SfLayout(layout),
            inverse=inverse,
        )

    @per_token_op.register_fake
    def _(x, scale, scale_value, recipe_code, layout, row_index, out_scale):  # type: ignore[no-untyped-def]
        return allocate(x, layout)

    @global_scale_op.register_fake
    def _(x, scale, scale_value, recipe_code, layout, inverse):  # type: ignore[no-untyped-def]
        return allocate(x, layout)[:2]

    def per_token(
        x: torch.Tensor,
        base_scale_inv: float | torch.Tensor,
        recipe: Recipe,
        layout: SfLayout = _LINEAR,
        *,
        row_index: torch.Tensor | None = None,
        out_scale: torch.Tensor | None = None,
    ) -> Triple:
        scale, value = two_arguments(base_scale_inv)
        return per_token_op(x, scale, value, recipe.code, int(layout), row_index, out_scale)

    def global_scale(
        x: torch.Tensor,
        global_scale: float | torch.Tensor | None,
        recipe: Recipe,
        layout: SfLayout = _LINEAR,
        *,
        inverse: bool = False,
    ) -> Pair:
        scale, value = two_arguments(global_scale)
        return global_scale_op(x, scale, value, recipe.code, int(layout), inverse)

    return Quantizers(per_token, global_scale)


def _reference_per_token(x: torch.Tensor, *arguments: Any, **options: Any) -> Triple:
    result = reference.quantize_per_token(x, *arguments, **options)
    assert result.per_token_scale is not None
    return result.codes, result.block_scales, result.per_token_scale


def _reference_global_scale(x: torch.Tensor, *arguments: Any, **options: Any) -> Pair:
    result = reference.quantize_global_scale(x, *arguments, **options)
    return result.codes, result.block_scales


REFERENCE = register("reference", Quantizers(_reference_per_token, _reference_global_scale))
