"""What a converted checkpoint says of itself: `quantization_config` and `hf_quant_config.json`.

As ModelOpt exports it: `quant_algo` NVFP4, and the modules left alone under `exclude_modules` (in
`config.json`: `ignore`). Where the source's other layers stay FP8 the algorithm is MIXED_PRECISION,
with `quantized_layers` (NVFP4 of each module of experts, FP8_PB_WO of the others). The producer is
called `modelopt`, since servers take the format from that name; its version names this package.
"""

# SPDX-License-Identifier: Apache-2.0
import functools
import re
from typing import Any

from .. import __version__
from ..reference.recipe import BLOCK_SIZE, Recipe
from .patterns import matches
from .source import Source

_NUMBER = re.compile(r"(?<=layers\.)\d+(?=\.)")


def describe(source: Source, recipe: Recipe) -> tuple[dict[str, Any], dict[str, Any]]:
    """(`quantization_config` of config.json, the content of hf_quant_config.json)."""
    fp8 = fp8_modules(source)
    left = left_alone(source, fp8)
    producer = {"name": "modelopt", "version": f"0+nvfp4.moe.{__version__.partition('+')[0]}"}
    settings: dict[str, Any] = {"quant_algo": "NVFP4", "group_size": BLOCK_SIZE}
    if fp8:
        layers = {x.module: dict(settings) for x in source.layers}
        layers |= {module: {"quant_algo": "FP8_PB_WO"} for module in fp8}
        settings |= {"quant_algo": "MIXED_PRECISION", "quantized_layers": layers}
    four = {"dynamic": False, "num_bits": 4, "type": "float", "group_size": BLOCK_SIZE}
    targets = [x.module for x in source.layers] if fp8 else ["Linear"]
    group = {"input_activations": four, "weights": four, "targets": targets}
    inner = {"config_groups": {"group_0": group}, "ignore": left, **settings}
    inner |= {"producer": producer, "quant_method": "modelopt"}
    outer = {
        "producer": {**producer, "recipe": str(recipe)},
        "quantization": {**settings, "kv_cache_quant_algo": None, "exclude_modules": left},
    }
    return inner, outer


def fp8_modules(source: Source) -> list[str]:
    """Modules, not of converted experts, that stay FP8."""
    names = source.folder.shard_of
    found = set()
    for name in names:
        if name in source.scales or not name.endswith("_scale_inv"):
            continue
        weight = name.removesuffix("_scale_inv")  # a stacked tensor is a module of its own
        if weight in names:
            found.add(weight.removesuffix(".weight"))
    return sorted(found)


def left_alone(source: Source, fp8: list[str]) -> list[str]:
    """Patterns of the modules whose weights stay as they are, in bf16 say.

    A module is meant in every layer, `*` for the number, unless that would mean a quantized one too.
    """
    quantized = [*fp8, *(x.module for x in source.layers)]
    quantized += [m.target for found in source.matrices.values() for m in found]
    patterns = {f"{module}*" for module in source.excluded}
    whole = tuple(f"{module}." for module in source.excluded)

    @functools.cache
    def means_quantized(pattern: str) -> bool:
        return any(matches(pattern, module) for module in quantized)

    for name in source.folder.shard_of:
        module, _, kind = name.rpartition(".")
        info = source.folder.info(name)
        if kind != "weight" or info is None or len(info.shape) < 2:
            continue
        if name in source.matrices or module in fp8 or name.startswith(whole):
            continue
        pattern = _NUMBER.sub("*", module)
        patterns.add(module if means_quantized(pattern) else pattern)
    return sorted(patterns)
