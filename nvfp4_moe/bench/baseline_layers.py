"""FlashInfer's layers of BF16, FP8 and MXFP8, which quantize their hidden states in each call."""

# SPDX-License-Identifier: Apache-2.0
from collections.abc import Callable
from dataclasses import replace

import torch

from ..kernels.baseline_moe.backends import BASELINE_MOE
from ..kernels.baseline_moe.call import BaselineCall
from ..kernels.flashinfer import baseline_moe
from ..reference.moe import baseline_moe as reference
from ..reference.moe.baseline_moe import Format
from ..reference.moe.routing import Routing
from .bf16_weights import Weights
from .case import NotHere, WrongResult

FORMATS: dict[str, Format] = {name: format for format, name in baseline_moe.NAMES.items()}
"""The format of each layer, by its name."""
_CHECKED = 5
"""Tokens that are compared with the reference."""
_MOST_ERROR = 1e-1
"""The most that the norm may differ, as a share: a wrong layer differs by more than its norm."""


def prepare_call(
    name: str, w: Weights, x: torch.Tensor, logits: torch.Tensor, routing: Routing
) -> Callable[[], torch.Tensor]:
    """Make a call of a layer, from bf16 hidden states to bf16 output.

    Raises:
        NotHere: FlashInfer cannot serve it here, or the format has no such sizes.
        WrongResult: its first tokens are far from the reference's.
    """
    if w.w13_bias is not None:
        raise NotHere("FlashInfer's layers beside NVFP4 are measured without biases")
    format = FORMATS[name]
    raw = reference.BaselineExperts(format, w.activation, w.w13, w.w2)
    activations = reference.BaselineActivations(x)
    request = BaselineCall(activations, raw, {}, routing, logits.shape[1], logits=logits)
    if (reason := BASELINE_MOE.refusal(name, request)) is not None:
        raise NotHere(reason)
    amax = {"input_amax": 8.0, "intermediate_amax": 8.0} if format == "fp8 per tensor" else {}
    try:
        experts = reference.prepare_baseline(format, w.w13, w.w2, w.activation, **amax)
    except ValueError as error:
        raise NotHere(str(error)) from None
    weights = baseline_moe.flashinfer_weights(experts)
    request = replace(request, experts=experts, weights=weights)

    def call() -> torch.Tensor:
        quantized = replace(request, activations=baseline_moe.quantize(x, experts))
        return BASELINE_MOE.run(name, quantized)

    some = reference.quantize_for(x[:_CHECKED], experts)
    few = replace(request, activations=some, logits=logits[:_CHECKED])
    want = BASELINE_MOE.run("reference", few).double()
    difference = (call()[:_CHECKED].double() - want).norm()
    if not difference < _MOST_ERROR * want.norm():
        raise WrongResult(f"{name}: rows of norm {want.norm()} are wrong by {difference}")
    return call
