"""SGLang's own configurations of NVFP4 checkpoints, with experts of this library.

They know which modules of a checkpoint are quantized, under SGLang's names of them, and they serve every
layer but the experts: ModelOpt's NVFP4 and MIXED_PRECISION, and compressed-tensors.
"""

# SPDX-License-Identifier: Apache-2.0
from typing import Any

import torch
from sglang.srt.layers.moe.fused_moe_triton import FusedMoE
from sglang.srt.layers.quantization.compressed_tensors.compressed_tensors import (
    CompressedTensorsConfig,
)
from sglang.srt.layers.quantization.modelopt_quant import (
    ModelOptFp4Config,
    ModelOptMixedPrecisionConfig,
)

from ...checkpoints.formats import NVFP4
from ..declared import Kind, OfCheckpoint, OfModelOpt
from .method import CompressedTensorsNvfp4MoE, ModelOptNvfp4MoE


class ModelOpt(OfModelOpt, ModelOptFp4Config):
    """ModelOpt's NVFP4; excluded experts stay SGLang's."""

    def get_quant_method(self, layer: torch.nn.Module, prefix: str) -> Any:
        if isinstance(layer, FusedMoE) and not self.is_layer_excluded(prefix):
            return ModelOptNvfp4MoE(self, layer, self.activation)
        return super().get_quant_method(layer, prefix)


class ModelOptMixed(OfModelOpt, ModelOptMixedPrecisionConfig):
    """ModelOpt's MIXED_PRECISION; experts of another algorithm stay SGLang's."""

    def get_quant_method(self, layer: torch.nn.Module, prefix: str) -> Any:
        if (
            isinstance(layer, FusedMoE)
            and not self.is_layer_excluded(prefix)
            and self.resolve_quant_algo(prefix) in NVFP4
        ):
            return ModelOptNvfp4MoE(self.nvfp4_config, layer, self.activation)
        return super().get_quant_method(layer, prefix)


class CompressedTensors(OfCheckpoint, CompressedTensorsConfig):
    """compressed-tensors; experts that are ignored, or of another format, stay SGLang's."""

    def get_quant_method(self, layer: torch.nn.Module, prefix: str) -> Any:
        if isinstance(layer, FusedMoE):
            self._add_fused_moe_to_target_scheme_map()
            projections = ("gate_proj", "up_proj", "down_proj")  # as SGLang's own `get_moe_scheme`
            schemes = [self.get_scheme_dict(layer, f"{prefix}.0.{p}") for p in projections]
            if all(
                s is not None and self._is_fp4a16_nvfp4(s.get("weights"), None) for s in schemes
            ):
                return CompressedTensorsNvfp4MoE(self, layer, self.activation)
        return super().get_quant_method(layer, prefix)


CLASSES: dict[Kind, Any] = {
    "modelopt": ModelOpt,
    "modelopt mixed": ModelOptMixed,
    "compressed-tensors": CompressedTensors,
}
