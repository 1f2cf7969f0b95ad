"""The error of each number format's layer against the bf16 layer, as the references compute both."""

# SPDX-License-Identifier: Apache-2.0
from typing import Any

import torch

from ..cases import inputs
from ..cases import moe as moe_cases
from ..cases.moe import TENSOR
from ..reference.activation import ActivationType
from ..reference.moe import layer as moe
from ..reference.moe.activations import Activations, quantize_activations
from ..reference.moe.baseline_moe import (
    FORMATS,
    Format,
    baseline_moe,
    prepare_baseline,
    quantize_for,
)
from ..reference.quantize import quantize_global_scale
from ..reference.recipe import Recipe
from ..reference.weights.experts import Experts
from ..reference.weights.prepare import prepare_experts

KIND = ActivationType.Swiglu


def format_errors() -> dict[str, dict[str, float]]:
    """The mean over tokens of each format's relative error against the bf16 layer in fp64.

    The error is taken for each token, because a token with an outlier has most of the total norm. The
    static scales of NVFP4 and of FP8 per tensor are calibrated on these very tokens.
    """
    x = inputs.activations()[TENSOR].bfloat16()
    w13, w2 = moe_cases.layer_weights(KIND, x.shape[1])
    ids, weights = moe_cases.choice(x.shape[0])
    expected, largest = moe_cases.exact_layer(x, w13, w2, ids, weights)
    maxima: dict[str, Any] = {"input_amax": x.abs().max().item(), "intermediate_amax": largest}
    experts = prepare_experts(w13, w2, KIND, **maxima)
    assert experts.input_scale is not None
    plain = prepare_experts(w13, w2, KIND)
    static = quantize_global_scale(x, experts.input_scale, Recipe())

    def error(output: torch.Tensor) -> float:
        return ((output - expected).norm(dim=1) / expected.norm(dim=1)).mean().item()

    def of_nvfp4(a: Activations, e: Experts) -> float:
        return error(moe.fused_moe(a, e, ids, weights).output)

    def of_baseline(format: Format) -> float:
        static = maxima if format == "fp8 per tensor" else {}
        e = prepare_baseline(format, w13, w2, KIND, **static)
        return error(baseline_moe(quantize_for(x, e), e, ids, weights).output)

    return {
        "NVFP4": {
            "bf16 (weights alone are quantized)": of_nvfp4(Activations(x), plain),
            "per token": of_nvfp4(quantize_activations(x, Recipe()), plain),
            "static, its scales from these very tokens": of_nvfp4(
                Activations(static.codes, static.block_scales), experts
            ),
        },
        "beside it": {
            "bf16 (its roundings)" if format == "bf16" else format: of_baseline(format)
            for format in FORMATS
        },
    }
