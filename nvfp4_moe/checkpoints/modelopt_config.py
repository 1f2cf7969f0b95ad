"""Describes a converted checkpoint: `quantization_config` and `hf_quant_config.json`.

As ModelOpt exports it: `quant_algo` NVFP4, and the modules left alone under `exclude_modules` (in
`config.json`: `ignore`). Where the source's other layers stay FP8 the algorithm is MIXED_PRECISION,
with `quantized_layers` (NVFP4 of each module of experts, FP8's algorithm of each of the others). The
producer is called `modelopt`, since servers take the format from that name; its version names this
package.
"""

# SPDX-License-Identifier: Apache-2.0
import functools
import math
import re
from collections.abc import Iterator
from typing import Any

from .. import __version__
from ..reference.recipe import BLOCK_SIZE, Recipe
from . import json_documents
from .folder import CONFIG, Folder, TensorInfo
from .mistral import MISTRAL
from .model_fields import LANGUAGE_MODELS
from .patterns import matches
from .source import Source

_NUMBER = re.compile(r"(?<=layers\.)\d+(?=\.)")


def describe(source: Source, recipe: Recipe) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return `quantization_config` of config.json, and the content of hf_quant_config.json."""
    fp8 = fp8_modules(source)
    left = left_alone(source, list(fp8))
    producer = {"name": "modelopt", "version": f"0+nvfp4.moe.{__version__.partition('+')[0]}"}
    settings: dict[str, Any] = {"quant_algo": "NVFP4", "group_size": BLOCK_SIZE}
    if fp8:
        layers = {x.target: dict(settings) for x in source.layers}
        layers |= {module: {"quant_algo": algorithm} for module, algorithm in fp8.items()}
        settings |= {"quant_algo": "MIXED_PRECISION", "quantized_layers": layers}
    four = {"dynamic": False, "num_bits": 4, "type": "float", "group_size": BLOCK_SIZE}
    targets = [x.target for x in source.layers] if fp8 else ["Linear"]
    group = {"input_activations": four, "weights": four, "targets": targets}
    inner = {"config_groups": {"group_0": group}, "ignore": left, **settings}
    inner |= {"producer": producer, "quant_method": "modelopt"}
    outer = {
        "producer": {**producer, "recipe": str(recipe)},
        "quantization": {**settings, "kv_cache_quant_algo": None, "exclude_modules": left},
    }
    return inner, outer


def fp8_modules(source: Source) -> dict[str, str]:
    """Return the other modules that stay FP8, with ModelOpt's names of their algorithms."""
    folder, found = source.folder, {}
    for name in folder.shard_of:
        info = folder.info(name)
        if info is None or info.dtype != "F8_E4M3" or name in source.matrices:
            continue
        module = name.removesuffix(".weight")  # a stacked tensor is a module of its own
        names = (f"{name}_scale_inv", f"{name}_scale", f"{module}.scale")
        scale = next((n for n in names if n in folder.shard_of), None)
        scale_info = None if scale is None else folder.info(scale)
        if scale is not None and scale_info is not None:
            found[module] = _algorithm(scale, scale_info, info)
    return dict(sorted(found.items()))


def _algorithm(name: str, scale: TensorInfo, weight: TensorInfo) -> str:
    """Return ModelOpt's name for FP8 weights with such scales."""
    rows, columns = weight.shape[-2:] if len(weight.shape) > 1 else (1, *weight.shape)
    if scale.dtype in ("U8", "F8_E8M0") and scale.shape[-1:] == (columns // 32,):
        return "MXFP8"
    if name.endswith("_scale_inv"):
        return "FP8_PB_WO"
    if math.prod(scale.shape) == 1:
        return "FP8"
    return "FP8_PER_CHANNEL_PER_TOKEN" if math.prod(scale.shape) == rows else "FP8_PB_WO"


def configurations(folder: Folder, inner: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Return the files that describe the model, by name, with `inner` as their quantization."""
    found = {}
    config = folder.json(CONFIG, json_documents.CONFIG)
    params = folder.json(MISTRAL, json_documents.PARAMS)
    if config is not None or params is None:
        found[CONFIG] = {**_without_quantization(config or {}), "quantization_config": inner}
    if params is not None and (config is None or "quantization" in params):
        found[MISTRAL] = {**params, "quantization": inner}
    return found


def _without_quantization(config: dict[str, Any]) -> dict[str, Any]:
    """Return the fields, also of the inner language model, without those of the source's numbers."""
    kept = {
        k: v for k, v in config.items() if k not in ("quantization_config", "compression_config")
    }
    for key in LANGUAGE_MODELS:
        if isinstance(kept.get(key), dict):
            kept[key] = _without_quantization(kept[key])
    return kept


def left_alone(source: Source, fp8: list[str]) -> list[str]:
    """Return patterns of the modules whose weights stay as they are, for example in bf16.

    A pattern is the outermost module without quantized ones, and `*` for all that is in it. So it means
    the matrices that a server fuses, too: `self_attn.qkv_proj`, where the checkpoint has three. It is
    meant in every layer, `*` for the number, unless that would mean a quantized module. A weight beside
    quantized modules has its own name: vLLM knows a fused matrix of them by the whole names of its parts
    (vllm 0.32.0, `quant_utils.py:617`).
    """
    quantized = [*fp8, *(name for x in source.layers for name in (x.module, x.target))]
    quantized += [m.target for of in source.matrices.values() for m in of if m.expert == 0]
    patterns = {f"{module}*" for module in source.excluded}
    whole = tuple(f"{module}." for module in source.excluded)

    @functools.cache
    def means_quantized(pattern: str) -> bool:
        # vLLM also takes a pattern, without its last `*`, as a part of names (`modelopt.py:206,274`).
        part = pattern.removesuffix("*")
        return any(matches(pattern, module) or part in module for module in quantized)

    for name in source.folder.shard_of:
        module, _, kind = name.rpartition(".")
        info = source.folder.info(name)
        if kind != "weight" or info is None or len(info.shape) < 2:
            continue
        if name in source.matrices or module in fp8 or name.startswith(whole):
            continue
        tried = (
            p for outer in _outer(module) for p in (_NUMBER.sub("*", outer) + "*", f"{outer}*")
        )
        patterns.add(next((pattern for pattern in tried if not means_quantized(pattern)), module))
    return sorted(patterns)


def _outer(module: str) -> Iterator[str]:
    """Yield the modules around one, the outermost first, without those that are numbers."""
    parts = module.split(".")
    for count in range(1, len(parts)):
        if not parts[count - 1].isdecimal():
            yield ".".join(parts[:count])
