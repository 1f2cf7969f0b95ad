"""vLLM's own configurations of NVFP4 checkpoints, with experts of this library.

They know which modules of a checkpoint are quantized, under vLLM's names of them, and they serve every
layer but the experts: ModelOpt's NVFP4 and MIXED_PRECISION, and compressed-tensors.
"""

# SPDX-License-Identifier: Apache-2.0
from typing import Any

import torch
from vllm.model_executor.layers.fused_moe import RoutedExperts
from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors import (
    CompressedTensorsConfig,
)
from vllm.model_executor.layers.quantization.modelopt import (
    ModelOptMixedPrecisionConfig,
    ModelOptNvFp4Config,
)

from ...checkpoints.formats import NVFP4
from ..declared import Kind, OfCheckpoint, OfModelOpt
from .method import CompressedTensorsNvfp4MoE, ModelOptNvfp4MoE


class ModelOpt(OfModelOpt, ModelOptNvFp4Config):
    """ModelOpt's NVFP4; excluded experts stay vLLM's."""

    FusedMoEMethodCls = ModelOptNvfp4MoE


class ModelOptMixed(OfModelOpt, ModelOptMixedPrecisionConfig):
    """ModelOpt's MIXED_PRECISION; experts of another algorithm stay vLLM's."""

    def get_quant_method(self, layer: torch.nn.Module, prefix: str) -> Any:
        if (
            isinstance(layer, RoutedExperts)
            and not self.is_layer_excluded(prefix)
            and self._resolve_quant_algo(prefix) in NVFP4
        ):
            self.nvfp4_config.activation = self.activation
            return ModelOptNvfp4MoE(self.nvfp4_config, layer.moe_config)
        return super().get_quant_method(layer, prefix)


class CompressedTensors(OfCheckpoint, CompressedTensorsConfig):
    """compressed-tensors; experts that are ignored, or of another format, stay vLLM's."""

    def get_quant_method(self, layer: torch.nn.Module, prefix: str) -> Any:
        if isinstance(layer, RoutedExperts):
            self._add_fused_moe_to_target_scheme_map()
            projections = (
                layer.ckpt_gate_proj_name,
                layer.ckpt_up_proj_name,
                layer.ckpt_down_proj_name,
            )
            schemes = [self.get_scheme_dict(layer, f"{prefix}.0.{p}") for p in projections if p]
            if all(s is not None and self._is_nvfp4_format(s.get("weights")) for s in schemes):
                return CompressedTensorsNvfp4MoE(self, layer.moe_config)
        return super().get_quant_method(layer, prefix)


CLASSES: dict[Kind, Any] = {
    "modelopt": ModelOpt,
    "modelopt mixed": ModelOptMixed,
    "compressed-tensors": CompressedTensors,
}
