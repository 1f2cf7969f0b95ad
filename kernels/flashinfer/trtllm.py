"""The adapter to FlashInfer's fused NVFP4 layer of TensorRT-LLM: its two functions and their limits."""

# SPDX-License-Identifier: Apache-2.0

import torch

from ...reference.activation import ActivationType
from ...reference.moe.routing import RoutingMethodType
from ...reference.moe.routing import refusal as routing_refusal
from ...reference.recipe import LayerBuild, SfLayout
from ..moe.call import MoECall
from .description import WORKSPACE, Argument, Function
from .layer import Layer
from .layer_rules import (
    COMMON,
    NOT_BATCH_INVARIANT,
    bits_of,
    four_over_six,
    four_over_six_of_environment,
    has_activation,
    writes_bf16,
)
from .rules import SM10X, Rule, math_of, no_kernels_beside, whole_tiles
from .version import SINCE_NEW

NAME = "flashinfer:trtllm"
BUILD: LayerBuild = "cuda"


def _block_scales(r: MoECall) -> torch.Tensor | None:
    scales = r.activations.block_scales
    return None if scales is None else scales.view(torch.float8_e4m3fn)


def _unless_equal(valid: int, padded: int) -> int | None:
    return None if valid == padded else valid


_TENSORS = (
    Argument("routing_bias", lambda r: r.routing_bias),
    Argument("hidden_states", lambda r: r.activations.hidden_states),
    Argument("hidden_states_scale", _block_scales),
    Argument("gemm1_weights", lambda r: r.experts.gemm1_weights),
    Argument("gemm1_weights_scale", lambda r: r.experts.gemm1_weights_scale),
    Argument("gemm1_bias", lambda r: r.experts.gemm1_bias),
    Argument("gemm1_alpha", lambda r: r.experts.gemm1_alpha),
    Argument("gemm1_beta", lambda r: r.experts.gemm1_beta),
    Argument("gemm1_clamp_limit", lambda r: r.experts.gemm1_clamp_limit),
    Argument("gemm2_weights", lambda r: r.experts.gemm2_weights),
    Argument("gemm2_weights_scale", lambda r: r.experts.gemm2_weights_scale),
    Argument("gemm2_bias", lambda r: r.experts.gemm2_bias),
    Argument("output1_scale_scalar", lambda r: r.experts.output1_scale_scalar),
    Argument("output1_scale_gate_scalar", lambda r: r.experts.output1_scale_gate_scalar),
    Argument("output2_scale_scalar", lambda r: r.experts.output2_scale_scalar),
)
_NUMBERS = (
    Argument("num_experts", lambda r: r.num_experts),
    Argument("top_k", lambda r: r.routing.top_k),
    Argument("n_group", lambda r: r.routing.n_group),
    Argument("topk_group", lambda r: r.routing.topk_group),
    Argument("intermediate_size", lambda r: r.experts.padded_intermediate_size),
    Argument("local_expert_offset", lambda r: r.local_expert_offset),
    Argument("local_num_experts", lambda r: r.experts.num_local),
    Argument("routed_scaling_factor", lambda r: r.routing.routed_scaling_factor),
    Argument("routing_method_type", lambda r: int(r.routing.method), 0),
    Argument("do_finalize", lambda r: r.do_finalize, True),
    Argument("enable_pdl", lambda r: r.enable_pdl, None),
    Argument("activation_type", lambda r: int(r.experts.activation), int(ActivationType.Swiglu)),
    Argument("per_token_scale", lambda r: r.activations.per_token_scale, None),
    Argument("output", lambda r: r.output, None),
    Argument("tune_max_num_tokens", lambda r: r.tune_max_num_tokens, 8192),
)
_VALID_SIZES = (
    Argument(
        "valid_hidden_size",
        lambda r: _unless_equal(r.experts.hidden_size, r.experts.padded_hidden_size),
        None,
    ),
    Argument(
        "valid_intermediate_size",
        lambda r: _unless_equal(r.experts.intermediate_size, r.experts.padded_intermediate_size),
        None,
    ),
)
_SHARED_EXPERTS = Argument("num_fused_shared_experts", lambda r: r.shared_experts or None, None)
_LAYOUT = Argument("hidden_states_scale_layout", lambda _: SfLayout.layout_linear, None)

