"""The declaration of a checkpoint's format, for plug-ins that make a server's own configuration."""

# SPDX-License-Identifier: Apache-2.0
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

from ..checkpoints.formats import MIXED, NVFP4
from ..checkpoints.groups import read_groups
from ..kernels.moe.call import Mode
from .quantizations import Requirements

Kind = Literal["modelopt", "modelopt mixed", "compressed-tensors"]


def kind_of(config: dict[str, Any]) -> Kind:
    """Return the format of an NVFP4 checkpoint.

    Args:
        config: `quantization_config` of its config.json, or its hf_quant_config.json.

    Raises:
        ValueError: it is not NVFP4 of ModelOpt or of compressed-tensors.
    """
    method = str(config.get("quant_method") or "modelopt").lower().replace("_", "-")
    inner = _inner(config)
    algorithm = str(inner.get("quant_algo")).upper()
    if method == "compressed-tensors" and any(group.is_nvfp4 for group in read_groups(config)):
        return "compressed-tensors"
    if method.startswith("modelopt") and algorithm in (*NVFP4, MIXED):
        return "modelopt mixed" if algorithm == MIXED else "modelopt"
    raise ValueError(
        f"the checkpoint's quant_method is {config.get('quant_method')!r}, its quant_algo "
        f"{inner.get('quant_algo')!r}; nvfp4-moe serves checkpoints in bf16, and NVFP4 of ModelOpt "
        "or of compressed-tensors (`nvfp4-moe convert` makes NVFP4 of bf16 and of FP8)"
    )


def declares_modelopt_nvfp4(config: dict[str, Any]) -> bool:
    method, inner = str(config.get("quant_method")), _inner(config)
    return method.lower().startswith("modelopt") and "NVFP4" in str(inner.get("quant_algo")).upper()


def _inner(config: dict[str, Any]) -> Mapping[str, Any]:
    """Return the object that names the algorithm: hf_quant_config.json has it as `quantization`."""
    inner = config.get("quantization")
    return inner if inner and isinstance(inner, Mapping) else config


def excludes_parts(
    excluded: Callable[[str], bool], mapping: Mapping[str, Sequence[str]] | None, prefix: str
) -> bool:
    """Return True for a fused matrix if a checkpoint's patterns exclude all of which it is made.

    Servers look such parts up by their exact names alone: `model.layers.*.self_attn.q_proj`, as
    `nvfp4-moe convert` wrote it in version 0.1, does not mean their `qkv_proj`.

    Args:
        excluded: the server's own answer for the name of a module.
        mapping: the parts of each fused matrix, by the last parts of their names.
        prefix: the name of the module.
    """
    parent, _, name = prefix.rpartition(".")
    parts = (mapping or {}).get(name, ())
    return excluded(prefix) or (
        bool(parts) and all(excluded(f"{parent}.{p}" if parent else p) for p in parts)
    )


class OfCheckpoint(Requirements):
    """A server's configuration of a checkpoint's format, with its own base beside it."""

    activation: Mode  # `configuration_of` sets it


class OfModelOpt(OfCheckpoint):
    """ModelOpt's list of modules that are not quantized, with the server's fused matrices."""

    packed_modules_mapping: dict[str, list[str]] | None

    def is_layer_excluded(self, prefix: str) -> bool:
        """Return True for a fused matrix, too, if patterns exclude all of which it is made."""
        excluded = super().is_layer_excluded  # type: ignore[misc]
        return excludes_parts(excluded, self.packed_modules_mapping, prefix)


def configuration_of(classes: Mapping[Kind, Any], config: dict[str, Any], activation: Mode) -> Any:
    """Return a server's configuration of a checkpoint's format.

    Args:
        classes: the server's class of each format, with `OfCheckpoint`.
        config: `quantization_config` of its config.json, or its hf_quant_config.json.

    Raises:
        ValueError: it is not NVFP4 of ModelOpt or of compressed-tensors.
    """
    made = classes[kind_of(config)].from_config(config)
    made.activation = activation
    return made
