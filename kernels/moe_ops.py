"""`torch.library` ops of fixed arity for an implementation of the fused mixture of experts.

As `ops.py` does for the quantizers: a compiler can call them and cannot look inside.
"""

# SPDX-License-Identifier: Apache-2.0
from typing import Protocol

import torch

from ..reference.activation import ActivationType
from ..reference.moe.activations import Activations
from ..reference.moe.finalize import FinalizeOrder
from ..reference.recipe import Recipe
from ..reference.weights.experts import Experts

Triple = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


class FusedMoE(Protocol):
    """(output [T, H] of `output_dtype`, rows [rows, padded H] bf16, permuted [T * K] int32).

    The first is empty without `do_finalize`, the others with it. With `quantize` the hidden states are
    bf16, and quantized per token with `recipe` first. `num_experts` are those of all ranks, over which
    the slots are spread; omitted, those held here.
    """

    def __call__(
        self,
        activations: Activations,
        experts: Experts,
        ids: torch.Tensor,
        weights: torch.Tensor,
        *,
        recipe: Recipe,
        local_expert_offset: int,
        finalize_order: FinalizeOrder,
        do_finalize: bool,
        num_experts: int | None = None,
        output_dtype: torch.dtype = torch.bfloat16,
        batch_invariant: bool = False,
        quantize: bool = False,
    ) -> Triple: ...


def register(name: str, implementation: FusedMoE) -> FusedMoE:
    """The op `nvfp4_moe::{name}_fused_moe` of an implementation, as a function."""

    @torch.library.custom_op(f"nvfp4_moe::{name}_fused_moe", mutates_args=())
    def op(
        hidden_states: torch.Tensor,
        block_scales: torch.Tensor | None,
        per_token_scale: torch.Tensor | None,
        gemm1_weights: torch.Tensor,
        gemm1_weights_scale: torch.Tensor,
        gemm2_weights: torch.Tensor,
        gemm2_weights_scale: torch.Tensor,
        output1_scale_scalar: torch.Tensor,
        output1_scale_gate_scalar: torch.Tensor,
        output2_scale_scalar: torch.Tensor,
        gemm1_bias: torch.Tensor | None,
        gemm2_bias: torch.Tensor | None,
        gemm1_alpha: torch.Tensor | None,
        gemm1_beta: torch.Tensor | None,
        gemm1_clamp_limit: torch.Tensor | None,
        ids: torch.Tensor,
        weights: torch.Tensor,
        hidden_size: int,
        intermediate_size: int,
        activation: int,
        recipe_code: int,
        num_experts: int | None,
        local_expert_offset: int,
        by_slot: bool,
        do_finalize: bool,
        output_dtype: torch.dtype,
        batch_invariant: bool,
        quantize: bool,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        experts = Experts(
            gemm1_weights, gemm1_weights_scale, gemm2_weights, gemm2_weights_scale,
            output1_scale_scalar, output1_scale_gate_scalar, output2_scale_scalar, hidden_size,
            intermediate_size, ActivationType(activation), gemm1_bias, gemm2_bias, gemm1_alpha,
            gemm1_beta, gemm1_clamp_limit,
        )  # fmt: skip
        return implementation(
            Activations(hidden_states, block_scales, per_token_scale),
            experts,
            ids,
            weights,
            recipe=Recipe.from_code(recipe_code),
            local_expert_offset=local_expert_offset,
            finalize_order="slot" if by_slot else "flashinfer",
            do_finalize=do_finalize,
            num_experts=num_experts,
            output_dtype=output_dtype,
            batch_invariant=batch_invariant,
            quantize=quantize,
        )

    @op.register_fake
    def _(hidden_states, *rest):  # type: ignore[no-untyped-def]
        ids, hidden_size, gemm2_weights = rest[14], rest[16], rest[4]
        do_finalize, output_dtype = rest[-4:-2]
        return empty_results(
            hidden_states, ids.shape[0], ids.numel(), hidden_size, gemm2_weights.shape[1],
            do_finalize, output_dtype,
        )  # fmt: skip

    def call(
        activations: Activations,
        experts: Experts,
        ids: torch.Tensor,
        weights: torch.Tensor,
        *,
        recipe: Recipe,
        local_expert_offset: int,
        finalize_order: FinalizeOrder,
        do_finalize: bool,
        num_experts: int | None = None,
        output_dtype: torch.dtype = torch.bfloat16,
        batch_invariant: bool = False,
        quantize: bool = False,
    ) -> Triple:
        e = experts
        return op(
            activations.hidden_states, activations.block_scales, activations.per_token_scale,
            e.gemm1_weights, e.gemm1_weights_scale, e.gemm2_weights, e.gemm2_weights_scale,
            e.output1_scale_scalar, e.output1_scale_gate_scalar, e.output2_scale_scalar,
            e.gemm1_bias, e.gemm2_bias, e.gemm1_alpha, e.gemm1_beta, e.gemm1_clamp_limit,
            ids, weights, e.hidden_size, e.intermediate_size, int(e.activation), recipe.code,
            num_experts, local_expert_offset, finalize_order == "slot", do_finalize, output_dtype,
            batch_invariant, quantize,
        )  # fmt: skip

    return call


def empty_results(
    like: torch.Tensor,
    tokens: int,
    slots: int,
    width: int,
    padded: int,
    do_finalize: bool,
    output_dtype: torch.dtype,
) -> Triple:
    """The three results, allocated; those that `do_finalize` leaves out have no rows."""

    kept = 0 if do_finalize else slots
    output = like.new_empty((tokens if do_finalize else 0, width), dtype=output_dtype)
    rows = like.new_empty((kept, padded), dtype=torch.bfloat16)
    return output, rows, like.new_empty(kept, dtype=torch.int32)
