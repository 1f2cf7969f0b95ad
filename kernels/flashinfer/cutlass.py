"""The adapter to FlashInfer's fused MoE in cutlass, with its capability table: static scales alone.

Its weights are a second copy, made by `reference.weights.cutlass.with_cutlass`. The finalize that adds
with atomics is not used. Sources, in flashinfer-python 0.7.2.post1: `fused_moe/core.py:1277`,
`fused_moe/runners.py:2400`, `flashinfer_cutlass_fused_moe_binding.cu` (binding),
`cutlass_fused_moe_kernels.cuh` (kernels).
"""

# SPDX-License-Identifier: Apache-2.0
from typing import Any

import torch

from ...reference.activation import ActivationType
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

NAME = "flashinfer:cutlass"
_CAPABILITIES = ((10, 0), (10, 3), (10, 7), (11, 0), (12, 0), (12, 1))

RULES: tuple[Rule, ...] = (
    *COMMON,
    (lambda r: r.build != "cutlass", 'its bits are those of build="cutlass"'),
    # fused_moe/api.py, _CUTLASS_NVFP4_ARCHS
    (
        lambda r: r.capability not in _CAPABILITIES,
        lambda r: f"sm_{r.capability[0]}{r.capability[1]} has no kernels; sm_100 to 121 have",  # type: ignore[index]
    ),
    activation_rule("cutlass"),
    (lambda r: r.lora_delta is not None, "it has no gemm1_lora_delta"),
    (lambda r: r.shared_experts, "it has no shared experts"),
    # binding:160 has fp16, too; the intermediate would then have that dtype
    (
        lambda r: r.output_dtype != torch.bfloat16,
        lambda r: f"the output is {r.output_dtype}; its intermediate would be, too",
    ),
    math_rule("cuda"),
    four_over_six_rule,
    (lambda r: r.batch_invariant, "batch_invariant: its tiles depend on the batch"),
    slot_order_rule,  # kernels:1965
    # binding: a rank is one of ep_size equal ones
    (
        lambda r: (
            r.num_experts % r.experts.num_local or r.local_expert_offset % r.experts.num_local
        ),
        lambda r: (
            f"{r.num_experts} experts of which {r.experts.num_local} from {r.local_expert_offset} on "
            "are held here; it wants ranks of equal size"
        ),
    ),
)


def refusal(r: MoECall) -> str | None:
    """Why FlashInfer cannot serve the request; None if it can."""
    return first_reason(RULES, r)


def run(r: MoECall) -> list[torch.Tensor]:
    """Run the request, which `refusal` let pass, on FlashInfer."""
    from flashinfer.fused_moe import cutlass_fused_moe

    shape = r.tokens, r.experts.padded_hidden_size
    output = torch.empty(shape, dtype=torch.bfloat16, device=r.device)
    # It returns a list that begins with the output, and not the tensor that its annotation says.
    cutlass_fused_moe(**arguments(r), output=output)
    return r.returned(output[:, : r.experts.hidden_size])


def arguments(r: MoECall) -> dict[str, Any]:
    """Keywords of `cutlass_fused_moe`, which takes no logits."""
    e, a, w = r.experts, r.activations, r.experts.cutlass
    assert w is not None and a.block_scales is not None
    ids, weights = r.routed("triton" if r.device.type == "cuda" else "reference")
    # Without these it takes 4 and 25, where the contract has 1.
    ones = torch.ones_like(w.fc1_global) if e.activation == ActivationType.Situ else None
    return {
        "input": a.hidden_states,
        "token_selected_experts": ids,
        "token_final_scales": weights.float(),
        "fc1_expert_weights": w.fc1_expert_weights.view(torch.int64),
        "fc2_expert_weights": w.fc2_expert_weights.view(torch.int64),
        "output_dtype": torch.bfloat16,
        "quant_scales": [
            w.fc1_act_global,
            w.fc1_weight_block.view(torch.int32),
            w.fc1_global,
            w.fc2_act_global,
            w.fc2_weight_block.view(torch.int32),
            w.fc2_global,
        ],
        "input_sf": a.block_scales.view(torch.uint8),
        "swizzled_input_sf": False,
        "ep_size": r.num_experts // e.num_local,
        "ep_rank": r.local_expert_offset // e.num_local,
        "enable_pdl": r.enable_pdl,
        "activation_type": int(e.activation),
        "use_fused_finalize": False,
        "situ_beta": ones,
        "situ_linear_beta": ones,
    }
