"""The configurations that vLLM makes for each name of `QUANTIZATIONS`.

They lie at module level, since vLLM sends them to its engine's process. A checkpoint that is quantized
already gets vLLM's own configuration of its format, with experts of ours (`checkpoint.py`). Other layers
than experts are vLLM's.
"""

# SPDX-License-Identifier: Apache-2.0
from typing import Any

import torch
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig

from ..active import say_active
from ..declared import configuration_of, declares_modelopt_nvfp4
from ..quantizations import Named
from .plugin import check_version


class Nvfp4MoEConfig(Named, QuantizationConfig):
    """A model in bf16, whose experts are quantized when they are loaded."""

    name = "nvfp4_moe"
    modelopt_goes_to: str | None = None  # the name that `install` chose, for every class

    def __init__(self) -> None:
        say_active("vllm", check_version(), f"--quantization {self.name}")
        super().__init__()

    @staticmethod
    def get_config_filenames() -> list[str]:
        return []

    @classmethod
    def override_quantization_method(
        cls, hf_quant_cfg: dict[str, Any], user_quant: str | None, hf_config: Any = None
    ) -> str | None:
        """Take a quantized checkpoint over where the user has named this method."""
        taken = cls.modelopt_goes_to == cls.name and user_quant in (None, "modelopt_fp4")
        if user_quant == cls.name or (taken and declares_modelopt_nvfp4(hf_quant_cfg)):
            return cls.name
        return None

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> QuantizationConfig:
        """Return the configuration of a checkpoint that is quantized already.

        Args:
            config: `quantization_config` of its config.json, or its hf_quant_config.json.

        Raises:
            UnsupportedError: this version of vLLM.
            ValueError: it is not NVFP4 of ModelOpt or of compressed-tensors.
        """
        version = check_version()
        from .checkpoint import CLASSES

        found = configuration_of(CLASSES, config, cls.activation())
        say_active("vllm", version, f"--quantization {cls.name}")
        return found

    def get_quant_method(self, layer: torch.nn.Module, prefix: str) -> Any:
        """Return the method of a layer: ours for experts; vLLM's for matrices, which stay in bf16."""
        from vllm.model_executor.layers.fused_moe import RoutedExperts
        from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod

        from .method import OnlineNvfp4MoE

        if isinstance(layer, RoutedExperts):
            return OnlineNvfp4MoE(layer.moe_config, self.activation())
        return UnquantizedLinearMethod() if isinstance(layer, LinearBase) else None


class Nvfp4MoEStaticConfig(Nvfp4MoEConfig):
    """Experts with the static activation scales of an NVFP4 checkpoint."""

    name = "nvfp4_moe_static"


class Nvfp4MoEW4A16Config(Nvfp4MoEConfig):
    """Experts whose weights alone are quantized."""

    name = "nvfp4_moe_w4a16"


CONFIGURATIONS = (Nvfp4MoEConfig, Nvfp4MoEStaticConfig, Nvfp4MoEW4A16Config)
