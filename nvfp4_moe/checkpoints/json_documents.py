"""The types of the entries that are read from a checkpoint's JSON files.

Entries that are not here are not checked, and whoever reads one adds it. Null is allowed where a
producer writes it: transformers for every entry of a configuration that is not set, compressed-tensors
(`QuantizationConfig`, `QuantizationScheme`, `QuantizationArgs`) for what it declares optional.
"""

# SPDX-License-Identifier: Apache-2.0
from collections.abc import Iterable, Iterator
from typing import Any

from .files import SUFFIX, is_below, is_shard_name
from .model_fields import (
    ACTIVATION_FIELDS,
    EXPERT_COUNTS,
    LANGUAGE_MODELS,
    WEIGHT_ON_INPUT_FIELDS,
)
from .patterns import has_wildcard, matcher
from .schema import (
    ANY,
    BOOLEAN,
    COUNT,
    NUMBER,
    SIZE,
    STRING,
    Leaf,
    ListOf,
    MapOf,
    OrNull,
    Record,
    shown,
)

_MOST_WILDCARDS = 5000
"""The most patterns that each module is compared with; names without a wildcard do not count."""


class _Patterns(ListOf):
    """Patterns of modules that `patterns.py` serves."""

    def problems(self, path: str, value: Any) -> Iterator[str]:
        wrong = list(super().problems(path, value))
        yield from wrong
        if wrong:
            return
        for i, pattern in enumerate(value):
            try:
                matcher(pattern)
            except ValueError as e:
                yield f"{path}[{i}] is {shown(pattern)}, a pattern that is not served: {e}"
        yield from _too_many(path, value)


class _ByPattern(MapOf):
    """Values by module, or by a pattern of modules."""

    def problems(self, path: str, value: Any) -> Iterator[str]:
        wrong = list(super().problems(path, value))
        yield from wrong or _too_many(path, value)


def _too_many(path: str, patterns: Iterable[str]) -> Iterator[str]:
    if (count := sum(map(has_wildcard, patterns))) > _MOST_WILDCARDS:
        yield f"{path} has {count} patterns with wildcards; at most {_MOST_WILDCARDS} are read"


_PATTERNS = _Patterns(STRING)

# ModelOpt: `quantization` of hf_quant_config.json, and its parts in `quantization_config`.
_ALGORITHM = Record({"quant_algo": OrNull(STRING), "group_size": OrNull(SIZE)})
_MODELOPT = {
    **_ALGORITHM.entries,
    "exclude_modules": _PATTERNS,
    "quantized_layers": OrNull(_ByPattern(_ALGORITHM)),
}

# compressed-tensors.
_ARGUMENTS = Record(
    {
        "num_bits": OrNull(SIZE),
        "type": OrNull(STRING),
        "group_size": OrNull(SIZE),
        "strategy": OrNull(STRING),
    }
)
_GROUP = Record(
    {
        "weights": OrNull(_ARGUMENTS),
        "input_activations": OrNull(_ARGUMENTS),
        "targets": _PATTERNS,
        "format": OrNull(STRING),
    }
)

QUANTIZATION = Record(
    {
        **_MODELOPT,
        "quant_method": OrNull(STRING),
        "ignore": OrNull(_PATTERNS),
        "quantization": OrNull(Record({**_MODELOPT, "ignore": OrNull(_PATTERNS)})),
        "config_groups": OrNull(MapOf(_GROUP)),
        "format": OrNull(STRING),
        "weight_block_size": OrNull(ListOf(COUNT)),
    }
)
"""`quantization_config` of config.json, whoever wrote it."""

HF_QUANT_CONFIG = Record({"quantization": Record({**_MODELOPT, "ignore": OrNull(_PATTERNS)})})

_MODEL = {
    **dict.fromkeys((*ACTIVATION_FIELDS, "model_type"), OrNull(STRING)),
    **dict.fromkeys(EXPERT_COUNTS, OrNull(COUNT)),
    **dict.fromkeys(WEIGHT_ON_INPUT_FIELDS, OrNull(BOOLEAN)),
    "architectures": OrNull(ListOf(STRING)),
    "quantization_config": OrNull(QUANTIZATION),
}
_LANGUAGE = OrNull(Record({**_MODEL, "text_config": OrNull(Record(_MODEL))}))
CONFIG = Record(_MODEL | dict.fromkeys(LANGUAGE_MODELS, _LANGUAGE))

PARAMS = Record(
    {
        "activation": OrNull(STRING),
        "moe": OrNull(Record(_MODEL)),
        "quantization": OrNull(QUANTIZATION),
    }
)
"""Mistral's params.json."""

_SHARD = Leaf(f"the name of a *{SUFFIX} file in this folder", is_shard_name)
INDEX = Record(
    {"weight_map": MapOf(_SHARD, at_least=1), "metadata": OrNull(MapOf(ANY))},
    required=("weight_map",),
)
"""model.safetensors.index.json."""

_BELOW = Leaf("the name of a file below this folder", is_below)
_SHARD_DONE = Record(
    {"sha256": STRING, "facts": MapOf(MapOf(ListOf(NUMBER, exactly=2)))}, ("sha256", "facts")
)
RECORD = Record(
    {"identity": STRING, "names": ListOf(_BELOW), "shards": MapOf(_SHARD_DONE)},
    ("identity", "names", "shards"),
)
"""The document that `convert` leaves in an unfinished destination."""
