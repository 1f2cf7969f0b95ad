"""The adapter to FlashInfer's fused MoE kernels of TensorRT-LLM, with its capability table.

Sources, in flashinfer-python 0.7.2.post1: `fused_moe/core.py:6330` and `:6606` (the functions),
`trtllm_fused_moe_kernel_launcher.cu` (launcher), `trtllm_fused_moe_runner.cu` (runner.cu),
`trtllm_batched_gemm_runner.cu` (bgr.cu).
"""

# SPDX-License-Identifier: Apache-2.0
from collections.abc import Callable
from typing import Any

import torch

from ...reference.activation import ActivationType, FlashInferLayer
from ...reference.moe.layer import split_k_groups
from ...reference.moe.routing import refusal as routing_refusal
from ...reference.recipe import Build
from .. import environment
from ..moe_call import MoECall
from .quantize import INSTALLED, VERSION

NAME = "flashinfer:trtllm"
_CAPABILITIES = ((10, 0), (10, 3), (10, 7))

Rule = tuple[Callable[[MoECall], Any], str | Callable[[MoECall], str]]


def math_rule(build: Build) -> Rule:
    """Its kernels of this build quantize the intermediate as the environment says."""

    def reason(r: MoECall) -> str:
        return (
            f"it quantizes the intermediate as the environment says, {environment.math(build)}, not "
            f"{r.recipe.math}: {environment.how_to_get(r.recipe.math, build)}"
        )

    return lambda r: r.recipe.math != environment.math(build), reason


def activation_rule(layer: FlashInferLayer) -> Rule:
    """The layer has kernels for the activation: a column of `reference.activation`'s table."""
    return (
        lambda r: layer not in r.experts.activation.row.flashinfer,
        lambda r: f"activation {r.experts.activation.name} has no kernels",
    )


four_over_six_rule: Rule = (
    lambda r: r.recipe.four_over_six != environment.four_over_six(),
    lambda r: (
        f"nvfp4_4over6 is {r.recipe.four_over_six}; it reads FLASHINFER_NVFP4_4OVER6*, which say "
        f"{environment.four_over_six()}"
    ),
)


def _splits_its_sum(r: MoECall) -> bool:
    k, h = r.routing.top_k, r.experts.padded_hidden_size
    return r.finalize_order == "flashinfer" and split_k_groups(r.tokens, k, h) > 1


slot_order_rule: Rule = (_splits_its_sum, 'its order is finalize_order="slot"')
"""Of the layers other than TRT-LLM's."""


# What its runners say when no kernel was built for a shape: bgr.cu:238 and :606, runner.cu:667.
_NO_KERNEL = ("No kernel found", "No valid config found", "No compatible configs found")
_without_kernel: dict[tuple, str] = {}


def remember_missing_kernel(r: MoECall, error: RuntimeError) -> bool:
    """Whether `run` failed for want of a kernel; the shape is then refused from now on."""
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


COMMON: tuple[Rule, ...] = (
    (
        lambda r: not INSTALLED,
        "flashinfer-python is not installed (pip install 'nvfp4-moe[flashinfer]')",
    ),
    (lambda r: VERSION and VERSION < (0, 7), "flashinfer-python is older than 0.7"),
    (lambda r: torch.compiler.is_compiling(), "torch.compile cannot trace FlashInfer's Python"),
    (lambda r: r.capability is None, "hidden_states are on the CPU"),
    # bgr.cu:339; its launcher divides by the count
    (lambda r: r.tokens == 0, "there are no tokens"),
)
"""What no layer of FlashInfer's can do."""

