"""The NVFP4 formats of checkpoints: how a configuration declares each, and the names of its tensors.

ModelOpt (`hf_quant_config.json`, or `quantization_config` of `config.json`, `quant_method` modelopt;
`quant_algo` NVFP4, or MIXED_PRECISION with `quantized_layers` or `config_groups`, in capitals or not;
`exclude_modules` or `ignore` with wildcards), for each projection:

    weight          uint8 [rows, K/2], the even column in the low nibble
    weight_scale    e4m3 [rows, K/16], linear
    weight_scale_2  fp32 scalar, decode: amax / (6 * 448)
    input_scale     fp32 scalar, decode: largest input / (6 * 448)

compressed-tensors (`quant_method` compressed-tensors, `config_groups` or the `format` alone, `ignore`
with `re:` patterns) has `weight_packed`, `weight_scale`, and two *encode* scales, the reciprocals:
`weight_global_scale` and `input_global_scale`.
"""

# SPDX-License-Identifier: Apache-2.0
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from ..reference.recipe import BLOCK_SIZE
from .errors import CheckpointError
from .folder import HF_QUANT_CONFIG, Folder
from .groups import NVFP4_PACKED, Group, group_refusal, read_groups
from .layers import Layer
from .model_config import model_config
from .patterns import matcher, matches

NVFP4, MIXED = ("NVFP4", "W4A16_NVFP4"), "MIXED_PRECISION"
BIAS = "bias"


@dataclass(frozen=True)
class Format:
    """The kinds of tensors of a projection; `bias` has one name everywhere."""

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
        """Return the fp32 decode scale that a stored scalar represents."""
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
    """A checkpoint's format, and the modules that have it."""

    format: Format
    excluded: tuple[str, ...] = ()
    algorithms: dict[str, str] = field(default_factory=dict)  # by module, of MIXED_PRECISION
    groups: tuple[Group, ...] = ()  # without any the format holds for all

    def refusal(self, layer: Layer, experts: Iterable[int]) -> str | None:
        """Say why experts of a layer are not NVFP4; None if they are."""
        called = [layer.called(e, p) for e in experts for p in layer.projections]
        names = [layer.module, *dict.fromkeys(name for names in called for name in names)]
        for pattern in self.excluded:
            means = matcher(pattern)
            for name in names:
                if means(name):
                    return f"{name} is excluded from quantization (by {pattern!r})"
        for projection in called:
            own = [*projection, layer.module]
            reason = self._algorithm(own) or group_refusal(self.groups, own)
            if reason is not None:
                return reason
        return None

    def _algorithm(self, names: Sequence[str]) -> str | None:
        if not self.algorithms:
            return None
        given = {self.algorithms[n] for n in names if n in self.algorithms} or {
            algorithm
            for pattern, algorithm in self.algorithms.items()
            if "*" in pattern and any(matches(pattern, n) for n in names)
        }
        if given and given <= set(NVFP4):
            return None
        return f"{names[0]}: its algorithm is {sorted(given) or 'not given'}, not one of {NVFP4}"


def read_quantization(folder: Folder) -> Quantization:
    """Read the format of a checkpoint's weights and the modules that have it.

    Raises:
        CheckpointError: nothing, or something else than NVFP4 in one of the two formats.
    """
    config = model_config(folder).get("quantization_config") or {}
    method = (config.get("quant_method") or "modelopt").lower().replace("_", "-")
    if method == "compressed-tensors":
        return _compressed_tensors(folder, config)
    separate = (folder.hf_quant_config or {}).get("quantization") or {}
    inner = config.get("quantization") or config
    if not separate and not method.startswith("modelopt"):
        inner = {}
    given = separate.get("quant_algo") or inner.get("quant_algo")
    algorithm = str(given).upper()
    if algorithm not in (*NVFP4, MIXED):
        raise CheckpointError(
            folder.path,
            [
                f"its quant_algo is {given!r} (quant_method {config.get('quant_method')!r}); it "
                f"must be NVFP4 of ModelOpt, in {HF_QUANT_CONFIG} or config.json, or of "
                f"compressed-tensors; {_advice(method, given)}"
            ],
        )
    check_group_size(folder, separate.get("group_size") or inner.get("group_size"))
    excluded = [
        *separate.get("exclude_modules", ()),
        *(inner.get("exclude_modules") or inner.get("ignore") or ()),
    ]
    layers = separate.get("quantized_layers") or inner.get("quantized_layers") or {}
    algorithms = {name: str(entry.get("quant_algo")).upper() for name, entry in layers.items()}
    for entry in layers.values():
        if str(entry.get("quant_algo")).upper() in NVFP4:
            check_group_size(folder, entry.get("group_size"))
    groups = read_groups(inner) if algorithm == MIXED and not layers else ()
    return Quantization(MODELOPT, tuple(excluded), algorithms, groups)


def _compressed_tensors(folder: Folder, config: dict[str, Any]) -> Quantization:
    groups = read_groups(config)
    if not groups and (config.get("format") or "").lower() != NVFP4_PACKED:
        raise CheckpointError(
            folder.path,
            [
                f"it has no config_groups, and its format is {config.get('format')!r}, not "
                f"{NVFP4_PACKED!r}"
            ],
        )
    if groups and not any(group.is_nvfp4 for group in groups):
        each = ", ".join(f"{group.name}: {group.described}" for group in groups)
        raise CheckpointError(
            folder.path,
            [
                f"none of its config_groups has 4-bit float weights in groups of {BLOCK_SIZE} ({each})"
            ],
        )
    return Quantization(COMPRESSED_TENSORS, tuple(config.get("ignore") or ()), groups=groups)


def check_group_size(folder: Folder, size: Any) -> None:
    """Refuse a group size that is not NVFP4's; None stands for it."""
    if size is not None and str(size) != str(BLOCK_SIZE):
        raise CheckpointError(folder.path, [f"its group_size is {size!r}; NVFP4 has {BLOCK_SIZE}"])


def _advice(method: str, algorithm: str | None) -> str:
    """Say how a checkpoint of another quantization, or of none, can be served."""
    ordinary = method == "modelopt" and algorithm is None
    if ordinary or method in ("fp8", "fbgemm-fp8") or "FP8" in str(algorithm).upper():
        return "`nvfp4-moe convert` makes NVFP4 of its weights"
    return "convert the checkpoint that it was made from with `nvfp4-moe convert`"
