"""Judge an output of a definition of FlashInfer's fused NVFP4 layer, in place of a tolerance.

FlashInfer writes such definitions, and `nvfp4-moe solutions` with it, for flashinfer-bench. Its version
0.1.2 reads none of them: they have inputs of uint8, which its table of types lacks.
"""

# SPDX-License-Identifier: Apache-2.0
import inspect
import re
from collections.abc import Callable, Mapping
from typing import Any

import torch

from ..cases.moe_case import MoECase
from ..kernels.backends import prepared
from ..kernels.moe import api
from ..reference.moe.routing import RoutingMethodType
from .verdict import Allowed, Outside

_ROUTED = "trtllm_fp4_block_scale_routed_moe"
_FROM_LOGITS = re.compile(r"moe_fp4_block_scale_(\w+)_routing_")
_METHODS = {
    "default": RoutingMethodType.Default,
    "renormalize": RoutingMethodType.Renormalize,
    "ds": RoutingMethodType.DeepSeekV3,
    "llama4": RoutingMethodType.Llama4,
    "renormalize_naive": RoutingMethodType.RenormalizeNaive,
    "topk": RoutingMethodType.TopK,
}
"""By the words in FlashInfer's names of definitions (0.7.2.post1, `trace/templates/moe.py`)."""
_CONSTANTS = ("num_experts", "top_k", "n_group", "topk_group", "activation_type")


def knows(name: str) -> bool:
    """Return True if `outside` judges the definition of this name."""
    found = _FROM_LOGITS.match(name)
    return name.startswith(_ROUTED) or (found is not None and found[1] in _METHODS)


def outside(
    definition: Mapping[str, Any], inputs: Mapping[str, Any], output: torch.Tensor
) -> Outside | None:
    """Return what of an output no implementation of the contract may give, or None.

    Args:
        definition: as in its JSON file; `name` and `axes` are read.
        inputs: the definition's inputs by name, on one device; what is absent or None is not given.
        output: [T, H] bf16.

    Raises:
        ValueError: a definition that is not known, or inputs that no backend accepts.
    """
    return Allowed(_case(definition, inputs)).first(output)


def _case(definition: Mapping[str, Any], inputs: Mapping[str, Any]) -> MoECase:
    name, axes = definition["name"], definition["axes"]
    if not knows(name):
        raise ValueError(
            f"the definition is {name!r}; the judge knows {_ROUTED}* and {_FROM_LOGITS.pattern}*"
        )
    function: Callable[..., Any] = api.trtllm_fp4_block_scale_moe
    local, _, packed = inputs["gemm2_weights"].shape
    given: dict[str, Any] = {"local_num_experts": local, "intermediate_size": packed * 2}
    given |= {n: axes[n]["value"] for n in _CONSTANTS if axes.get(n, {}).get("type") == "const"}
    if found := _FROM_LOGITS.match(name):
        given["routing_method_type"] = int(_METHODS[found[1]])
    else:
        function = api.trtllm_fp4_block_scale_routed_moe
    given |= {n: value for n, value in inputs.items() if value is not None}
    parameters = inspect.signature(function).parameters
    required = {n: None for n, p in parameters.items() if p.default is p.empty}
    call, _ = prepared(function)(**required | given)
    names = (
        "activations", "experts", "routing", "num_experts", "logits", "routing_bias", "ids", "weights",
        "local_expert_offset", "recipe", "build", "finalize_order", "output_dtype",
    )  # fmt: skip
    return MoECase(name, **{n: getattr(call, n) for n in names})
