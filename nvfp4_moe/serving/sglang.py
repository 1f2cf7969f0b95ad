"""SGLang's fused experts on this library's backends: a drop-in for its TRT-LLM NVFP4 function.

`fused_experts_none_to_flashinfer_trtllm_fp4` takes SGLang's own objects, by the names of their
attributes, and gives back what SGLang's does; `install` puts it in SGLang's place. Written against
sglang 0.5.23, `srt/layers/moe/moe_runner/flashinfer_trtllm.py:1341-1666`, nothing of which is imported
before a call. `fused.fused_experts_fp4` has the same tensors as plain arguments.
"""

# SPDX-License-Identifier: Apache-2.0
from typing import Any

import torch

from ..kernels.backends import UnsupportedError
from ..reference.activation import ActivationType, by_name
from .fused import fused_experts_fp4, refuse_a_dropped_switch

VERSION = "0.5.23"
MODULE = "sglang.srt.layers.moe.moe_runner.flashinfer_trtllm"
_ACTIVATIONS = by_name("sglang")


def fused_experts_none_to_flashinfer_trtllm_fp4(
    dispatch_output: Any,
    quant_info: Any,
    runner_config: Any,
    use_routed_topk: bool = False,
) -> Any:
    """SGLang's function of that name, on this library's backends.

    Args:
        dispatch_output: `StandardDispatchOutput` or `FlashinferDispatchOutput`.
        quant_info: `FlashInferTrtllmFp4MoeQuantInfo`.
        runner_config: `MoeRunnerConfig`.
        use_routed_topk: take the routing as it is given; logits are refused.

    Returns:
        SGLang's `StandardCombineInput`.

    Raises:
        UnsupportedError: the switch is on and SGLang serves this layer with static scales; or an
            activation, a routing or padded weights that SGLang refuses too.
    """
    from sglang.srt.layers.moe.moe_runner import flashinfer_trtllm as theirs
    from sglang.srt.layers.moe.token_dispatcher.standard import StandardCombineInput

    refuse_a_dropped_switch(quant_info.use_per_token_activation)
    x, scale = dispatch_output.hidden_states, dispatch_output.hidden_states_scale
    tokens, width = x.shape[0], x.shape[1] * (1 if scale is None else 2)
    padding = 0 if quant_info.padded_hidden_size is None else quant_info.padded_hidden_size - width
    if padding:
        if scale is not None:
            raise UnsupportedError("padded_hidden_size is set; it needs hidden states in bf16")
        x = torch.nn.functional.pad(x, (0, padding))
    deferred = theirs.is_deferred_finalize_enabled() and not padding
    dtype = x.dtype if scale is None else torch.bfloat16
    routing = _routing(dispatch_output.topk_output, quant_info, runner_config, use_routed_topk)

    def buffer(columns: int, symmetric: bool) -> torch.Tensor:
        return theirs._get_fp4_moe_output_buffer(tokens, columns, dtype, x.device, symmetric)

    result = fused_experts_fp4(
        x,
        scale,
        w13_weight=quant_info.w13_weight,
        w2_weight=quant_info.w2_weight,
        w13_weight_scale=quant_info.w13_weight_scale,
        w2_weight_scale=quant_info.w2_weight_scale,
        g1_scale_c=quant_info.g1_scale_c,
        g1_alphas=quant_info.g1_alphas,
        g2_alphas=quant_info.g2_alphas,
        w13_input_scale_quant=quant_info.w13_input_scale_quant,
        use_per_token_activation=quant_info.use_per_token_activation,
        num_experts=quant_info.global_num_experts,
        local_expert_offset=quant_info.local_expert_offset,
        local_num_experts=quant_info.local_num_experts,
        intermediate_size=quant_info.intermediate_size_per_partition,
        activation_type=_activation_type(runner_config),
        gemm1_alpha=quant_info.gemm1_alpha,
        gemm1_beta=quant_info.gemm1_beta,
        gemm1_clamp_limit=quant_info.gemm1_clamp_limit,
        router_weight_on_input=getattr(runner_config, "apply_router_weight_on_input", False),
        do_finalize=not deferred,
        enable_pdl=theirs.trtllm_moe_enable_pdl(tokens),
        output=None if deferred else buffer(width + padding, not padding),
        **routing,
    )
    if deferred:
        rows, weights, permuted = result
        return StandardCombineInput(
            theirs.FlashInferTrtllmDeferredFinalizeOutput(rows, weights, permuted, weights.shape[1])
        )
    if not padding:
        return StandardCombineInput(result[0])
    return StandardCombineInput(buffer(width, True).copy_(result[0][:, :width]))


def install() -> None:
    """Register the drop-in with SGLang's plugins: every later MoE layer of TRT-LLM NVFP4 runs it.

    Made to be the entry point of a package in the group `sglang.srt.plugins`, which every process of
    SGLang calls. SGLang logs a plugin that fails, and goes on without it.
    """
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    ours = fused_experts_none_to_flashinfer_trtllm_fp4
    HookRegistry.register(f"{MODULE}.{ours.__name__}", ours, HookType.REPLACE)


def _activation_type(runner_config: Any) -> ActivationType:
    key = runner_config.activation, bool(runner_config.is_gated)
    if key not in _ACTIVATIONS:
        known = ", ".join(f"{name}{' gated' if gated else ''}" for name, gated in _ACTIVATIONS)
        raise UnsupportedError(
            f"activation is {key[0]!r}, is_gated {key[1]}; it must be one of {known}"
        )
    return _ACTIVATIONS[key]


def _routing(topk: Any, quant_info: Any, runner_config: Any, routed: bool) -> dict[str, Any]:
    """Return the keywords of `fused_experts_fp4` for one of SGLang's forms of a routing."""
    form = topk.format.name
    if form == "PACKED":
        return {"topk": topk.packed_topk_ids}
    if form == "STANDARD":
        return {"topk": (topk.topk_ids.contiguous(), topk.topk_weights.contiguous())}
    if form != "BYPASSED" or routed:
        allowed = "STANDARD or PACKED" if routed else "STANDARD, PACKED or BYPASSED"
        raise UnsupportedError(f"topk_output is {form}; it must be {allowed}")
    config, method = topk.topk_config, quant_info.routing_method_type
    return {
        "router_logits": topk.router_logits,
        "top_k": config.top_k,
        "correction_bias": config.correction_bias,
        "num_expert_group": config.num_expert_group,
        "topk_group": config.topk_group,
        "routed_scaling_factor": runner_config.routed_scaling_factor,
        "routing_method_type": 0 if method is None else int(method),
    }
