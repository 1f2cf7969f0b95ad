"""Quantizers with a mistake each, for the hidden states and for the intermediate."""

# SPDX-License-Identifier: Apache-2.0
from collections.abc import Callable
from dataclasses import replace
from typing import Any
from unittest import mock

import torch

from nvfp4_moe.reference import quantize
from nvfp4_moe.reference.moe import layer as moe
from nvfp4_moe.reference.moe.activations import Activations
from nvfp4_moe.reference.moe.layer import Stages
from nvfp4_moe.reference.numerics import e2m1, e4m3
from nvfp4_moe.reference.quantize import Quantized, quantize_global_scale, quantize_per_token
from nvfp4_moe.reference.recipe import NVFP44Over6Config, Recipe

from .tensors import (
    first_block_dropped,
    flip,
    less,
    more,
    next_row,
    of_one,
    swap_nibbles,
    without_subnormals,
)

Given = dict[str, Any]
Tensor = torch.Tensor
Change = Callable[[Tensor], Tensor]
Quantizer = Callable[[Tensor, Recipe], Quantized]


def _with(module: Any, name: str, value: Any) -> Quantizer:
    """The per-token quantizer while a function of it is another."""

    def quantizer(x: Tensor, recipe: Recipe) -> Quantized:
        with mock.patch.object(module, name, value):
            return quantize_per_token(x, recipe.base_scale_inv, recipe)

    return quantizer


def _changed(**changes: Change) -> Quantizer:
    """The per-token quantizer, its result changed."""

    def quantizer(x: Tensor, recipe: Recipe) -> Quantized:
        q = quantize_per_token(x, recipe.base_scale_inv, recipe)
        changed: Given = {name: f(getattr(q, name)) for name, f in changes.items()}
        return replace(q, **changed)

    return quantizer


def _recipe(**changes: Any) -> Quantizer:
    return lambda x, recipe: quantize_per_token(
        x, replace(recipe, **changes).base_scale_inv, replace(recipe, **changes)
    )


def half_up(x: Tensor) -> Tensor:
    """Ties away from zero."""
    a = x.abs()
    code = torch.zeros_like(a, dtype=torch.uint8)
    for middle in (0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0):
        code += a >= middle
    return torch.where(torch.signbit(x), code | 8, code)


def _towards_zero(x: Tensor) -> Tensor:
    a = x.abs()
    code = torch.zeros_like(a, dtype=torch.uint8)
    for value in e2m1.VALUES[1:]:
        code += a >= value
    return torch.where(torch.signbit(x), code | 8, code)


def _unsigned_zero(x: Tensor) -> Tensor:
    code = _ENCODE_E2M1(x)
    return torch.where(code == 8, 0, code)


_ENCODE_E2M1, _ENCODE_E4M3 = e2m1.encode, e4m3.encode
_MAX = quantize.max_ignoring_nan


def _up(x: Tensor) -> Tensor:
    """The scale is never below the exact one."""
    code = _ENCODE_E4M3(x)
    return torch.where((e4m3.decode(code) < x) & (code < 0x7E), code + 1, code)


def _of_half(x: Tensor) -> Tensor:
    return _MAX(x[:, x.shape[1] // 2 :] if x.dim() == 2 else x)


def _of_fast_error(x: Tensor, recipe: Recipe) -> Quantized:
    assert recipe.four_over_six is not None
    config = replace(recipe.four_over_six, err_use_fast_math=True)
    return quantize_per_token(x, recipe.base_scale_inv, replace(recipe, four_over_six=config))


QUANTIZERS: dict[str, Quantizer] = {
    "ties of a code round away from zero": _with(e2m1, "encode", half_up),
    "codes round towards zero": _with(e2m1, "encode", _towards_zero),
    "block scale rounded up": _with(e4m3, "encode", _up),
    "reciprocals by division": _with(quantize, "rcp_approx_ftz", torch.reciprocal),
    "row maximum of half the row": _with(quantize, "max_ignoring_nan", _of_half),
    "exact math for fast": _recipe(math="exact"),
    "4over6 though it is off": _recipe(four_over_six=NVFP44Over6Config()),
    "base scale 1": lambda x, r: quantize_per_token(x, 1.0, r),
    "base scale of e4m3_max 256": lambda x, r: quantize_per_token(x, 1 / 1536, r),
    "one scale for all rows": lambda x, r: replace(
        quantize_global_scale(x, 2688.0 / x.abs().max().float(), r),
        per_token_scale=(x.abs().max().float() / 2688.0).expand(x.shape[0]).contiguous(),
    ),
    "nibbles exchanged": _changed(codes=swap_nibbles),
    "block scale one larger": _changed(block_scales=more),
    "block scale of the next block": _changed(block_scales=lambda s: s.roll(1, 1)),
    "block scale of the next row": _changed(block_scales=next_row),
    "per-token scale of the next row": _changed(per_token_scale=next_row),
    "first block scale dropped": _changed(block_scales=first_block_dropped),
    "one code off by one": _changed(codes=of_one(flip)),
    "one block scale off by one": _changed(block_scales=of_one(less)),
    "one per-token scale off by an ulp": _changed(
        per_token_scale=of_one(lambda t: torch.nextafter(t, t + 1))
    ),
    "input rounded through fp16": lambda x, r: quantize_per_token(
        x.half().to(x.dtype), r.base_scale_inv, r
    ),
    "subnormal block scales flushed": _changed(block_scales=without_subnormals),
    "4over6: the fast error": _of_fast_error,
    "a zero without its sign": _with(e2m1, "encode", _unsigned_zero),
}
"""Both quantizations can have them."""


def as_activations(quantizer: Quantizer) -> Callable[[Tensor, Recipe], Activations]:
    def of(x: Tensor, recipe: Recipe) -> Activations:
        q = quantizer(x, recipe)
        return Activations(q.codes, q.block_scales, q.per_token_scale)

    return of


def as_requantize(quantizer: Quantizer) -> Callable[..., tuple[Tensor, Tensor | None]]:
    def of(
        y: Tensor, _: Any, recipe: Recipe, steps: dict[str, Tensor]
    ) -> tuple[Tensor, Tensor | None]:
        return moe.read_back(quantizer(y.flatten(0, 1), recipe), y.shape[:2], steps)

    return of


def read_otherwise(f: Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]) -> Stages:
    """Let the second GEMM read f(values, scales, intermediate) in place of what was written."""

    def of(y: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
        values, scale = moe.requantize(y, *rest)
        assert scale is not None
        return f(values, scale, y.float())

    return Stages(requantize=of)
