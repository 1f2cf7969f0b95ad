"""The adapter to FlashInfer's fused MoE: the arguments of its functions from ours.

Source: flashinfer-python 0.7.2.post1, `fused_moe/core.py:6606` (the routed function).
"""

# SPDX-License-Identifier: Apache-2.0
from typing import Any

import torch

from ..reference.experts import Experts
from ..reference.moe import Activations


def routed_arguments(
    activations: Activations,
    experts: Experts,
    ids: torch.Tensor,
    weights: torch.Tensor,
    *,
    num_experts: int,
    local_expert_offset: int = 0,
    routing_method_type: int = 1,
    do_finalize: bool = True,
    output: torch.Tensor | None = None,
) -> dict[str, Any]:
    """Keywords of `trtllm_fp4_block_scale_routed_moe` but `hidden_states_scale_layout`.

    The routing crosses as a tuple of ids and weights: fp32 weights then arrive unrounded.
    """
    scales = activations.block_scales
    width = experts.padded_hidden_size
    return {
        "topk_ids": (ids, weights),
        "routing_bias": None,
        "hidden_states": activations.hidden_states,
        "hidden_states_scale": None if scales is None else scales.view(torch.float8_e4m3fn),
        "gemm1_weights": experts.gemm1_weights,
        "gemm1_weights_scale": experts.gemm1_weights_scale,
        "gemm1_bias": experts.gemm1_bias,
        "gemm1_alpha": experts.gemm1_alpha,
        "gemm1_beta": experts.gemm1_beta,
        "gemm1_clamp_limit": experts.gemm1_clamp_limit,
        "gemm2_weights": experts.gemm2_weights,
        "gemm2_weights_scale": experts.gemm2_weights_scale,
        "gemm2_bias": experts.gemm2_bias,
        "output1_scale_scalar": experts.output1_scale_scalar,
        "output1_scale_gate_scalar": experts.output1_scale_gate_scalar,
        "output2_scale_scalar": experts.output2_scale_scalar,
        "num_experts": num_experts,
        "top_k": ids.shape[1],
        "n_group": None,
        "topk_group": None,
        "intermediate_size": experts.padded_intermediate_size,
        "local_expert_offset": local_expert_offset,
        "local_num_experts": experts.num_local,
        "routed_scaling_factor": None,
        "routing_method_type": routing_method_type,
        "do_finalize": do_finalize,
        "activation_type": int(experts.activation),
        "per_token_scale": activations.per_token_scale,
        "output": output,
        "valid_hidden_size": experts.hidden_size if experts.hidden_size != width else None,
        "valid_intermediate_size": (
            experts.intermediate_size
            if experts.intermediate_size != experts.padded_intermediate_size
            else None
        ),
    }
