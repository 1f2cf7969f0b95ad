"""The fused experts of a serving stack, from its tensors: quantize the hidden states, then the call.

Names are SGLang's (0.5.23, `moe_runner/flashinfer_trtllm.py`).
"""

# SPDX-License-Identifier: Apache-2.0
from typing import Any

import torch

from ..kernels import environment
from ..kernels.backends import UnsupportedError
from ..kernels.moe.api import trtllm_fp4_block_scale_moe, trtllm_fp4_block_scale_routed_moe
from ..kernels.moe.backends import MoEBackend
from ..kernels.moe.call import routing_of
from ..kernels.moe.weight_on_input import weigh_rows
from ..kernels.quantize.api import nvfp4_quantize
from ..reference import checks
from ..reference.moe.routing import Routing, unpack_topk
from ..reference.recipe import Build, Recipe, SfLayout


def fused_experts_fp4(
    hidden_states: torch.Tensor,
    hidden_states_scale: torch.Tensor | None = None,
    per_token_scale: torch.Tensor | None = None,
    *,
    w13_weight: torch.Tensor,
    w2_weight: torch.Tensor,
    w13_weight_scale: torch.Tensor,
    w2_weight_scale: torch.Tensor,
    g1_scale_c: torch.Tensor,
    g1_alphas: torch.Tensor,
    g2_alphas: torch.Tensor,
    w13_input_scale_quant: torch.Tensor,
    use_per_token_activation: bool,
    num_experts: int,
    local_expert_offset: int,
    local_num_experts: int,
    intermediate_size: int,
    activation_type: int,
    topk: torch.Tensor | tuple[torch.Tensor, torch.Tensor] | None = None,
    router_logits: torch.Tensor | None = None,
    top_k: int | None = None,
    correction_bias: torch.Tensor | None = None,
    num_expert_group: int | None = None,
    topk_group: int | None = None,
    routed_scaling_factor: float | None = None,
    routing_method_type: int = 0,
    gemm1_alpha: torch.Tensor | None = None,
    gemm1_beta: torch.Tensor | None = None,
    gemm1_clamp_limit: torch.Tensor | None = None,
    router_weight_on_input: bool = False,
    do_finalize: bool = True,
    enable_pdl: bool | None = None,
    output: torch.Tensor | None = None,
    quantizer_build: Build = "cute-dsl",
    backend: MoEBackend | str = "auto",
) -> list[torch.Tensor]:
    """Quantize the hidden states as SGLang does, and run the experts.

    Per token: linear block scales, base scale 1 / (448 * 6), or 1 / (256 * 6) where the environment's
    4over6 says so. Static: encode scale `w13_input_scale_quant`. T may be 0.

    Args:
        hidden_states: [T, H] bf16 or fp16, or uint8 codes [T, H/2] with `hidden_states_scale` [T, H/16]
            and, per token, `per_token_scale` [T] fp32.
        w13_weight ... w2_weight_scale: in FlashInfer's TRT-LLM layout, scales as e4m3 or bytes.
        g1_scale_c, g1_alphas, g2_alphas: [E] fp32, and w13_input_scale_quant, one fp32:
            `serving_scales` has them.
        topk: the routing, packed int32 [T, K] or (ids, weights); without it `router_logits` [T, E] and
            the keywords after it.
        router_weight_on_input: the weights multiply the rows, before these are quantized, in place of
            the results; top_k is 1.
        quantizer_build: of the hidden states' quantization: SGLang's is CuTe-DSL's.
        The rest: as for `trtllm_fp4_block_scale_moe`.

    Returns:
        What `trtllm_fp4_block_scale_moe` returns: [output], or three tensors without `do_finalize`.

    Raises:
        ValueError: codes without the scales that `use_per_token_activation` asks for, or with others;
            no routing, or two; and what `trtllm_fp4_block_scale_moe` raises.
        UnsupportedError: router weights on the input, and codes or another top_k than 1.
    """
    if (topk is None) == (router_logits is None):
        raise ValueError("one of topk and router_logits must be given, and not both")
    if router_logits is not None and top_k is None:
        raise ValueError("top_k is None; it must be given with router_logits")
    if router_weight_on_input:
        routing = None
        if router_logits is not None and top_k is not None:
            routing = routing_of(
                routing_method_type, top_k, num_expert_group, topk_group, routed_scaling_factor
            )
        hidden_states, topk = _weighed(hidden_states, topk, router_logits, routing, correction_bias)
    for name, scales in (
        ("w13_weight_scale", w13_weight_scale),
        ("w2_weight_scale", w2_weight_scale),
    ):
        checks.tensor(name, scales, (torch.float8_e4m3fn, torch.uint8))
    codes = _codes(
        hidden_states,
        hidden_states_scale,
        per_token_scale,
        w13_input_scale_quant,
        use_per_token_activation,
        quantizer_build,
    )
    common: dict[str, Any] = {
        "hidden_states": codes[0],
        "hidden_states_scale": codes[1],
        "per_token_scale": codes[2],
        "gemm1_weights": w13_weight,
        "gemm1_weights_scale": w13_weight_scale.view(torch.float8_e4m3fn),
        "gemm1_bias": None,
        "gemm1_alpha": gemm1_alpha,
        "gemm1_beta": gemm1_beta,
        "gemm1_clamp_limit": gemm1_clamp_limit,
        "gemm2_weights": w2_weight,
        "gemm2_weights_scale": w2_weight_scale.view(torch.float8_e4m3fn),
        "gemm2_bias": None,
        "output1_scale_scalar": g1_scale_c,
        "output1_scale_gate_scalar": g1_alphas,
        "output2_scale_scalar": g2_alphas,
        "num_experts": num_experts,
        "intermediate_size": intermediate_size,
        "local_expert_offset": local_expert_offset,
        "local_num_experts": local_num_experts,
        "do_finalize": do_finalize,
        "enable_pdl": enable_pdl,
        "activation_type": activation_type,
        "output": output,
        "tune_max_num_tokens": 1 << max(0, len(hidden_states) - 1).bit_length(),
        "backend": backend,
    }
    if topk is not None:
        ids, weights = topk if isinstance(topk, tuple) else (topk, None)
        result = trtllm_fp4_block_scale_routed_moe(
            topk,
            None,
            top_k=ids.shape[1],
            n_group=0,
            topk_group=0,
            routed_scaling_factor=None,
            routing_method_type=1,
            **common,
        )
        if weights is not None and not do_finalize:
            result[1] = weights  # not rounded: FlashInfer's have the caller's dtype too
        return result
    assert router_logits is not None and top_k is not None, "checked above"
    return trtllm_fp4_block_scale_moe(
        router_logits,
        correction_bias,
        top_k=top_k,
        n_group=num_expert_group,
        topk_group=topk_group,
        routed_scaling_factor=routed_scaling_factor,
        routing_method_type=routing_method_type,
        **common,
    )


