"""SGLang's own configurations of NVFP4 checkpoints, with experts of this library.

They know which modules of a checkpoint are quantized, under SGLang's names of them, and they serve every
layer but the experts: ModelOpt's NVFP4 and MIXED_PRECISION, and compressed-tensors.
"""

# SPDX-License-Identifier: Apache-2.0
from typing import Any

import torch
from sglang.srt.layers.moe.fused_moe_triton import FusedMoE
from sglang.srt.layers.quantization.base_config import QuantizationConfig
from sglang.srt.layers.quantization.compressed_tensors.compressed_tensors import (
    CompressedTensorsConfig,
)
from sglang.srt.layers.quantization.modelopt_quant import (
    ModelOptFp4Config,
    ModelOptMixedPrecisionConfig,
)

from ...checkpoints.formats import NVFP4
from ...kernels.moe.call import Mode
from ..declared import excludes_parts, kind_of
from ..quantizations import LOWEST_CAPABILITY
from .method import CompressedTensorsNvfp4MoE, ModelOptNvfp4MoE


class _OfCheckpoint:
    """The rules that the three share; `activation` is set by `configuration_of`."""

    activation: Mode

    @classmethod
    def get_supported_act_dtypes(cls) -> list[torch.dtype]:
        return [torch.bfloat16]

    @classmethod
    def get_min_capability(cls) -> int:
        return LOWEST_CAPABILITY


class _OfModelOpt(_OfCheckpoint):
    """ModelOpt's list of modules that are not quantized, with SGLang's fused matrices."""

    packed_modules_mapping: dict[str, list[str]] | None

    def is_layer_excluded(self, prefix: str) -> bool:
        """Return True for a fused matrix, too, if patterns exclude all of which it is made."""
        excluded = super().is_layer_excluded  # type: ignore[misc]
        return excludes_parts(excluded, self.packed_modules_mapping, prefix)


class ModelOpt(_OfModelOpt, ModelOptFp4Config):
    """ModelOpt's NVFP4; excluded experts stay SGLang's."""

    def get_quant_method(self, layer: torch.nn.Module, prefix: str) -> Any:
        if isinstance(layer, FusedMoE) and not self.is_layer_excluded(prefix):
            return ModelOptNvfp4MoE(self, layer, self.activation)
        return super().get_quant_method(layer, prefix)


class ModelOptMixed(_OfModelOpt, ModelOptMixedPrecisionConfig):
    """ModelOpt's MIXED_PRECISION; experts of another algorithm stay SGLang's."""

    def get_quant_method(self, layer: torch.nn.Module, prefix: str) -> Any:
        if (
            isinstance(layer, FusedMoE)
            and not self.is_layer_excluded(prefix)
            and self.resolve_quant_algo(prefix) in NVFP4
        ):
            return ModelOptNvfp4MoE(self.nvfp4_config, layer, self.activation)
        return super().get_quant_method(layer, prefix)


class CompressedTensors(_OfCheckpoint, CompressedTensorsConfig):
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


_OF_KIND: dict[str, Any] = {
    "modelopt": ModelOpt,
    "modelopt mixed": ModelOptMixed,
    "compressed-tensors": CompressedTensors,
}


def configuration_of(config: dict[str, Any], activation: Mode) -> QuantizationConfig:
    """Return the configuration of a checkpoint's format.

    Args:
        config: `quantization_config` of its config.json, or its hf_quant_config.json.

    Raises:
        ValueError: it is not NVFP4 of ModelOpt or of compressed-tensors.
    """
    made: Any = _OF_KIND[kind_of(config)].from_config(config)
    made.activation = activation
    return made
