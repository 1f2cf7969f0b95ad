"""The steps of the fake kernels that a fault can change; by default they are right."""

# SPDX-License-Identifier: Apache-2.0
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from nvfp4_moe.reference import quantize
from nvfp4_moe.reference.moe import fp8
from nvfp4_moe.reference.moe.routing import Routing, route
from nvfp4_moe.reference.quantize import Quantized
from nvfp4_moe.reference.recipe import Recipe, SfLayout

Tensor = torch.Tensor
Given = dict[str, Any]


@dataclass(frozen=True)
class Matrix:
    """The input of a quantizer."""

    x: Tensor  # [M, K]
    scale: float | Tensor
    recipe: Recipe
    layout: SfLayout
    per_token: bool
    row_index: Tensor | None = None
    out_scale: Tensor | None = None


def quantized(m: Matrix) -> Quantized:
    if not m.per_token:
        return quantize.quantize_global_scale(m.x, m.scale, m.recipe, m.layout)
    return quantize.quantize_per_token(
        m.x, m.scale, m.recipe, m.layout, row_index=m.row_index, out_scale=m.out_scale
    )


def routed(logits: Tensor, routing: Routing, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """(ids, bf16 weights)."""
    result = route(logits, routing, bias)
    return result.ids, result.weights_bf16


@dataclass(frozen=True)
class Behaviour:
    quantize: Callable[[Matrix], Quantized] = quantized
    route: Callable[[Tensor, Routing, Tensor | None], tuple[Tensor, Tensor]] = routed
    mxfp8: Callable[[Tensor], fp8.Scaled] = fp8.quantize_mxfp8
    layer: Callable[[Given, str], Given] = lambda given, tactic: given
    """Changes the arguments of `reference.moe.fused_moe`; knows the name of the tactic."""
    baseline: Callable[[Given, str], Given] = lambda given, tactic: given
    """Changes the arguments of `reference.moe.baseline_moe.baseline_moe`; knows the tactic's name."""
    output: Callable[[Tensor, int], Tensor] = lambda output, calls: output
    """Changes the finalized output; knows how many calls came before."""
