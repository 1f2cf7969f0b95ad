"""Our quantizer in transformers' registry, and `from_pretrained` for every checkpoint that it reads.

transformers chooses a quantizer by `quant_method` of config.json, and takes quantizers of other
packages under names that are free (`quantizers/auto.py`, `register_quantizer`, 5.17). "modelopt" is
free, so plain `from_pretrained` reads ModelOpt's checkpoints. "compressed-tensors" is taken by
transformers' own: those checkpoints need `from_pretrained` of this module.
"""

# SPDX-License-Identifier: Apache-2.0
from pathlib import Path
from typing import Any

import transformers
from transformers.quantizers.auto import (
    AUTO_QUANTIZATION_CONFIG_MAPPING,
    AUTO_QUANTIZER_MAPPING,
    register_quantization_config,
    register_quantizer,
)
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from ...checkpoints.errors import CheckpointError
from ...checkpoints.folder import Folder
from ...checkpoints.formats import read_quantization
from ...kernels.backends import UnsupportedError
from .checkpoint import Loading

OWN, MODELOPT = "nvfp4_moe", "modelopt"


class Configuration(QuantizationConfigMixin):
    """The entry of config.json about the quantization; the checkpoint itself is asked for the rest."""

    def __init__(self, quant_method: str = OWN, **described: Any):
        self.quant_method = quant_method
        self.described = described

    def to_dict(self) -> dict[str, Any]:
        return {"quant_method": self.quant_method, **self.described}


class Quantizer(HfQuantizer):
    """Puts packed experts into a model, in the place of its experts' weights."""

    requires_calibration = True  # so that transformers refuses a checkpoint that is not quantized

    def __init__(self, quantization_config: Any, **options: Any):
        super().__init__(quantization_config, **options)
        self._loading: Loading | None = None

    def update_ep_plan(self, config: Any) -> Any:
        """Refuse a distributed model: packed experts are not shared out.

        Raises:
            UnsupportedError: a distributed_config or a tp_plan was given.
        """
        if getattr(config, "distributed_config", None) is not None:
            raise UnsupportedError(
                "distributed_config is given; packed experts of a checkpoint are loaded whole"
            )
        return config

    def _process_model_before_weight_loading(
        self, model: Any, checkpoint_files: list[str] | None = None, **others: Any
    ) -> None:
        if not checkpoint_files:
            raise UnsupportedError("no checkpoint files; NVFP4 experts are read from a folder")
        self._loading = Loading(model, Path(checkpoint_files[0]).parent)
        self._loading.empty()

    def _process_model_after_weight_loading(self, model: Any, **others: Any) -> None:
        assert self._loading is not None, "called before"
        self._loading.fill()
        self._loading = None  # which holds the checkpoint's files

    def is_serializable(self) -> bool:
        return False

    @property
    def is_trainable(self) -> bool:
        return False

    @property
    def is_compileable(self) -> bool:
        return True


def register() -> None:
    """Add the quantizer under its own name, and as ModelOpt's where nobody else has that."""
    for name in (OWN, MODELOPT):
        if name not in AUTO_QUANTIZER_MAPPING and name not in AUTO_QUANTIZATION_CONFIG_MAPPING:
            register_quantization_config(name)(Configuration)
            register_quantizer(name)(Quantizer)


def from_pretrained(folder: Path | str, *, auto_class: Any = None, **options: Any) -> Any:
    """Load a model whose checkpoint has NVFP4 experts, of either format.

    Args:
        folder: of the checkpoint, on this machine.
        auto_class: that makes the model; omitted, `transformers.AutoModelForCausalLM`.
        options: of its `from_pretrained`; `experts_implementation` is one of ours, "nvfp4_moe" without
            it. `dtype` is bf16 without it.

    Returns:
        The model, in evaluation mode, without gradients.

    Raises:
        CheckpointError: everything that is wrong with the checkpoint, before a weight is read.
        UnsupportedError: a model whose experts are not modelled; a distributed model.
    """
    import torch

    register()
    read_quantization(Folder(folder))
    config = options.pop("config", None) or transformers.AutoConfig.from_pretrained(folder)
    config.quantization_config = {"quant_method": OWN}
    kind = auto_class or transformers.AutoModelForCausalLM
    options = {"dtype": torch.bfloat16} | options
    return kind.from_pretrained(folder, config=config, **options)


__all__ = ["CheckpointError", "Configuration", "Quantizer", "from_pretrained", "register"]
