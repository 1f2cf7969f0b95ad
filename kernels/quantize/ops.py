"""The `torch.library` ops of a pair of quantizers.

The Triton kernels are ops so that a compiler can call them. The reference is an op so that a compiler
cannot fuse or reorder its arithmetic. The arguments of an op are the fields of `PerToken` or of
`GlobalScale`, which are those of the functions in `reference.quantize`.
"""

# SPDX-License-Identifier: Apache-2.0
from collections.abc import Callable
from dataclasses import dataclass
from typing import ParamSpec, TypeVar

import torch

from ...reference import quantize as reference
from ...reference.recipe import Recipe, SfLayout
from .. import op_schema
from ..allocate import allocate
from ..op_schema import Flat

P = ParamSpec("P")
Call = TypeVar("Call", "PerToken", "GlobalScale")
Result = TypeVar("Result")
Pair = tuple[torch.Tensor, torch.Tensor]
Triple = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


@dataclass(frozen=True)
class PerToken:
    """Arguments of `reference.quantize_per_token`."""

    x: torch.Tensor
    base_scale_inv: float | torch.Tensor
    recipe: Recipe
    layout: SfLayout = SfLayout.layout_linear
    row_index: torch.Tensor | None = None
    out_scale: torch.Tensor | None = None


@dataclass(frozen=True)
class GlobalScale:
    """Arguments of `reference.quantize_global_scale`."""

    x: torch.Tensor
    global_scale: float | torch.Tensor
    recipe: Recipe
    layout: SfLayout = SfLayout.layout_linear
    inverse: bool = False
    row_index: torch.Tensor | None = None


def register(
    name: str, kind: Callable[P, Call], run: Callable[[Call], Result], results: int
) -> Callable[P, Result]:
    """Register the op `nvfp4_moe::{name}`; return it as a function with the parameters of `kind`.

    Args:
        run: returns the first `results` of codes, block scales and per-token scales.
    """
    flat: Flat[Call] = Flat(kind)  # type: ignore[arg-type]
    op = op_schema.register(
        name,
        flat,
        run,
        lambda call: allocate(call.x, call.layout)[:results],
        f"({', '.join(['Tensor'] * results)})",
    )

    def function(*args: P.args, **kwargs: P.kwargs) -> Result:
        return op(kind(*args, **kwargs))

    return function


def _per_token_in_reference(call: PerToken) -> Triple:
    result = reference.quantize_per_token(
        call.x, call.base_scale_inv, call.recipe, call.layout, row_index=call.row_index,
        out_scale=call.out_scale,
    )  # fmt: skip
    assert result.per_token_scale is not None
    return result.codes, result.block_scales, result.per_token_scale


def _global_scale_in_reference(call: GlobalScale) -> Pair:
    result = reference.quantize_global_scale(
        call.x, call.global_scale, call.recipe, call.layout, inverse=call.inverse,
        row_index=call.row_index,
    )  # fmt: skip
    return result.codes, result.block_scales


reference_per_token = register("reference_per_token", PerToken, _per_token_in_reference, 3)
reference_global_scale = register(
    "reference_global_scale", GlobalScale, _global_scale_in_reference, 2
)
