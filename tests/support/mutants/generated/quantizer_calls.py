"""Calls of the quantizers with what layers and tables of cases never give them."""

# SPDX-License-Identifier: Apache-2.0
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch

from nvfp4_moe import host
from nvfp4_moe.kernels.quantize import launch as quantize_launch
from nvfp4_moe.reference.quantize import (
    dequantize,
    quantize_block_scales,
    quantize_global_scale,
    quantize_per_token,
)
from nvfp4_moe.reference.recipe import Recipe, SfLayout

from ..calls import Answered, Call
from .part_calls import exactly, fours

Tensor = torch.Tensor


@dataclass(frozen=True)
class CutCall:
    """A call of a quantizer whose matrix is cut into programs as only a GPU's launches would."""

    call: Call
    config: quantize_launch.LaunchConfig

    def answer(self, device: str = "cpu") -> Any:
        def chosen(*_: object, **__: object) -> quantize_launch.LaunchConfig:
            return self.config

        with (
            mock.patch.object(quantize_launch, "launch_config", chosen),
            mock.patch.object(quantize_launch, "global_launch_config", chosen),
        ):
            return self.call.answer(device)

    def judge(self) -> Answered:
        return self.call.judge()


@dataclass(frozen=True)
class BaseScaleCall:
    """A base scale that is not the recipe's."""

    x: Tensor
    recipe: Recipe
    base: float

    def answer(self, device: str = "cpu") -> Any:
        found = quantize_launch.quantize_per_token(
            self.x.to(device), self.base, self.recipe, SfLayout.layout_linear
        )
        return [t.cpu() for t in found]

    def judge(self) -> Answered:
        q = quantize_per_token(self.x, self.base, self.recipe, SfLayout.layout_linear)
        return exactly([q.codes, q.block_scales, q.per_token_scale])


@dataclass(frozen=True)
class ChosenCall:
    """Rows that an index names, some of them none, with a base scale and an output scale in tensors."""

    x: Tensor
    recipe: Recipe
    layout: SfLayout
    base: float | None = None  # None: the recipe's
    shown: float = 0.3

    def _given(self, device: str) -> tuple[Tensor, ...]:
        rows = len(self.x)
        index = host.arange(rows).flip(0).int()  # ends in row 0
        index[1], index[3] = -1, rows
        base = self.recipe.base_scale_inv if self.base is None else self.base
        scales = host.fp32([base]), host.fp32([self.shown])
        return tuple(t.to(device) for t in (self.x, scales[0], index, scales[1]))

    def answer(self, device: str = "cpu") -> Any:
        x, base, index, shown = self._given(device)
        found = quantize_launch.quantize_per_token(
            x, base, self.recipe, self.layout, row_index=index, out_scale=shown
        )
        return [
            t.cpu()[_live(index.cpu(), len(x))] if i == 2 else t.cpu() for i, t in enumerate(found)
        ]

    def judge(self) -> Answered:
        x, base, index, shown = self._given("cpu")
        q = quantize_per_token(x, base, self.recipe, self.layout, row_index=index, out_scale=shown)
        assert q.per_token_scale is not None
        return exactly([q.codes, q.block_scales, q.per_token_scale[_live(index, len(x))]])


def _live(index: Tensor, rows: int) -> Tensor:
    return index[(index >= 0) & (index < rows)].long()


@dataclass(frozen=True)
class GivenScaleCall:
    """A scale from the caller: of all rows or of each, to encode or, `inverse`, to decode."""

    x: Tensor  # any dtype that the mode takes
    recipe: Recipe
    scale: Tensor  # fp32 [1] or [M]
    layout: SfLayout = SfLayout.layout_linear
    inverse: bool = False

    def answer(self, device: str = "cpu") -> Any:
        found = quantize_launch.quantize_global_scale(
            self.x.to(device), self.scale.to(device), self.recipe, self.layout, inverse=self.inverse
        )
        return [t.cpu() for t in found]

    def judge(self) -> Answered:
        q = quantize_global_scale(
            self.x, self.scale, self.recipe, self.layout, inverse=self.inverse
        )
        return exactly([q.codes, q.block_scales])


@dataclass(frozen=True)
class ValuesCall:
    """Values in place of codes, as the grouped GEMM reads them."""

    x: Tensor
    recipe: Recipe
    per_token: bool

    def answer(self, device: str = "cpu") -> Any:
        values, token = quantize_launch.quantize_to_values(
            self.x.to(device), self.recipe, per_token=self.per_token
        )
        return [t.cpu() for t in (values, token) if t is not None]

    def judge(self) -> Answered:
        if self.per_token:
            q = quantize_per_token(self.x, self.recipe.base_scale_inv, self.recipe)
        else:
            q = quantize_block_scales(self.x, self.recipe)
        token = [] if q.per_token_scale is None else [q.per_token_scale]
        return exactly([fours(dequantize(q.codes, q.block_scales, 1.0)), *token])
