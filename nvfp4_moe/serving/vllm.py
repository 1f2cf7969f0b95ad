"""vLLM's NVFP4 experts of TRT-LLM on this library's backends.

`apply_modular` and `apply_monolithic` have the arguments of `TrtLlmNvFp4ExpertsModular.apply` and
`TrtLlmNvFp4ExpertsMonolithic.apply`, the experts first, and return what those do; `install` puts them
there. Written against vllm 0.33.0, `fused_moe/experts/trtllm_nvfp4_moe.py`, nothing of which is imported
before a call. Of the hidden states' quantization vLLM takes FlashInfer's default, the CUDA build.
"""

# SPDX-License-Identifier: Apache-2.0
from typing import Any

import torch

from ..kernels.backends import UnsupportedError
from ..reference.activation import by_name
from .fused import fused_experts_fp4, refuse_a_dropped_switch

VERSION = "0.33.0"
MODULE = "vllm.model_executor.layers.fused_moe.experts.trtllm_nvfp4_moe"
_ACTIVATIONS = {name: kind for (name, _), kind in by_name("vllm").items()}


def apply_modular(
    experts: Any,
    output: torch.Tensor,
    hidden_states: torch.Tensor,
    w1: torch.Tensor,
    w2: torch.Tensor,
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    activation: Any,
    global_num_experts: int,
    expert_map: torch.Tensor | None,
    a1q_scale: torch.Tensor | None,
    a2_scale: torch.Tensor | None,
    workspace13: torch.Tensor,
    workspace2: torch.Tensor,
    expert_tokens_meta: Any,
    apply_router_weight_on_input: bool,
) -> Any:
    """`TrtLlmNvFp4ExpertsModular.apply`: the routing is given, the result is written to `output`.

    Args:
        hidden_states: [T, H] bf16 where the experts quantize per token, else codes [T, H/2] with
            `a1q_scale` [T, H/16].
        expert_map, a2_scale, workspace13, workspace2, expert_tokens_meta: not read, as by vLLM's.

    Returns:
        None, or an `UnfinalizedMoEOutput` where the layer defers its finalize.

    Raises:
        UnsupportedError: the switch is on and vLLM serves this layer with static scales; router weights
            on the input; or an activation that vLLM's experts refuse.
    """
    if apply_router_weight_on_input:
        raise UnsupportedError(
            "apply_router_weight_on_input is True with the routing given; it is served with router "
            "logits (monolithic)"
        )
    tokens, most = hidden_states.shape[0], experts._get_chunk_size()
    ids = topk_ids.to(torch.int32).contiguous()
    weights = topk_weights.contiguous()
    deferred = (
        tokens <= most
        and experts.post_gemm2_hook is None
        and experts.moe_config.should_defer_moe_finalize(tokens)
    )
    for start in range(0, max(1, tokens), most):
        part = slice(start, start + most)
        count = len(ids[part])
        hooked = experts._uses_post_gemm2_hook(count)
        result = _run(
            experts,
            hidden_states[part],
            None if a1q_scale is None else a1q_scale[part],
            w1,
            w2,
            activation,
            global_num_experts,
            do_finalize=not (deferred or hooked),
            output=None if deferred or hooked else output[part],
            topk=(ids[part], weights[part]),
        )
        if deferred:
            return _unfinalized(experts, result, count)
        if hooked:
            experts._run_post_gemm2_hook(_unfinalized(experts, result, count), output[part])
    return None


