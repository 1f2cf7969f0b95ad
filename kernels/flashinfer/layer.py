"""A fused NVFP4 layer of FlashInfer, as the table of backends takes it."""

# SPDX-License-Identifier: Apache-2.0
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from ...reference.recipe import LayerBuild
from ..moe.call import MoECall
from .description import Function
from .rules import Rule, first_reason


def nothing(call: MoECall) -> tuple[()]:
    """Return no values: the function is made from the call alone."""
    return ()


def routed(call: MoECall) -> tuple[torch.Tensor, torch.Tensor]:
    """Return ids and weights, for a layer that takes no logits."""
    return call.routed("triton" if call.device.type == "cuda" else "reference")


@dataclass(frozen=True)
class Layer:
    """One layer.

    Args:
        name: the name of the backend, such as "flashinfer:trtllm".
        build: the variant whose bits the layer has.
        rules: the calls that it refuses, in the order in which they are asked.
        function: returns the function that serves a call.
        run: runs a call that `refusal` let pass.
        beside: returns the values from which the arguments are made, besides the call.
        remembers: as `Backend` has it.
    """

    name: str
    build: LayerBuild
    rules: tuple[Rule[MoECall], ...]
    function: Callable[[MoECall], Function]
    run: Callable[[MoECall], list[torch.Tensor]]
    beside: Callable[[MoECall], tuple[Any, ...]] = nothing
    remembers: Callable[[MoECall, RuntimeError], bool] | None = None

    def refusal(self, call: MoECall) -> str | None:
        """Return why FlashInfer cannot serve the call, None if it can."""
        return first_reason(self.rules, call)

    def arguments(self, call: MoECall) -> dict[str, Any]:
        """Return the keyword arguments of the function that serves the call."""
        return self.function(call).keywords(call, *self.beside(call))
