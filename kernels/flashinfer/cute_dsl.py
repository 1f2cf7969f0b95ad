"""The adapter to FlashInfer's fused NVFP4 layer in CuTe-DSL: its function and its limits.

Its weights are a second copy, made by `reference.weights.cute_dsl.with_cute_dsl`. The finalize that adds
with atomics is not used.
"""

# SPDX-License-Identifier: Apache-2.0
from typing import Any

import torch

from ...reference.activation import ActivationType
from ...reference.recipe import LayerBuild
from ...reference.weights.experts import CuteDslWeights
from ..moe.call import MoECall
from .description import KEYWORD, Argument, Function
from .layer_rules import (
    COMMON,
    IN_ITS_LAYOUT,
    NO_LORA,
    NO_SHARED_EXPERTS,
    NOT_BATCH_INVARIANT,
    bits_of,
    four_over_six,
    four_over_six_of_environment,
    has_activation,
    routing_limit,
    slot_order,
    writes_bf16,
)
from .rules import SM100, Rule, first_reason, math_of, no_kernels_beside
from .version import SINCE_NEW

NAME = "flashinfer:cute-dsl"
BUILD: LayerBuild = "cute-dsl"


def _weights(r: MoECall) -> CuteDslWeights:
    assert r.experts.cute_dsl is not None
    return r.experts.cute_dsl


def _block_scales(r: MoECall) -> torch.Tensor:
    assert r.activations.block_scales is not None
    return r.activations.block_scales.view(torch.float8_e4m3fn)


def _base_scale_inv(r: MoECall) -> torch.Tensor:
    return torch.full((1,), r.recipe.base_scale_inv, dtype=torch.float32, device=r.device)


CUTE_DSL_FUSED_MOE = Function(
    "flashinfer.fused_moe",
    "cute_dsl_fused_moe",
    "fused_moe/cute_dsl/fused_moe.py:1504",
    (
        Argument("x", lambda r, *_: r.activations.hidden_states),
        Argument("x_sf", lambda r, *_: _block_scales(r)),
        Argument("token_selected_experts", lambda _, ids, __: ids),
        Argument("token_final_scales", lambda _, __, weights: weights.float()),
        Argument("w1_weight", lambda r, *_: _weights(r).w1_weight),
        Argument("w1_weight_sf", lambda r, *_: _weights(r).w1_weight_sf),
        Argument("w1_alpha", lambda r, *_: _weights(r).w1_alpha),
        Argument("fc2_input_scale", lambda r, *_: _base_scale_inv(r)),
        Argument("w2_weight", lambda r, *_: _weights(r).w2_weight),
        Argument("w2_weight_sf", lambda r, *_: _weights(r).w2_weight_sf),
        Argument("w2_alpha", lambda r, *_: _weights(r).w2_alpha),
        Argument("num_experts", lambda r, *_: r.num_experts),
        Argument("top_k", lambda _, ids, __: ids.shape[1]),
        Argument("num_local_experts", lambda r, *_: r.experts.num_local, None),
        Argument("local_expert_offset", lambda r, *_: r.local_expert_offset, 0),
        Argument("output_dtype", default=torch.bfloat16),
        Argument("use_fused_finalize", lambda *_: False, True),
        Argument("moe_output", default=None),
        Argument("aux_stream", default=None),
        Argument("enable_pdl", lambda r, *_: r.enable_pdl is not False, True),
        Argument(
            "activation_type",
            lambda r, *_: int(r.experts.activation),
            int(ActivationType.Swiglu),
        ),
        Argument("swiglu_alpha", default=1.0),
        Argument("swiglu_beta", default=0.0),
        Argument("swiglu_limit", default=torch.finfo(torch.float32).max),
        Argument("situ_beta", default=None),
        Argument("situ_linear_beta", default=None),
        Argument("quant_mode", lambda *_: "w4a4", "w4a4", kind=KEYWORD),
        Argument(
            "per_token_scale", lambda r, *_: r.activations.per_token_scale, None, kind=KEYWORD
        ),
        Argument("tactic", default=None, kind=KEYWORD),
        Argument("localized_weights", default=None, kind=KEYWORD),
        Argument("localized_streams", default=None, kind=KEYWORD),
        Argument("localized_sm_count", default=None, kind=KEYWORD),
        Argument("localized_memset_stream", default=None, kind=KEYWORD),
        Argument("localized_allow_nonlocalized", default=False, kind=KEYWORD),
        Argument("autotune_use_cuda_graph", default=False, kind=KEYWORD),
        four_over_six(KEYWORD),
        Argument("clamped_relu2_limit", default=None, versions=SINCE_NEW, kind=KEYWORD),
        Argument("swap_ab", default=False, versions=SINCE_NEW, kind=KEYWORD),
    ),
)
"""It is called with a call, and the ids [T, K] and weights [T, K] of its routing: it takes no logits."""