def _weighed(
    x: torch.Tensor,
    topk: torch.Tensor | tuple[torch.Tensor, torch.Tensor] | None,
    logits: torch.Tensor | None,
    routing: Routing | None,
    bias: torch.Tensor | None,
) -> tuple[torch.Tensor, tuple[torch.Tensor, torch.Tensor]]:
    """Return hidden states times the router's weights, and the remaining routing."""
    if x.dtype == torch.uint8:
        raise UnsupportedError(
            "router_weight_on_input needs hidden states in bf16: codes were quantized before the "
            "weights could multiply the rows"
        )
    given: tuple[torch.Tensor, Routing] | tuple[torch.Tensor, torch.Tensor]
    if logits is not None and routing is not None:
        given = logits, routing
    else:
        assert topk is not None, "checked before"
        given = topk if isinstance(topk, tuple) else unpack_topk(topk)
    try:
        return weigh_rows(x, given, bias)
    except ValueError as e:
        raise UnsupportedError(str(e)) from None


def refuse_a_dropped_switch(per_token: bool) -> None:
    """Raise where the switch is on, and a server runs a layer with static scales all the same."""
    if environment.per_token_activation() and not per_token:
        raise UnsupportedError(
            f"{' or '.join(environment.SWITCH_VARIABLES)} asks for per-token activations; the server "
            "has made this layer with static activation scales (nvfp4_moe.serving.activation_of says "
            "which of its quantizations have others)"
        )


def _codes(
    x: torch.Tensor,
    scale: torch.Tensor | None,
    per_token_scale: torch.Tensor | None,
    encode_scale: torch.Tensor,
    per_token: bool,
    build: Build,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Return codes, linear block scales and token scales."""
    if x.dtype == torch.uint8:
        if scale is None or (per_token_scale is None) == per_token:
            wanted = "and per_token_scale" if per_token else "and no per_token_scale"
            raise ValueError(
                "hidden_states are codes; with use_per_token_activation "
                f"{per_token} they need hidden_states_scale {wanted}"
            )
        return x, scale.view(torch.float8_e4m3fn), per_token_scale
    if scale is not None or per_token_scale is not None:
        raise ValueError(
            f"hidden_states are {x.dtype}; hidden_states_scale and per_token_scale belong to uint8 "
            "codes"
        )
    config = environment.four_over_six()
    global_scale: float | torch.Tensor = encode_scale
    if per_token:
        global_scale = Recipe(four_over_six=config).base_scale_inv
    else:
        checks.tensor("w13_input_scale_quant", encode_scale, (torch.float32,))
        if encode_scale.numel() != 1:
            checks.wrong_value("w13_input_scale_quant", encode_scale, "a tensor of one float32")
    codes, block_scales, *token = nvfp4_quantize(
        x,
        global_scale,
        SfLayout.layout_linear,
        per_token_activation=per_token,
        nvfp4_4over6=config,
        build=build,
    )
    return codes, block_scales.view(torch.float8_e4m3fn), token[0] if token else None