FROM_LOGITS = Function(
    "flashinfer.fused_moe",
    "trtllm_fp4_block_scale_moe",
    "fused_moe/core.py:6330",
    (
        Argument("routing_logits", lambda r: r.logits),
        *_TENSORS,
        *_NUMBERS,
        Argument("norm_topk_prob", lambda r: r.routing.norm_topk_prob, True),
        Argument("routing_replay_out", default=None),
        _SHARED_EXPERTS,
        *_VALID_SIZES,
        _LAYOUT,
        WORKSPACE,
        four_over_six(),
    ),
)
ROUTED = Function(
    "flashinfer.fused_moe",
    "trtllm_fp4_block_scale_routed_moe",
    "fused_moe/core.py:6606",
    (
        # A tuple of ids and weights: fp32 weights then arrive unrounded.
        Argument("topk_ids", lambda r: (r.ids, r.weights)),
        *_TENSORS,
        *_NUMBERS,
        Argument("gemm1_lora_delta", lambda r: r.lora_delta, None),
        *_VALID_SIZES,
        _SHARED_EXPERTS,
        _LAYOUT,
        WORKSPACE,
        four_over_six(),
        Argument("routing_metadata", default=None, versions=SINCE_NEW),
    ),
)


# The messages of its runners where no kernel was built for a shape:
# trtllm_batched_gemm_runner.cu:238 and :606, trtllm_fused_moe_runner.cu:667.
_NO_KERNEL = ("No kernel found", "No valid config found", "No compatible configs found")
_without_kernel: dict[tuple, str] = {}


def _remember_missing_kernel(r: MoECall, error: RuntimeError) -> bool:
    """Return True if `run` failed for lack of a kernel; the shape is then refused from now on."""
    message = str(error)
    if not any(text in message for text in _NO_KERNEL):
        return False
    _without_kernel[_shape(r)] = message.strip().splitlines()[0]
    return True


def _shape(r: MoECall) -> tuple:
    e = r.experts
    sizes = (e.padded_hidden_size, e.padded_intermediate_size, e.num_local, r.routing.top_k)
    return (*sizes, r.tokens, e.activation, r.is_static, r.capability)


def _routing_refusal(r: MoECall) -> str | None:
    return routing_refusal(r.routing, r.num_experts, r.routing_bias is not None)