RULES: tuple[Rule, ...] = (
    *COMMON,
    # launcher:1697, bgr.cu:216
    (
        lambda r: r.capability not in _CAPABILITIES,
        lambda r: f"sm_{r.capability[0]}{r.capability[1]} has no kernels; sm_100, 103, 107 have",  # type: ignore[index]
    ),
    # launcher:5220
    (lambda r: r.is_w4a16, "hidden_states are bf16; NVFP4 weights take NVFP4 codes"),
    activation_rule("trtllm"),
    # runners.py:5556
    (
        lambda r: r.experts.activation == ActivationType.Situ and r.capability == (10, 7),
        "activation Situ has no kernels on sm_107",
    ),
    (lambda r: r.build != "cuda", 'its bits are those of build="cuda"'),
    math_rule("cuda"),
    four_over_six_rule,  # runner.cu:764
    # core.py:3554
    (
        lambda r: r.output_dtype != torch.bfloat16,
        lambda r: f"the output is {r.output_dtype}; its kernels write bfloat16",
    ),
    (lambda r: r.batch_invariant, "batch_invariant: its tiles and its order depend on the batch"),
    (lambda r: r.finalize_order != "flashinfer", 'its order is finalize_order="flashinfer"'),
    # RoutingCustomPolicy.cuh:818-893, trtllm_fused_moe_routing_common.cu:93-110
    (
        lambda r: r.logits is not None and _routing_refusal(r),
        lambda r: _routing_refusal(r) or "",
    ),
    (
        lambda r: r.logits is None and (r.num_experts > 2048 or r.routing.top_k > 32),
        "given routing has at most 2048 experts and top_k 32",
    ),
    (
        lambda r: _shape(r) in _without_kernel,
        lambda r: f"it had no kernel for this shape: {_without_kernel[_shape(r)]}",
    ),
)


def refusal(r: MoECall) -> str | None:
    """Why FlashInfer cannot serve the request; None if it can."""
    return first_reason(RULES, r)


def first_reason(rules: tuple[Rule, ...], r: MoECall) -> str | None:
    """The reason of the first rule that refuses the request; None if none does."""
    for refused, reason in rules:
        if refused(r):
            return reason if isinstance(reason, str) else reason(r)
    return None


def run(r: MoECall) -> list[torch.Tensor]:
    """Run the request, which `refusal` let pass, on FlashInfer."""
    from flashinfer import SfLayout, fused_moe

    given = arguments(r) | {"hidden_states_scale_layout": SfLayout.layout_linear}
    if r.logits is None:
        return list(fused_moe.trtllm_fp4_block_scale_routed_moe(**given))
    return list(fused_moe.trtllm_fp4_block_scale_moe(**given))


def arguments(r: MoECall) -> dict[str, Any]:
    """Keywords of the routed function, or of the other where logits are given.

    All but `hidden_states_scale_layout`, whose type is FlashInfer's. A given routing crosses as a
    tuple of ids and weights: fp32 weights then arrive unrounded.
    """
    e, a, routing = r.experts, r.activations, r.routing
    scales = a.block_scales
    given: dict[str, Any] = {
        "routing_bias": r.routing_bias,
        "hidden_states": a.hidden_states,
        "hidden_states_scale": None if scales is None else scales.view(torch.float8_e4m3fn),
        "gemm1_weights": e.gemm1_weights,
        "gemm1_weights_scale": e.gemm1_weights_scale,
        "gemm1_bias": e.gemm1_bias,
        "gemm1_alpha": e.gemm1_alpha,
        "gemm1_beta": e.gemm1_beta,
        "gemm1_clamp_limit": e.gemm1_clamp_limit,
        "gemm2_weights": e.gemm2_weights,
        "gemm2_weights_scale": e.gemm2_weights_scale,
        "gemm2_bias": e.gemm2_bias,
        "output1_scale_scalar": e.output1_scale_scalar,
        "output1_scale_gate_scalar": e.output1_scale_gate_scalar,
        "output2_scale_scalar": e.output2_scale_scalar,
        "num_experts": r.num_experts,
        "top_k": routing.top_k,
        "n_group": routing.n_group,
        "topk_group": routing.topk_group,
        "intermediate_size": e.padded_intermediate_size,
        "local_expert_offset": r.local_expert_offset,
        "local_num_experts": e.num_local,
        "routed_scaling_factor": routing.routed_scaling_factor,
        "routing_method_type": int(routing.method),
        "do_finalize": r.do_finalize,
        "enable_pdl": r.enable_pdl,
        "activation_type": int(e.activation),
        "per_token_scale": a.per_token_scale,
        "output": r.output,
        "tune_max_num_tokens": r.tune_max_num_tokens,
        "num_fused_shared_experts": r.shared_experts or None,
        "valid_hidden_size": _if_not(e.hidden_size, e.padded_hidden_size),
        "valid_intermediate_size": _if_not(e.intermediate_size, e.padded_intermediate_size),
    }
    if r.logits is None:
        return {"topk_ids": (r.ids, r.weights), "gemm1_lora_delta": r.lora_delta} | given
    return {"routing_logits": r.logits, "norm_topk_prob": routing.norm_topk_prob} | given


def _if_not(valid: int, padded: int) -> int | None:
    return None if valid == padded else valid
