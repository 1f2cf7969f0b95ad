"""Calls of FlashInfer's fused layers, and the definitions and solutions of their shape."""

# SPDX-License-Identifier: Apache-2.0
from pathlib import Path

import moe_cases
import torch
from moe_cases import Shape

import nvfp4_moe
from nvfp4_moe.__main__ import main

SHAPE = Shape(5, 256, 64, 8, 2)
GROUPS = {"routing_method_type": 2, "n_group": 4, "topk_group": 2, "routed_scaling_factor": 2.5}


def write_solutions(folder: Path) -> Path:
    """Write SHAPE's definitions and solutions by the command; return the folder."""
    assert main(["solutions", str(folder), "--shape", "256,64,8,2", "--groups", "4,2"]) == 0
    return folder


def call(shape=SHAPE, **changes):
    """A call of FlashInfer's function from logits."""
    case = moe_cases.make(shape)
    e, a = case.experts, case.activations
    names = (
        "gemm1_weights", "gemm1_weights_scale", "gemm1_bias", "gemm1_alpha", "gemm1_beta",
        "gemm1_clamp_limit", "gemm2_weights", "gemm2_weights_scale", "gemm2_bias",
        "output1_scale_scalar", "output1_scale_gate_scalar", "output2_scale_scalar",
    )  # fmt: skip
    assert a.block_scales is not None
    g = torch.Generator().manual_seed(3)
    given = {name: getattr(e, name) for name in names} | {
        "routing_logits": torch.randn(shape.tokens, shape.experts, generator=g),
        "routing_bias": None,
        "hidden_states": a.hidden_states,
        "hidden_states_scale": a.block_scales.view(torch.float8_e4m3fn),
        "per_token_scale": a.per_token_scale,
        "num_experts": shape.experts,
        "top_k": shape.top_k,
        "n_group": None,
        "topk_group": None,
        "intermediate_size": shape.intermediate,
        "local_expert_offset": 0,
        "local_num_experts": shape.experts,
        "routed_scaling_factor": None,
        "routing_method_type": 1,
    }
    return given | changes


def routed(shape=SHAPE, **changes):
    given = call(shape, **changes)
    del given["routing_logits"]
    return given


def ours(**given):
    return nvfp4_moe.trtllm_fp4_block_scale_moe(**given, backend="reference")
