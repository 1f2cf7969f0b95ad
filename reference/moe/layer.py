"""The fused mixture of experts, stage by stage: the specification of the production call.

For each token t and slot k, with e = ids[t, k] an expert on this rank:

    accumulator1  sum over H of codes * block scales of the token and of the expert's first GEMM
    raw           accumulator1 * per_token_scale[t] + gemm1_bias[e]
    intermediate  activation(raw, the expert's scalars), rounded to bf16
    requantized   `quantize_per_token` of the intermediate with `recipe` (CUDA build of FlashInfer)
    accumulator2  sum over I
    row           (accumulator2 * token scale 2 + gemm2_bias[e]) * output2_scale_scalar[e], to bf16
    output[t]     sum over k of weights[t, k] * row, in fp32 and in the order below, to output_dtype;
                  slots whose expert is not on this rank are skipped, whatever their weight

Without `per_token_scale` the first GEMM's result, already times the static encode scale of the
intermediate, is quantized by blocks from fp32. FlashInfer's cutlass layer, which has static scales
alone, rounds twice on the way: accumulator1 * scalar to bf16, and the activation of that; the result is
quantized with the encode scale, and 4over6 sums its errors by halves of a block. bf16 hidden states are
multiplied as they are and their intermediate is not quantized (W4A16).

Products of codes and scales have at most 12 significant bits and are exact. With `accumulate="fp64"`
a sum of K of them errs by less than K * 2^-53 of the sum of magnitudes before its one rounding to
fp32; "fp32" adds left to right in fp32. Not determined by FlashInfer: the order of the sums and the
last bits of the activation; the association of accumulator, token scale and scalar is the one above.

Sources: flashinfer-python 0.7.2, `trtllm_fused_moe_runner.cu:670-805`, `trace/templates/moe.py:1503`,
`trtllm_fused_moe_dev_kernel.cu:678-1165` (finalize), `cutlass_fused_moe_kernels.cuh:1086-1134` and
`:2400-2580` (cutlass).
"""

# SPDX-License-Identifier: Apache-2.0
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from ..activation import activate
from ..numerics.accumulate import Accumulate, matmul
from ..numerics.subnormals import kept
from ..quantize import Quantized, quantize_block_scales, quantize_global_scale, quantize_per_token
from ..recipe import LayerBuild, Recipe
from ..weights.experts import Experts
from ..weights.layout import gemm1_values, gemm2_values, unshuffled_bias
from .activations import Activations, hidden_values
from .finalize import FinalizeOrder, finalize
from .permute import local_slots
from .variants import VARIANTS

OUTPUT_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@dataclass(frozen=True)
class MoEResult:
    """The output and its steps; [T, K, ...] tensors are zero in slots whose expert is not on this rank.

    `steps`, when asked for: "accumulator1" [T, K, M1] ([up; gate]), "activated" [T, K, I] fp32,
    "intermediate" the same in bf16, "fc2_input_codes" [T, K, I/2],
    "fc2_input_block_scales" [T, K, I/16], "fc2_input_token_scales" [T, K], "accumulator2" [T, K, H].
    """

    output: torch.Tensor  # [T, H] bf16, or the dtype asked for
    rows: torch.Tensor  # [T, K, H] bf16, not yet weighted
    steps: dict[str, torch.Tensor] = field(default_factory=dict)