RULES: tuple[Rule[MoECall], ...] = (
    *COMMON,
    # On sm_107 per-token scales are not implemented.
    no_kernels_beside(SM100, "fused_moe/cute_dsl/fused_moe.py:1692"),
    Rule(
        lambda r: r.is_w4a16,
        "hidden_states are bf16; we call its kernels for NVFP4 codes alone",
        "fused_moe/cute_dsl/fused_moe.py:1703",
    ),
    # It then quantizes in the first GEMM, from a scale that ours has in the scalars.
    Rule(
        lambda r: r.is_static,
        "static scales: it wants the intermediate's apart from the scalars",
        "fused_moe/cute_dsl/fused_moe.py:640",
    ),
    has_activation("cute-dsl", "fused_moe/cute_dsl/moe_utils.py:54"),
    # Python numbers, which tensors on the GPU are not
    Rule(
        lambda r: any(
            t is not None
            for t in (r.experts.gemm1_alpha, r.experts.gemm1_beta, r.experts.gemm1_clamp_limit)
        ),
        "gemm1_alpha, beta or clamp_limit is one of each expert; it takes one physical number for all",
        "fused_moe/cute_dsl/fused_moe.py:1526",
    ),
    Rule(
        lambda r: r.experts.gemm1_bias is not None or r.experts.gemm2_bias is not None,
        "it has no biases",
        "fused_moe/cute_dsl/fused_moe.py:1504",
    ),
    NO_LORA,
    NO_SHARED_EXPERTS,
    Rule(
        lambda r: not r.do_finalize,
        "it has no do_finalize=False",
        "fused_moe/cute_dsl/fused_moe.py:1504",
    ),
    writes_bf16("fused_moe/cute_dsl/fused_moe.py:116"),
    bits_of(BUILD),
    math_of("cute-dsl", "quantization/kernels/nvfp4_quantize.py:3250"),
    four_over_six_of_environment("quantization/kernels/nvfp4_quantize.py:3250"),
    NOT_BATCH_INVARIANT,
    slot_order("fused_moe/cute_dsl/blackwell/moe_finalize.py:100"),
    routing_limit("fused_moe/cute_dsl/moe_utils.py:549"),
    IN_ITS_LAYOUT,
)
"""The rules of the layer, in the order in which they are asked."""


def refusal(r: MoECall) -> str | None:
    """Return why FlashInfer cannot serve the call; None if it can."""
    return first_reason(RULES, r)


def function(_: MoECall) -> Function:
    """Return the function that serves the call."""
    return CUTE_DSL_FUSED_MOE


def run(r: MoECall) -> list[torch.Tensor]:
    """Run the call, which `refusal` let pass, on FlashInfer."""
    output = CUTE_DSL_FUSED_MOE.run(r, *_routed(r))
    return r.placed(output[:, : r.experts.hidden_size])


def arguments(r: MoECall) -> dict[str, Any]:
    """Return the keyword arguments of `cute_dsl_fused_moe`."""
    return CUTE_DSL_FUSED_MOE.keywords(r, *_routed(r))


def _routed(r: MoECall) -> tuple[torch.Tensor, torch.Tensor]:
    return r.routed("triton" if r.device.type == "cuda" else "reference")
