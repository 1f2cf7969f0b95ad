"""How a checkpoint says that it is NVFP4, and what each format calls its tensors.

ModelOpt (`hf_quant_config.json`, or `quantization_config` of `config.json`, `quant_method` modelopt;
`quant_algo` NVFP4, or MIXED_PRECISION with `quantized_layers`; `exclude_modules` or `ignore` with
wildcards), for each projection:

    weight          uint8 [rows, K/2], the even column in the low nibble
    weight_scale    e4m3 [rows, K/16], linear
    weight_scale_2  fp32 scalar, decode: amax / (6 * 448)
    input_scale     fp32 scalar, decode: largest input / (6 * 448)

compressed-tensors (`quant_method` compressed-tensors, `ignore` with `re:` patterns) has
`weight_packed`, `weight_scale`, and two *encode* scales, the reciprocals: `weight_global_scale` and
`input_global_scale`.
"""

# SPDX-License-Identifier: Apache-2.0
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

import torch

from ..reference.recipe import BLOCK_SIZE
from .errors import CheckpointError
from .folder import Folder

HF_QUANT_CONFIG = "hf_quant_config.json"
_NVFP4 = ("NVFP4", "W4A16_NVFP4")


@dataclass(frozen=True)
class Format:
    """The kinds of tensors of a projection."""

    name: str
    codes: str
    block_scales: str
    weight_scale: str
    input_scale: str
    reciprocal: bool  # the two scalars are encode scales

    @property
    def kinds(self) -> tuple[str, ...]:
        return self.codes, self.block_scales, self.weight_scale, self.input_scale

    def decode(self, scalar: torch.Tensor) -> torch.Tensor:
        """The fp32 decode scale that a stored scalar stands for."""
        return 1.0 / scalar if self.reciprocal else scalar


MODELOPT = Format("modelopt", "weight", "weight_scale", "weight_scale_2", "input_scale", False)
COMPRESSED_TENSORS = Format(
    "compressed-tensors",
    "weight_packed",
    "weight_scale",
    "weight_global_scale",
    "input_global_scale",
    True,
)


@dataclass(frozen=True)
class Quantization:
    """A checkpoint's format, and which modules it holds for."""

    format: Format
    excluded: tuple[str, ...] = ()
    algorithms: dict[str, str] = field(default_factory=dict)  # by module, of MIXED_PRECISION

    def refusal(self, modules: Iterable[str]) -> str | None:
        """Why the modules (a module of experts and those in it) are not NVFP4; None if they are."""
        names = list(modules)
        for pattern in self.excluded:  # outside: fnmatch remembers few compiled patterns
            for name in names:
                if matches(pattern, name):
                    return f"{name} is excluded from quantization (by {pattern!r})"
        if self.algorithms and not any(self.algorithms.get(n) in _NVFP4 for n in names):
            given = {self.algorithms.get(n) for n in names} - {None}
            return f"{names[0]}: its algorithm is {given or 'not given'}, not one of {_NVFP4}"
        return None


def matches(pattern: str, module: str) -> bool:
    """Whether a pattern of `exclude_modules` or `ignore` means a module."""
    if pattern.startswith("re:"):
        return re.match(pattern[3:], module) is not None
    return fnmatchcase(module, pattern)


def read_quantization(folder: Folder) -> Quantization:
    """What a checkpoint says of its quantization.

    Raises:
        CheckpointError: nothing, or something else than NVFP4 in one of the two formats.
    """
    config = folder.config.get("quantization_config") or {}
    if config.get("quant_method") == "compressed-tensors":
        return _compressed_tensors(folder, config)
    separate = (folder.json(HF_QUANT_CONFIG) or {}).get("quantization") or {}
    inner = config.get("quantization") or config
    if not separate and not str(config.get("quant_method", "modelopt")).startswith("modelopt"):
        inner = {}
    algorithm = separate.get("quant_algo") or inner.get("quant_algo")
    layers = separate.get("quantized_layers") or inner.get("quantized_layers") or {}
    if algorithm not in (*_NVFP4, "MIXED_PRECISION"):
        raise CheckpointError(
            folder.path,
            [
                f"its quant_algo is {algorithm!r} (quant_method {config.get('quant_method')!r}); it "
                f"must be NVFP4 of ModelOpt, in {HF_QUANT_CONFIG} or config.json, or of "
                "compressed-tensors"
            ],
        )
    size = separate.get("group_size") or inner.get("group_size") or BLOCK_SIZE
    _check_group_size(folder, size)
    excluded = [
        *separate.get("exclude_modules", ()),
        *(inner.get("exclude_modules") or inner.get("ignore") or ()),
    ]
    algorithms = {name: str(entry.get("quant_algo")) for name, entry in layers.items()}
    return Quantization(MODELOPT, tuple(excluded), algorithms)


def _compressed_tensors(folder: Folder, config: dict[str, Any]) -> Quantization:
    groups = [group.get("weights") or {} for group in (config.get("config_groups") or {}).values()]
    fours = [g for g in groups if g.get("num_bits") == 4 and g.get("type") == "float"]
    if not fours:
        raise CheckpointError(
            folder.path,
            [
                f"none of its config_groups has 4-bit float weights (format {config.get('format')!r})"
            ],
        )
    _check_group_size(folder, fours[0].get("group_size", BLOCK_SIZE))
    return Quantization(COMPRESSED_TENSORS, tuple(config.get("ignore") or ()))


def _check_group_size(folder: Folder, size: Any) -> None:
    if size != BLOCK_SIZE:
        raise CheckpointError(folder.path, [f"its group_size is {size!r}; NVFP4 has {BLOCK_SIZE}"])
