"""FlashInfer's compiled quantizers: the CUDA module, the CuTe-DSL kernels and the cake program."""

# SPDX-License-Identifier: Apache-2.0
from types import SimpleNamespace
from typing import Any

import torch

from nvfp4_moe.reference.layouts import from_linear
from nvfp4_moe.reference.recipe import SfLayout

from . import compiled
from .behaviour import Behaviour, Matrix
from .environment import OF_ENVIRONMENT, code_of, recipe

Tensor = torch.Tensor
ONE = torch.ones(1)


class Quantizers:
    def __init__(self, behaviour: Behaviour) -> None:
        self._behaviour = behaviour

    def _per_token(self, m: Matrix) -> tuple[Tensor, Tensor, Tensor]:
        q = self._behaviour.quantize(m)
        assert q.per_token_scale is not None
        return q.codes, q.block_scales, q.per_token_scale

    def module(self, arch: str) -> Any:
        """`get_fp4_quantization_module`."""
        return SimpleNamespace(
            nvfp4_quant_and_per_token_scale_sm100=self.nvfp4_quant_and_per_token_scale_sm100,
            fp4_quantize_sm100=self.fp4_quantize_sm100,
            block_scale_interleave_sm100=lambda sf: from_linear(
                sf, SfLayout.layout_128x4
            ).flatten(),
        )

    @compiled.NVFP4_PER_TOKEN
    def nvfp4_quant_and_per_token_scale_sm100(
        self,
        input,
        scale_inv,
        expanded_idx_to_permuted_idx=None,
        sf_layout=2,
        nvfp4_4over6_code=OF_ENVIRONMENT,
    ):
        how, layout = recipe("cuda", nvfp4_4over6_code), SfLayout(sf_layout)
        return self._per_token(
            Matrix(input, scale_inv, how, layout, True, expanded_idx_to_permuted_idx)
        )

    @compiled.FP4_QUANTIZE
    def fp4_quantize_sm100(
        self,
        input,
        global_scale=None,
        sf_vec_size=16,
        is_sf_swizzled_layout=True,
        is_sf_8x4_layout=False,
        nvfp4_4over6_code=OF_ENVIRONMENT,
    ):
        assert sf_vec_size == 16
        layout = SfLayout.layout_8x4 if is_sf_8x4_layout else SfLayout.layout_128x4
        layout = layout if is_sf_swizzled_layout else SfLayout.layout_linear
        how = recipe("cuda", nvfp4_4over6_code)
        scale = ONE if global_scale is None else global_scale
        q = self._behaviour.quantize(Matrix(input, scale, how, layout, False))
        return q.codes, q.block_scales.flatten()

    @compiled.CUTE_DSL_PER_TOKEN
    def nvfp4_quantize_per_token_cute_dsl(
        self, input, global_scale_inv, sf_layout=0, out_scale=None, nvfp4_4over6=None
    ):
        how = recipe("cute-dsl", code_of(nvfp4_4over6))
        scale, layout = float(global_scale_inv), SfLayout(sf_layout)
        return self._per_token(Matrix(input, scale, how, layout, True, out_scale=out_scale))

    @compiled.CUTE_DSL_GLOBAL
    def nvfp4_quantize_cute_dsl(self, input, global_scale, sf_layout=0, nvfp4_4over6=None):
        how = recipe("cute-dsl", code_of(nvfp4_4over6))
        q = self._behaviour.quantize(Matrix(input, global_scale, how, SfLayout(sf_layout), False))
        return q.codes, q.block_scales

    @compiled.CAKE
    def cake(self, x, global_scale_inv, out_scale=None):
        how = recipe("cute-dsl", 0)
        layout, scale = SfLayout.layout_128x4, float(global_scale_inv)
        return self._per_token(Matrix(x, scale, how, layout, True, out_scale=out_scale))

    def mxfp8(self, input, sf_swizzle_layout, alignment=32, enable_pdl=None):
        """`mxfp8_quantize_sm100`; the scales are flat."""
        assert int(sf_swizzle_layout) == SfLayout.layout_linear and alignment == 32
        q = self._behaviour.mxfp8(input)
        return q.codes, q.scale.flatten()