def apply_monolithic(
    experts: Any,
    hidden_states: torch.Tensor,
    w1: torch.Tensor,
    w2: torch.Tensor,
    router_logits: torch.Tensor,
    activation: Any,
    global_num_experts: int,
    expert_map: torch.Tensor | None,
    a1q_scale: torch.Tensor | None,
    apply_router_weight_on_input: bool,
    num_expert_group: int | None = None,
    e_score_correction_bias: torch.Tensor | None = None,
    routed_scaling_factor: float | None = None,
    topk_group: int | None = None,
    routing_replay_out: torch.Tensor | None = None,
) -> Any:
    """`TrtLlmNvFp4ExpertsMonolithic.apply`: routing from logits; arguments as for `apply_modular`.

    Returns:
        [T, H] bf16, or an `UnfinalizedMoEOutput` where the layer defers its finalize.

    Raises:
        UnsupportedError: as `apply_modular`, but router weights on the input are served of bf16 hidden
            states with top_k 1; and `routing_replay_out`.
    """
    llama4 = 3  # the same number in vLLM and FlashInfer
    method = int(experts.routing_method_type)
    if method == llama4 and not apply_router_weight_on_input:
        raise UnsupportedError(
            f"apply_router_weight_on_input is False with routing method {llama4}, Llama4, whose router "
            "weights multiply the input"
        )
    if routing_replay_out is not None:
        raise UnsupportedError("routing_replay_out is not written here")
    tokens = hidden_states.shape[0]
    hooked = experts._uses_post_gemm2_hook(tokens)
    deferred = hooked or experts.moe_config.should_defer_moe_finalize(tokens)
    result = _run(
        experts,
        hidden_states,
        a1q_scale,
        w1,
        w2,
        activation,
        global_num_experts,
        do_finalize=not deferred,
        router_logits=router_logits,
        top_k=experts.topk,
        correction_bias=e_score_correction_bias,
        num_expert_group=num_expert_group,
        topk_group=topk_group,
        routed_scaling_factor=routed_scaling_factor,
        routing_method_type=method,
        router_weight_on_input=apply_router_weight_on_input,
    )
    if not deferred:
        return result[0]
    unfinalized = _unfinalized(experts, result, tokens)
    return experts._run_post_gemm2_hook(unfinalized) if hooked else unfinalized


def install() -> None:
    """Replace the two methods of vLLM's classes in this process.

    Made to be the entry point of a package in the group `vllm.general_plugins`, which every process of
    vLLM calls.
    """
    from vllm.model_executor.layers.fused_moe.experts import trtllm_nvfp4_moe as theirs

    theirs.TrtLlmNvFp4ExpertsModular.apply = apply_modular
    theirs.TrtLlmNvFp4ExpertsMonolithic.apply = apply_monolithic


def _run(
    experts: Any,
    hidden_states: torch.Tensor,
    block_scales: torch.Tensor | None,
    w1: torch.Tensor,
    w2: torch.Tensor,
    activation: Any,
    global_num_experts: int,
    **options: Any,
) -> list[torch.Tensor]:
    refuse_a_dropped_switch(experts.per_token_activation)
    if activation.value not in _ACTIVATIONS:
        raise UnsupportedError(
            f"activation is {activation.value!r}; it must be one of {', '.join(_ACTIVATIONS)}"
        )
    scales = experts.quant_config
    return fused_experts_fp4(
        hidden_states,
        block_scales,
        w13_weight=w1,
        w2_weight=w2,
        w13_weight_scale=scales.w1_scale,
        w2_weight_scale=scales.w2_scale,
        g1_scale_c=experts.g1_scale_c,
        g1_alphas=scales.g1_alphas,
        g2_alphas=scales.g2_alphas,
        w13_input_scale_quant=scales.a1_gscale,  # read of bf16 with static scales, which vLLM has not
        use_per_token_activation=experts.per_token_activation,
        num_experts=global_num_experts,
        local_expert_offset=experts.ep_rank * experts.local_num_experts,
        local_num_experts=experts.local_num_experts,
        intermediate_size=experts.intermediate_size_per_partition,
        activation_type=_ACTIVATIONS[activation.value],
        gemm1_alpha=experts.gemm1_alpha,
        gemm1_beta=experts.gemm1_beta,
        gemm1_clamp_limit=experts.gemm1_clamp_limit,
        quantizer_build="cuda",
        **options,
    )


def _unfinalized(experts: Any, result: list[torch.Tensor], tokens: int) -> Any:
    """Return vLLM's `UnfinalizedMoEOutput`."""
    from vllm.model_executor.layers.fused_moe.moe_output import convert_flashinfer_moe_output

    return convert_flashinfer_moe_output(
        result, do_finalize=False, num_tokens=tokens, top_k=experts.topk
    )
