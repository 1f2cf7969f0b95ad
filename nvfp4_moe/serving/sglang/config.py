"""The configurations that SGLang makes for each name of `QUANTIZATIONS`.

SGLang reads the file hf_quant_config.json for a method that names it, and then fails for a checkpoint in
bf16, which has none. Each name therefore has two methods: the user's for bf16, and one for checkpoints
that are quantized already, to which `override_quantization_method` sends them. The latter get SGLang's
own configuration of their format, with experts of ours (`checkpoint.py`). Other layers than experts are
SGLang's.
"""

# SPDX-License-Identifier: Apache-2.0
from typing import Any

import torch
from sglang.srt.layers.quantization.base_config import QuantizationConfig

from ..declared import configuration_of, declares_modelopt_nvfp4
from ..quantizations import Named
from .plugin import check_version

QUANTIZED = "_checkpoint"
"""The end of a method's name for checkpoints that are quantized already."""


class Nvfp4MoEConfig(Named, QuantizationConfig):
    """A model in bf16, whose experts are quantized when they have been loaded."""

    name = "nvfp4_moe"
    modelopt_goes_to: str | None = None  # the name that `install` chose, for every class

    def __init__(self) -> None:
        check_version()
        super().__init__()

    @staticmethod
    def get_config_filenames() -> list[str]:
        return []

    def get_scaled_act_names(self) -> list[str]:
        return []

    @classmethod
    def override_quantization_method(
        cls, hf_quant_cfg: dict[str, Any] | None, user_quant: str | None
    ) -> str | None:
        """Send a quantized checkpoint to its own method where the user has named this one."""
        quantized = cls.name + QUANTIZED
        taken = cls.modelopt_goes_to == cls.name and user_quant in (None, "modelopt_fp4")
        if user_quant in (cls.name, quantized):
            return quantized
        return quantized if taken and declares_modelopt_nvfp4(hf_quant_cfg or {}) else None

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> QuantizationConfig:
        """Return the configuration of a checkpoint that is quantized already.

        Args:
            config: `quantization_config` of its config.json, or its hf_quant_config.json.

        Raises:
            UnsupportedError: this version of SGLang.
            ValueError: it is not NVFP4 of ModelOpt or of compressed-tensors.
        """
        check_version()
        from .checkpoint import CLASSES

        return configuration_of(CLASSES, config, cls.activation())

    def get_quant_method(self, layer: torch.nn.Module, prefix: str) -> Any:
        """Return the method of a layer: ours for experts; SGLang's for matrices, which stay in bf16."""
        from sglang.srt.layers.linear import LinearBase
        from sglang.srt.layers.moe.fused_moe_triton import FusedMoE
        from sglang.srt.layers.quantization.unquant import UnquantizedLinearMethod

        from .method import OnlineNvfp4MoE

        if isinstance(layer, FusedMoE):
            return OnlineNvfp4MoE(layer, self.activation())
        return UnquantizedLinearMethod() if isinstance(layer, LinearBase) else None


class Nvfp4MoEStaticConfig(Nvfp4MoEConfig):
    """Experts with the static activation scales of an NVFP4 checkpoint."""

    name = "nvfp4_moe_static"


class Nvfp4MoEW4A16Config(Nvfp4MoEConfig):
    """Experts whose weights alone are quantized."""

    name = "nvfp4_moe_w4a16"


class _OfQuantized:
    """A checkpoint that is quantized already; each class has its user's name beside it."""

    @staticmethod
    def get_config_filenames() -> list[str]:
        return ["hf_quant_config.json"]

    @classmethod
    def override_quantization_method(
        cls, hf_quant_cfg: dict[str, Any] | None, user_quant: str | None
    ) -> str | None:
        return None


class QuantizedNvfp4MoEConfig(_OfQuantized, Nvfp4MoEConfig):
    pass


class QuantizedNvfp4MoEStaticConfig(_OfQuantized, Nvfp4MoEStaticConfig):
    pass


class QuantizedNvfp4MoEW4A16Config(_OfQuantized, Nvfp4MoEW4A16Config):
    pass


CONFIGURATIONS: dict[str, type[Nvfp4MoEConfig]] = {
    cls.name: cls for cls in (Nvfp4MoEConfig, Nvfp4MoEStaticConfig, Nvfp4MoEW4A16Config)
} | {
    cls.name + QUANTIZED: cls
    for cls in (
        QuantizedNvfp4MoEConfig,
        QuantizedNvfp4MoEStaticConfig,
        QuantizedNvfp4MoEW4A16Config,
    )
}
