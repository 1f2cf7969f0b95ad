"""The adapter to FlashInfer's fused NVFP4 layer in CUTLASS: its function and its limits.

It has static scales alone. Its weights are a second copy, made by
`reference.weights.cutlass.with_cutlass`. The finalize that adds with atomics is not used.
"""

# SPDX-License-Identifier: Apache-2.0
from typing import Any

import torch

from ...reference.activation import ActivationType
from ...reference.recipe import LayerBuild
from ...reference.weights.experts import CutlassWeights
from ..moe.call import MoECall
from .description import KEYWORD, OMITTED, Argument, Function, OfType
from .layer_rules import (
    COMMON,
    NO_LORA,
    NO_SHARED_EXPERTS,
    NOT_BATCH_INVARIANT,
    bits_of,
    four_over_six_of_environment,
    has_activation,
    slot_order,
    writes_bf16,
)
from .rules import BLACKWELL, Rule, first_reason, math_of, no_kernels_beside
from .version import SINCE_NEW, UNTIL_NEW

NAME = "flashinfer:cutlass"
BUILD: LayerBuild = "cutlass"


def _weights(r: MoECall) -> CutlassWeights:
    assert r.experts.cutlass is not None
    return r.experts.cutlass


def _input_scales(r: MoECall) -> torch.Tensor:
    assert r.activations.block_scales is not None
    return r.activations.block_scales.view(torch.uint8)


def _quant_scales(r: MoECall) -> list[torch.Tensor]:
    w = _weights(r)
    return [
        w.fc1_act_global,
        w.fc1_weight_block.view(torch.int32),
        w.fc1_global,
        w.fc2_act_global,
        w.fc2_weight_block.view(torch.int32),
        w.fc2_global,
    ]


def _situ_ones(r: MoECall) -> torch.Tensor | None:
    """The constants of SiTU, 1 in the contract; without the argument it takes 4 and 25."""
    is_situ = r.experts.activation == ActivationType.Situ
    return torch.ones_like(_weights(r).fc1_global) if is_situ else None


def _new_output(r: MoECall) -> torch.Tensor:
    shape = r.tokens, r.experts.padded_hidden_size
    return torch.empty(shape, dtype=torch.bfloat16, device=r.device)


