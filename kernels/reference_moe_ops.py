"""The reference's fused mixture of experts as a `torch.library` op."""

# SPDX-License-Identifier: Apache-2.0
import torch

from ..reference.moe import layer as moe
from ..reference.moe.activations import Activations, quantize_activations
from ..reference.moe.finalize import FinalizeOrder
from ..reference.moe.permute import permutation
from ..reference.recipe import Recipe
from ..reference.weights.experts import Experts
from .moe_call import Observe
from .moe_ops import Triple, empty_results, register


def _fused_moe(
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
    observe: Observe | None = None,
) -> Triple:
    if quantize:
        activations = quantize_activations(activations.hidden_states, recipe)
    result = moe.fused_moe(
        activations, experts, ids, weights, recipe=recipe,
        local_expert_offset=local_expert_offset, finalize_order=finalize_order,
        output_dtype=output_dtype, keep_steps=observe is not None,
    )  # fmt: skip
    if observe is not None:
        observe(ids, result.steps["activated"].flatten(0, 1), None)
    output, rows, permuted = empty_results(
        activations.hidden_states, ids.shape[0], ids.numel(), experts.hidden_size,
        experts.padded_hidden_size, do_finalize, output_dtype,
    )  # fmt: skip
    if do_finalize:
        return result.output, rows, permuted
    permuted = permutation(ids, experts.num_local, local_expert_offset)
    here = permuted >= 0
    rows.zero_()
    rows[permuted[here].long(), : experts.hidden_size] = result.rows.flatten(0, 1)[here]
    return output, rows, permuted


fused_moe = register("reference", _fused_moe)
