"""The reference as `torch.library` ops: a compiler must not fuse or reorder its arithmetic."""

# SPDX-License-Identifier: Apache-2.0
import torch

from ..reference import quantize as reference
from ..reference.recipe import Recipe, SfLayout
from .outputs import allocate, two_arguments


def quantize_per_token(
    x: torch.Tensor,
    base_scale_inv: float | torch.Tensor,
    recipe: Recipe,
    layout: SfLayout = SfLayout.layout_linear,
    *,
    row_index: torch.Tensor | None = None,
    out_scale: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(codes, block scales, per-token scales): `reference.quantize.quantize_per_token`."""
    tensor, value = two_arguments(base_scale_inv)
    return torch.ops.nvfp4_moe.reference_per_token(
        x, tensor, value, recipe.code, int(layout), row_index, out_scale
    )


def quantize_global_scale(
    x: torch.Tensor,
    global_scale: float | torch.Tensor | None,
    recipe: Recipe,
    layout: SfLayout = SfLayout.layout_linear,
    *,
    inverse: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(codes, block scales): `reference.quantize.quantize_global_scale`."""
    tensor, value = two_arguments(global_scale)
    return torch.ops.nvfp4_moe.reference_global_scale(
        x, tensor, value, recipe.code, int(layout), inverse
    )


@torch.library.custom_op("nvfp4_moe::reference_per_token", mutates_args=())
def _per_token_op(
    x: torch.Tensor,
    scale: torch.Tensor | None,
    scale_value: float,
    recipe_code: int,
    layout: int,
    row_index: torch.Tensor | None,
    out_scale: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    result = reference.quantize_per_token(
        x,
        scale_value if scale is None else scale,
        Recipe.from_code(recipe_code),
        SfLayout(layout),
        row_index=row_index,
        out_scale=out_scale,
    )
    assert result.per_token_scale is not None
    return result.codes, result.block_scales, result.per_token_scale


@_per_token_op.register_fake
def _(x, scale, scale_value, recipe_code, layout, row_index, out_scale):
    return allocate(x, layout)


@torch.library.custom_op("nvfp4_moe::reference_global_scale", mutates_args=())
def _global_scale_op(
    x: torch.Tensor,
    scale: torch.Tensor | None,
    scale_value: float,
    recipe_code: int,
    layout: int,
    inverse: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    result = reference.quantize_global_scale(
        x,
        scale_value if scale is None else scale,
        Recipe.from_code(recipe_code),
        SfLayout(layout),
        inverse=inverse,
    )
    return result.codes, result.block_scales


@_global_scale_op.register_fake
def _(x, scale, scale_value, recipe_code, layout, inverse):
    return allocate(x, layout)[:2]
