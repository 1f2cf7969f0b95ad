"""The adapter to FlashInfer's fused MoE in CuTe-DSL, with its capability table.

Its weights are a second copy, made by `reference.weights.cute_dsl.with_cute_dsl`. The finalize that adds
with atomics is not used. Sources, in flashinfer-python 0.7.2.post1: `fused_moe/cute_dsl/fused_moe.py`
(cfm), `fused_moe/cute_dsl/moe_utils.py`, `fused_moe/cute_dsl/blackwell/moe_finalize.py`.
"""

# SPDX-License-Identifier: Apache-2.0
from typing import Any

import torch

from ..moe_call import MoECall
from .trtllm import (
    COMMON,
    Rule,
    activation_rule,
    first_reason,
    four_over_six_rule,
    math_rule,
    slot_order_rule,
)

NAME = "flashinfer:cute-dsl"

RULES: tuple[Rule, ...] = (
    *COMMON,
    # cfm:1690; on sm_107 per-token scales are not implemented
    (
        lambda r: r.capability not in ((10, 0), (10, 3)),
        lambda r: f"sm_{r.capability[0]}{r.capability[1]} has no kernels; sm_100 and 103 have",  # type: ignore[index]
    ),
    # cfm:1703
    (lambda r: r.is_w4a16, "hidden_states are bf16; we call its kernels for NVFP4 codes alone"),
    # cfm:640-660: it then quantizes in the first GEMM, from a scale that ours has in the scalars
    (lambda r: r.is_static, "static scales: it wants the intermediate's apart from the scalars"),
    activation_rule("cute-dsl"),
    # cfm:1525: Python numbers, which tensors on the GPU are not
    (
        lambda r: any(
            t is not None
            for t in (r.experts.gemm1_alpha, r.experts.gemm1_beta, r.experts.gemm1_clamp_limit)
        ),
        "gemm1_alpha, beta or clamp_limit is one of each expert; it takes one physical number for all",
    ),
    (
        lambda r: r.experts.gemm1_bias is not None or r.experts.gemm2_bias is not None,
        "it has no biases",
    ),
    (lambda r: r.lora_delta is not None, "it has no gemm1_lora_delta"),
    (lambda r: r.shared_experts, "it has no shared experts"),
    (lambda r: not r.do_finalize, "it has no do_finalize=False"),
    # cfm:116: the intermediate has the output's dtype
    (
        lambda r: r.output_dtype != torch.bfloat16,
        lambda r: f"the output is {r.output_dtype}; its intermediate would be, too",
    ),
    (lambda r: r.build != "cute-dsl", 'its bits are those of build="cute-dsl"'),
    math_rule("cute-dsl"),
    four_over_six_rule,
    (lambda r: r.batch_invariant, "batch_invariant: its tiles depend on the batch"),
    slot_order_rule,  # moe_finalize.py:100-185
    # moe_sort
    (
        lambda r: r.num_experts > 2048 or r.routing.top_k > 32,
        "it has at most 2048 experts and top_k 32",
    ),
    (
        lambda r: r.experts.cute_dsl is None,
        "the experts are not in its layout: nvfp4_moe.with_cute_dsl(experts) holds them so, too",
    ),
)


def refusal(r: MoECall) -> str | None:
    """Why FlashInfer cannot serve the request; None if it can."""
    return first_reason(RULES, r)


def run(r: MoECall) -> list[torch.Tensor]:
    """Run the request, which `refusal` let pass, on FlashInfer."""
    from flashinfer.fused_moe import cute_dsl_fused_moe

    return r.returned(cute_dsl_fused_moe(**arguments(r))[:, : r.experts.hidden_size])


def arguments(r: MoECall) -> dict[str, Any]:
    """Keywords of `cute_dsl_fused_moe`, which takes no logits."""
    e, a, w = r.experts, r.activations, r.experts.cute_dsl
    assert w is not None and a.block_scales is not None
    ids, weights = r.routed("triton" if r.device.type == "cuda" else "reference")
    return {
        "x": a.hidden_states,
        "x_sf": a.block_scales.view(torch.float8_e4m3fn),
        "token_selected_experts": ids,
        "token_final_scales": weights.float(),
        "w1_weight": w.w1_weight,
        "w1_weight_sf": w.w1_weight_sf,
        "w1_alpha": w.w1_alpha,
        "fc2_input_scale": torch.full(
            (1,), r.recipe.base_scale_inv, dtype=torch.float32, device=r.device
        ),
        "w2_weight": w.w2_weight,
        "w2_weight_sf": w.w2_weight_sf,
        "w2_alpha": w.w2_alpha,
        "num_experts": r.num_experts,
        "top_k": ids.shape[1],
        "num_local_experts": e.num_local,
        "local_expert_offset": r.local_expert_offset,
        "use_fused_finalize": False,
        "enable_pdl": r.enable_pdl is not False,
        "activation_type": int(e.activation),
        "quant_mode": "w4a4",
        "per_token_scale": a.per_token_scale,
    }