RULES: tuple[Rule[MoECall], ...] = (
    *COMMON,
    # also trtllm_batched_gemm_runner.cu:216
    no_kernels_beside(SM10X, "trtllm_fused_moe_kernel_launcher.cu:1697"),
    Rule(
        lambda r: r.is_w4a16,
        "hidden_states are bf16; NVFP4 weights take NVFP4 codes",
        "trtllm_fused_moe_kernel_launcher.cu:5220",
    ),
    whole_tiles(lambda r: r.experts.padded_hidden_size),
    # 0.7.4 says so (`fused_moe/core.py:7160`) of kernels that 0.7.2 has, too. FP8's launchers check it.
    Rule(
        lambda r: r.experts.padded_intermediate_size % 128,
        "intermediate_size is {r.experts.padded_intermediate_size}, padded; it must be a multiple of "
        "128, the rows of a tile",
        "trtllm_fused_moe_kernel_launcher.cu:1861",
    ),
    has_activation("trtllm", "trtllm_fused_moe_runner.cu:114"),
    Rule(
        lambda r: r.experts.activation == ActivationType.Situ and r.capability == (10, 7),
        "activation Situ has no kernels on sm_107",
        "fused_moe/runners.py:5556",
    ),
    bits_of(BUILD),
    math_of("cuda", "trtllm_fused_moe_runner.cu:764"),
    four_over_six_of_environment("trtllm_fused_moe_runner.cu:764"),
    Rule(
        lambda r: r.is_static and r.recipe.four_over_six is not None,
        "static scales: its first GEMM quantizes the intermediate, without 4over6",
        "trtllm_fused_moe_runner.cu:740",
    ),
    writes_bf16("fused_moe/core.py:3558"),
    NOT_BATCH_INVARIANT,
    Rule(lambda r: r.finalize_order != "flashinfer", 'its order is finalize_order="flashinfer"'),
    Rule(
        lambda r: r.logits is not None and _routing_refusal(r),
        lambda r: _routing_refusal(r) or "",
        "trtllm/fused_moe/RoutingCustomPolicy.cuh:818",
    ),
    Rule(
        lambda r: r.logits is not None and r.routing.functions != "exact",
        "routing has functions={r.routing.functions!r}; it has those of its GPU, which are not known",
        "trtllm/fused_moe/RoutingKernel.cuh:128",
    ),
    # Its map of tiles holds global expert ids there, and local ones everywhere else.
    Rule(
        lambda r: (
            r.logits is not None
            and r.routing.method == RoutingMethodType.Llama4
            and r.tokens < 4
            and r.experts.num_local != r.num_experts
        ),
        "Llama4 for fewer than 4 tokens of which some experts are on other ranks reads the weights of "
        "wrong experts",
        "trtllm_backend/trtllm_fused_moe_routing_llama4.cu:234",
    ),
    Rule(
        lambda r: r.logits is None and (r.num_experts > 2048 or r.routing.top_k > 32),
        "given routing has at most 2048 experts and top_k 32",
        "trtllm_backend/trtllm_fused_moe_routing_common.cu:93",
    ),
    Rule(
        lambda r: _shape(r) in _without_kernel,
        lambda r: f"it had no kernel for this shape: {_without_kernel[_shape(r)]}",
        "trtllm_batched_gemm_runner.cu:238",
    ),
)
"""The rules of the layer, in the order in which they are asked."""

MAY_DROP_EQUAL_IDS = 16
"""Up to so many tokens its kernels for a given routing keep one slot of an expert and token."""
LEFT_OPEN: tuple[Rule[MoECall], ...] = (
    Rule(
        lambda r: r.logits is not None and r.routing.grouped,
        "where fewer than topk_group groups have a score above -inf it chooses experts several times; "
        "ours never does",
        "trtllm_backend/trtllm_fused_moe_routing_deepseek.cu:235",
    ),
    Rule(
        lambda r: r.logits is not None and r.routing.method.raw,
        "of a row with fewer than top_k logits above -inf, and NaN with its sign set among them, it may "
        "give ids that are no experts; ours gives experts",
        "trtllm/fused_moe/RoutingCustomPolicy.cuh:653",
    ),
    Rule(
        lambda r: r.logits is None and 0 < r.tokens <= MAY_DROP_EQUAL_IDS,
        f"up to {MAY_DROP_EQUAL_IDS} tokens it drops one of two equal ids of a token, by a race; ours "
        "adds both",
        "trtllm_backend/trtllm_fused_moe_routing_custom.cuh:167",
    ),
)
"""Values for which its routing kernels give what depends on a race, or no experts, as runs on an H200
showed. The call is served, since a refusal would have to read the values; ours are determined."""


def _function(r: MoECall) -> Function:
    """Return the function that serves the call: for a given routing, or for logits."""
    return ROUTED if r.logits is None else FROM_LOGITS


def _run(r: MoECall) -> list[torch.Tensor]:
    return list(_function(r).run(r))


LAYER = Layer(NAME, BUILD, RULES, _function, _run, remembers=_remember_missing_kernel)