@kept
def fused_moe(
    activations: Activations,
    experts: Experts,
    ids: torch.Tensor,
    weights: torch.Tensor,
    *,
    recipe: Recipe | None = None,
    local_expert_offset: int = 0,
    accumulate: Accumulate = "fp64",
    finalize_order: FinalizeOrder = "flashinfer",
    output_dtype: torch.dtype = torch.bfloat16,
    variant: LayerBuild = "cuda",
    round_to_bf16: bool = True,
    keep_steps: bool = False,
    stages: "Stages | None" = None,
) -> MoEResult:
    """Everything after the routing.

    Args:
        ids: [T, K] int32 global expert ids. Those outside local_expert_offset ... + num_local are not on
            this rank and add nothing.
        weights: [T, K] bf16 or fp32 routing weights.
        recipe: of the intermediate's quantization; the build must be "cuda" for FlashInfer's
            TRT-LLM backend.
        accumulate: the two GEMMs' sums; see the module.
        finalize_order: "flashinfer" (depends on T) or "slot" (ascending, always).
        output_dtype: bf16 (FlashInfer's), fp16 or fp32.
        variant: whose bits; "cutlass" has static scales and experts of `with_cutlass` alone.
        round_to_bf16: False leaves out the bf16 roundings of intermediate and rows and the
            requantization: FlashInfer's own trace reference does.
        stages: other functions in place of some of these, as tests of the judge use them.
    """
    recipe, do = recipe or Recipe(), stages or Stages()
    rounds = VARIANTS[variant].rounds_first_gemm
    tokens, top_k = ids.shape
    x = hidden_values(activations)
    h, m1 = experts.padded_hidden_size, experts.gemm1_weights.shape[1]
    i = experts.padded_intermediate_size
    acc1, acc2 = x.new_zeros(tokens, top_k, m1), x.new_zeros(tokens, top_k, h)
    activated = x.new_zeros(tokens, top_k, i)
    steps: dict[str, torch.Tensor] = {}

    slots = [
        (ids == e + local_expert_offset).nonzero(as_tuple=True) for e in range(experts.num_local)
    ]
    for e, (token, slot) in enumerate(slots):
        if not token.numel():
            continue
        acc1[token, slot] = do.gemm1(x[token], gemm1_values(experts, e), accumulate)
        raw = acc1[token, slot]
        if activations.per_token_scale is not None:
            raw = raw * activations.per_token_scale[token, None]
        if rounds:
            raw = (raw * experts.output1_scale_gate_scalar[e]).bfloat16().float()
            activated[token, slot] = activate(raw, experts.activation, of_cutlass=True)
        else:
            activated[token, slot] = do.activate(raw, experts, e)

    if activations.is_bf16 or not round_to_bf16:
        values2, scale2 = activated, None
        if round_to_bf16:
            steps["intermediate"] = do.round_intermediate(activated)
            values2 = steps["intermediate"].float()
    else:
        encode2 = experts.intermediate_scale if rounds else None
        if not activations.is_static or rounds:
            steps["intermediate"] = activated = do.round_intermediate(activated)
        values2, scale2 = do.requantize(activated, encode2, recipe, steps)

    rows = x.new_zeros(tokens, top_k, h)
    for e, (token, slot) in enumerate(slots):
        if not token.numel():
            continue
        acc2[token, slot] = do.gemm2(values2[token, slot], gemm2_values(experts, e), accumulate)
        row = acc2[token, slot]
        if scale2 is not None:
            row = row * scale2[token, slot, None]
        if experts.gemm2_bias is not None:
            row = row + unshuffled_bias(experts.gemm2_bias[e], gated=False)
        rows[token, slot] = row * experts.output2_scale_scalar[e]

    rows = rows[..., : experts.hidden_size]
    if round_to_bf16:
        rows = do.round_rows(rows)
    is_local = local_slots(ids, experts.num_local, local_expert_offset)
    output = do.finalize(rows.float(), weights, finalize_order, is_local).to(output_dtype)
    if keep_steps:
        steps |= {"accumulator1": acc1, "activated": activated, "accumulator2": acc2}
    return MoEResult(output, rows, steps if keep_steps else {})


def activate_raw(raw: torch.Tensor, experts: Experts, e: int) -> torch.Tensor:
    gated = experts.activation.gated
    if experts.gemm1_bias is not None:
        raw = raw + unshuffled_bias(experts.gemm1_bias[e], gated)

    def of_expert(value: torch.Tensor | None) -> torch.Tensor | None:
        return None if value is None else value[e]

    return activate(
        raw,
        experts.activation,
        experts.output1_scale_scalar[e],
        experts.output1_scale_gate_scalar[e],
        alpha=of_expert(experts.gemm1_alpha),
        beta=of_expert(experts.gemm1_beta),
        clamp_limit=of_expert(experts.gemm1_clamp_limit),
    )


def requantize(
    intermediate: torch.Tensor,
    encode: torch.Tensor | None,
    recipe: Recipe,
    steps: dict[str, torch.Tensor],
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """(code times block scale [T, K, I], per-row scale [T, K] or None where it is static).

    Args:
        intermediate: [T, K, I] bf16; fp32 with static scales, the encode scale in the values.
        encode: the encode scale of cutlass' layer.
    """
    flat = intermediate.flatten(0, 1)
    if intermediate.dtype == torch.float32:
        q = quantize_block_scales(flat, recipe)
    elif encode is not None:
        q = quantize_global_scale(flat, encode, recipe, error_by_halves=True)
    else:
        q = quantize_per_token(flat, recipe.base_scale_inv, recipe)
    return read_back(q, intermediate.shape[:2], steps)


def read_back(
    q: Quantized, shape: torch.Size, steps: dict[str, torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Decode a quantized intermediate for the second GEMM, and keep its steps; shape is (T, K)."""
    scale = q.per_token_scale
    if scale is not None:
        scale = steps["fc2_input_token_scales"] = scale.unflatten(0, shape)
    steps["fc2_input_codes"] = q.codes.unflatten(0, shape)
    steps["fc2_input_block_scales"] = q.block_scales.unflatten(0, shape)
    return hidden_values(Activations(q.codes, q.block_scales)).unflatten(0, shape), scale


@dataclass(frozen=True)
class Stages:
    """The functions that `fused_moe` calls, one after the other."""

    gemm1: Callable[..., torch.Tensor] = matmul
    activate: Callable[..., torch.Tensor] = activate_raw
    round_intermediate: Callable[[torch.Tensor], torch.Tensor] = torch.Tensor.bfloat16
    requantize: Callable[..., tuple[torch.Tensor, torch.Tensor | None]] = requantize
    gemm2: Callable[..., torch.Tensor] = matmul
    round_rows: Callable[[torch.Tensor], torch.Tensor] = torch.Tensor.bfloat16
    finalize: Callable[..., torch.Tensor] = finalize
