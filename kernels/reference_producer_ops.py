"""The reference's producers and quantizer as `torch.library` ops."""

# SPDX-License-Identifier: Apache-2.0
import torch

from ..reference import fused_quantize as producers
from ..reference.quantize import quantize_per_token
from ..reference.recipe import Recipe, SfLayout
from .ops import Triple
from .producer_ops import Producers, register


def _quantized(
    values: torch.Tensor, scale: float | torch.Tensor, recipe: Recipe, layout: SfLayout
) -> Triple:
    q = quantize_per_token(values, scale, recipe, layout)
    assert q.per_token_scale is not None
    return q.codes, q.block_scales, q.per_token_scale


def _silu_and_mul(
    x: torch.Tensor, base_scale_inv: float | torch.Tensor, recipe: Recipe, layout: SfLayout
) -> Triple:
    return _quantized(producers.silu_and_mul(x), base_scale_inv, recipe, layout)


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
        values = producers.rmsnorm(x, weight, eps)
    else:
        values, total = producers.add_rmsnorm(x, residual, weight, eps)
        residual.copy_(total)
    return _quantized(values, base_scale_inv, recipe, layout)


silu_and_mul_quantize, rmsnorm_quantize = register("reference", Producers(_silu_and_mul, _rmsnorm))