CUTLASS_FUSED_MOE = Function(
    "flashinfer.fused_moe",
    "cutlass_fused_moe",
    "fused_moe/core.py:1277",
    (
        Argument("input", lambda r, *_: r.activations.hidden_states),
        Argument("token_selected_experts", lambda _, ids, *__: ids),
        Argument("token_final_scales", lambda _, __, weights, *___: weights.float()),
        Argument(
            "fc1_expert_weights", lambda r, *_: _weights(r).fc1_expert_weights.view(torch.int64)
        ),
        Argument(
            "fc2_expert_weights", lambda r, *_: _weights(r).fc2_expert_weights.view(torch.int64)
        ),
        Argument("output_dtype", lambda *_: torch.bfloat16),
        Argument("quant_scales", lambda r, *_: _quant_scales(r)),
        Argument("fc1_expert_biases", default=None),
        Argument("fc2_expert_biases", default=None),
        Argument("input_sf", lambda r, *_: _input_scales(r), None),
        Argument("swiglu_alpha", default=None),
        Argument("swiglu_beta", default=None),
        Argument("swiglu_limit", default=None),
        Argument("tp_size", default=1),
        Argument("tp_rank", default=0),
        Argument("ep_size", lambda r, *_: r.num_experts // r.experts.num_local, 1),
        Argument("ep_rank", lambda r, *_: r.local_expert_offset // r.experts.num_local, 0),
        Argument("cluster_size", default=1),
        Argument("cluster_rank", default=0),
        Argument("output", lambda _, __, ___, output: output, None),
        Argument("enable_alltoall", default=False),
        Argument("use_deepseek_fp8_block_scale", default=False),
        Argument("use_w4_group_scaling", default=False),
        Argument("use_mxfp8_act_scaling", default=False),
        Argument("min_latency_mode", default=False),
        Argument("use_packed_weights", default=False),
        Argument("use_wfp4afp8_humming", default=False),
        Argument("tune_max_num_tokens", default=8192),
        Argument("enable_pdl", lambda r, *_: r.enable_pdl, None),
        Argument(
            "activation_type",
            lambda r, *_: int(r.experts.activation),
            int(ActivationType.Swiglu),
        ),
        Argument("swizzled_input_sf", lambda *_: False, True),
        Argument("use_fused_finalize", lambda *_: False, True, UNTIL_NEW),
        Argument("use_fused_finalize", lambda *_: False, None, SINCE_NEW),
        Argument("profile_ids", default=None),
        Argument("workspace_buffer", default=None),
        Argument("clamped_relu2_limit", default=None, kind=KEYWORD),
        Argument("situ_beta", lambda r, *_: _situ_ones(r), None, kind=KEYWORD),
        Argument("situ_linear_beta", lambda r, *_: _situ_ones(r), None, kind=KEYWORD),
        Argument("backend", default="cutlass", kind=KEYWORD),
        # Its quantizer has 4over6 with static scales, too.
        Argument(
            "nvfp4_4over6",
            lambda r, *_: r.recipe.four_over_six,
            OfType("_UnsetType"),
            SINCE_NEW,
            KEYWORD,
        ),
    ),
)
"""It is called with a call, the ids [T, K] and weights [T, K] of its routing, and an output [T, H]."""

RULES: tuple[Rule[MoECall], ...] = (
    *COMMON,
    bits_of(BUILD),
    no_kernels_beside(BLACKWELL, "fused_moe/api.py:543"),
    has_activation("cutlass", "cutlass_backend/cutlass_fused_moe_kernels.cuh:2731"),
    NO_LORA,
    NO_SHARED_EXPERTS,
    # It has fp16, too, and the intermediate would then have that dtype.
    writes_bf16("cutlass_backend/flashinfer_cutlass_fused_moe_binding.cu:160"),
    math_of("cuda", "cpp/common/envUtils.cpp:365"),
    four_over_six_of_environment("cpp/common/envUtils.cpp:365"),
    NOT_BATCH_INVARIANT,
    slot_order("cutlass_backend/cutlass_fused_moe_kernels.cuh:1965"),
    # A rank is one of ep_size equal ones.
    Rule(
        lambda r: (
            r.num_experts % r.experts.num_local or r.local_expert_offset % r.experts.num_local
        ),
        "{r.num_experts} experts of which {r.experts.num_local} from {r.local_expert_offset} on are "
        "local; it needs ranks of equal size",
        "cutlass_backend/flashinfer_cutlass_fused_moe_binding.cu:441",
    ),
)
"""The rules of the layer, in the order in which they are asked."""


def refusal(r: MoECall) -> str | None:
    """Return why FlashInfer cannot serve the call; None if it can."""
    return first_reason(RULES, r)


def function(_: MoECall) -> Function:
    """Return the function that serves the call."""
    return CUTLASS_FUSED_MOE


def run(r: MoECall) -> list[torch.Tensor]:
    """Run the call, which `refusal` let pass, on FlashInfer."""
    # It returns a list that begins with the output, and not the tensor that its annotation says.
    output = _new_output(r)
    CUTLASS_FUSED_MOE.run(r, *_routed(r), output)
    return r.placed(output[:, : r.experts.hidden_size])


def arguments(r: MoECall) -> dict[str, Any]:
    """Return the keyword arguments of `cutlass_fused_moe` without `output`, which it then allocates."""
    return CUTLASS_FUSED_MOE.keywords(r, *_routed(r), OMITTED)


def _routed(r: MoECall) -> tuple[torch.Tensor, torch.Tensor]:
    return r.routed("triton" if r.device.type == "cuda" else "reference")
