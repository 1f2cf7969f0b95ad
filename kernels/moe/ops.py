"""`torch.library` ops of an implementation of the fused mixture of experts.

A compiler can call them and cannot look inside. The op's arguments are the fields of `KernelCall`, then
ids and weights.
"""

# SPDX-License-Identifier: Apache-2.0
from collections.abc import Callable

import torch

from ...reference.moe import layer as moe
from ...reference.moe.hidden_states import quantize_activations
from ...reference.moe.permute import permutation
from ...reference.weights.experts import Experts
from .. import op_schema
from ..op_schema import Flat
from .call import KernelCall, Observe, padded

Triple = tuple[torch.Tensor, torch.Tensor, torch.Tensor]

EXPERTS: dict[type, tuple[str, ...]] = {
    Experts: (
        "gemm1_weights", "gemm1_weights_scale", "gemm2_weights", "gemm2_weights_scale",
        "output1_scale_scalar", "output1_scale_gate_scalar", "output2_scale_scalar",
        "hidden_size", "intermediate_size", "activation", "gemm1_bias", "gemm2_bias",
        "gemm1_alpha", "gemm1_beta", "gemm1_clamp_limit",
    )
}  # fmt: skip
"""The fields of the experts that ops get."""
FLAT = Flat(KernelCall, EXPERTS)
"""The flat form in which a call crosses `torch.library`: only this knows the op's arguments."""
Implementation = Callable[[KernelCall, torch.Tensor, torch.Tensor], Triple]
"""It takes a call, ids and weights.

It returns the output [T, H] of `output_dtype`, rows [rows, padded H] bf16, and permuted [T * K] int32.

The first is empty without `do_finalize`, the others with it. With `quantize` the hidden states are bf16,
and quantized per token with `recipe` first.
"""


def register(name: str, implementation: Implementation) -> Implementation:
    """Register an implementation as the op `nvfp4_moe::{name}_fused_moe`, and return the op."""
    return op_schema.register(
        f"{name}_fused_moe",
        FLAT,
        implementation,
        lambda call, ids, weights: empty_results(call, *ids.shape),
        "(Tensor, Tensor, Tensor)",
        tensors="Tensor ids, Tensor weights",
    )


def empty_results(call: KernelCall, tokens: int, top_k: int) -> Triple:
    """Allocate the three results; those that `do_finalize` leaves out have no rows."""
    like, experts = call.activations.hidden_states, call.experts
    tokens, kept = (tokens, 0) if call.do_finalize else (0, tokens * top_k)
    output = like.new_empty((tokens, experts.hidden_size), dtype=call.output_dtype)
    rows = like.new_empty((kept, experts.padded_hidden_size), dtype=torch.bfloat16)
    return output, rows, like.new_empty(kept, dtype=torch.int32)


def reference(
    call: KernelCall, ids: torch.Tensor, weights: torch.Tensor, observe: Observe | None = None
) -> Triple:
    """Run the reference as an `Implementation`."""
    activations, experts, offset = padded(call).activations, call.experts, call.local_expert_offset
    if call.quantize:
        activations = quantize_activations(activations.hidden_states, call.recipe)
    result = moe.fused_moe(
        activations,
        experts,
        ids,
        weights,
        recipe=call.recipe,
        local_expert_offset=offset,
        finalize_order=call.finalize_order,
        output_dtype=call.output_dtype,
        keep_steps=observe is not None,
    )
    if observe is not None:
        observe(ids, result.steps["activated"].flatten(0, 1), None)
    output, rows, permuted = empty_results(call, *ids.shape)
    if call.do_finalize:
        return result.output, rows, permuted
    permuted = permutation(ids, experts.num_local, offset)
    here = permuted >= 0
    rows.zero_()
    rows[permuted[here].long(), : experts.hidden_size] = result.rows.flatten(0, 1)[here]
    return output, rows, permuted


REFERENCE = register("reference", reference)
