"""The fused mixture of experts: FlashInfer's two functions, and one that takes ordinary tensors."""

# SPDX-License-Identifier: Apache-2.0
from dataclasses import replace
from typing import Any, Literal, overload

import torch

from ...reference import checks
from ...reference.activation import activation_of
from ...reference.moe.finalize import FinalizeOrder
from ...reference.moe.hidden_states import Activations
from ...reference.moe.routing import Routing
from ...reference.recipe import LayerBuild
from ...reference.statistics.moe import MoEStatistics
from ...reference.weights.experts import Experts
from ..backends import Asked, prepared
from ..quantize.call import UNSET
from . import statistics as moe_statistics
from .backends import FUSED_MOE, MoEBackend
from .call import (
    Mode,
    MoECall,
    activation_mode,
    check_linear,
    check_values,
    make_moe_call,
    routing_of,
)
from .weight_on_input import weigh_rows


def _replayed(call: MoECall, results: list[torch.Tensor]) -> list[torch.Tensor]:
    """The results; the chosen experts go into the caller's tensor, where one is given."""
    if call.routing_replay_out is not None:
        ids, _ = call.routed()
        call.routing_replay_out[: ids.shape[0]] = ids.to(call.routing_replay_out.dtype)
    return results


@FUSED_MOE.served(_replayed)
def trtllm_fp4_block_scale_moe(
    routing_logits: torch.Tensor,
    routing_bias: torch.Tensor | None,
    hidden_states: torch.Tensor,
    hidden_states_scale: torch.Tensor | None,
    gemm1_weights: torch.Tensor,
    gemm1_weights_scale: torch.Tensor,
    gemm1_bias: torch.Tensor | None,
    gemm1_alpha: torch.Tensor | None,
    gemm1_beta: torch.Tensor | None,
    gemm1_clamp_limit: torch.Tensor | None,
    gemm2_weights: torch.Tensor,
    gemm2_weights_scale: torch.Tensor,
    gemm2_bias: torch.Tensor | None,
    output1_scale_scalar: torch.Tensor,
    output1_scale_gate_scalar: torch.Tensor,
    output2_scale_scalar: torch.Tensor,
    num_experts: int,
    top_k: int,
    n_group: int | None,
    topk_group: int | None,
    intermediate_size: int,
    local_expert_offset: int,
    local_num_experts: int,
    routed_scaling_factor: float | None,
    routing_method_type: int = 0,
    do_finalize: bool = True,
    enable_pdl: bool | None = None,
    activation_type: int = 3,
    per_token_scale: torch.Tensor | None = None,
    output: torch.Tensor | None = None,
    tune_max_num_tokens: int = 8192,
    norm_topk_prob: bool = True,
    routing_replay_out: torch.Tensor | None = None,
    num_fused_shared_experts: int | None = None,
    valid_hidden_size: int | None = None,
    valid_intermediate_size: int | None = None,
    hidden_states_scale_layout: Any = None,
    *,
    backend: MoEBackend | str = "auto",
    fast_math: bool | None = None,
    build: LayerBuild = "cuda",
    nvfp4_4over6: Any = UNSET,
    finalize_order: FinalizeOrder = "flashinfer",
    batch_invariant: bool = False,
) -> Asked[MoECall]:
    """`flashinfer.fused_moe.trtllm_fp4_block_scale_moe` (0.7.2): routing, both GEMMs, finalize.

    Args:
        routing_logits: [T, E] fp32 or bf16; `reference.moe.routing` has the methods.
        hidden_states: uint8 codes [T, H/2], or bf16 [T, H] (weights quantized only; not FlashInfer).
        hidden_states_scale: e4m3 [T, H/16], linear.
        gemm1_weights ... output2_scale_scalar: as `reference.weights.experts.Experts` documents them.
        per_token_scale: [T] fp32; None for static scales.
        backend: "auto", "flashinfer:trtllm", "flashinfer:cute-dsl", "flashinfer:cutlass", "triton" or
            "reference".
        fast_math, nvfp4_4over6: of the intermediate's quantization; omitted, the environment decides,
            as it always does for FlashInfer, which refuses another value.
        finalize_order: "flashinfer", whose order depends on T, or "slot".
        batch_invariant: the bits of a token's output depend on its own row, ids and weights only, not
            on T, its place or its neighbours; finalize_order is then "slot".

    Returns:
        [output [T, valid H], bf16 unless `output` is fp16 or fp32], or without `do_finalize` [rows bf16
        [P, H], routing weights [T, K], the row of each expanded index int32 [T * K], -1 where the
        expert is not on this rank].

    Raises:
        ValueError, TypeError: an argument that no backend accepts.
        UnsupportedError: the named backend, or every one, cannot serve the call.
    """
    check_linear(hidden_states_scale_layout)
    routing = routing_of(
        routing_method_type, top_k, n_group, topk_group, routed_scaling_factor, norm_topk_prob
    )
    experts = _experts(
        gemm1_weights=gemm1_weights,
        gemm1_weights_scale=gemm1_weights_scale,
        gemm2_weights=gemm2_weights,
        gemm2_weights_scale=gemm2_weights_scale,
        output1_scale_scalar=output1_scale_scalar,
        output1_scale_gate_scalar=output1_scale_gate_scalar,
        output2_scale_scalar=output2_scale_scalar,
        gemm1_bias=gemm1_bias,
        gemm2_bias=gemm2_bias,
        gemm1_alpha=gemm1_alpha,
        gemm1_beta=gemm1_beta,
        gemm1_clamp_limit=gemm1_clamp_limit,
        activation_type=activation_type,
        intermediate_size=intermediate_size,
        valid_hidden_size=valid_hidden_size,
        valid_intermediate_size=valid_intermediate_size,
        local_num_experts=local_num_experts,
        shared_experts=num_fused_shared_experts or 0,
    )
    call = make_moe_call(
        Activations(hidden_states, hidden_states_scale, per_token_scale),
        experts,
        num_experts=num_experts,
        routing=routing,
        local_expert_offset=local_expert_offset,
        logits=routing_logits,
        routing_bias=routing_bias,
        routing_replay_out=routing_replay_out,
        do_finalize=do_finalize,
        finalize_order=finalize_order,
        batch_invariant=batch_invariant,
        output=output,
        enable_pdl=enable_pdl,
        tune_max_num_tokens=tune_max_num_tokens,
        shared_experts=num_fused_shared_experts or 0,
        nvfp4_4over6=nvfp4_4over6,
        fast_math=fast_math,
        build=build,
    )
    return call, FUSED_MOE.check_name(backend)


@FUSED_MOE.served()
def trtllm_fp4_block_scale_routed_moe(
    topk_ids: torch.Tensor | tuple[torch.Tensor, torch.Tensor],
    routing_bias: torch.Tensor | None,
    hidden_states: torch.Tensor,
    hidden_states_scale: torch.Tensor | None,
    gemm1_weights: torch.Tensor,
    gemm1_weights_scale: torch.Tensor,
    gemm1_bias: torch.Tensor | None,
    gemm1_alpha: torch.Tensor | None,
    gemm1_beta: torch.Tensor | None,
    gemm1_clamp_limit: torch.Tensor | None,
    gemm2_weights: torch.Tensor,
    gemm2_weights_scale: torch.Tensor,
    gemm2_bias: torch.Tensor | None,
    output1_scale_scalar: torch.Tensor,
    output1_scale_gate_scalar: torch.Tensor,
    output2_scale_scalar: torch.Tensor,
    num_experts: int,
    top_k: int,
    n_group: int | None,
    topk_group: int | None,
    intermediate_size: int,
    local_expert_offset: int,
    local_num_experts: int,
    routed_scaling_factor: float | None,
    routing_method_type: int = 0,
    do_finalize: bool = True,
    enable_pdl: bool | None = None,
    activation_type: int = 3,
    per_token_scale: torch.Tensor | None = None,
    output: torch.Tensor | None = None,
    tune_max_num_tokens: int = 8192,
    gemm1_lora_delta: torch.Tensor | None = None,
    valid_hidden_size: int | None = None,
    valid_intermediate_size: int | None = None,
    num_fused_shared_experts: int | None = None,
    hidden_states_scale_layout: Any = None,
    *,
    backend: MoEBackend | str = "auto",
    fast_math: bool | None = None,
    build: LayerBuild = "cuda",
    nvfp4_4over6: Any = UNSET,
    finalize_order: FinalizeOrder = "flashinfer",
    batch_invariant: bool = False,
) -> Asked[MoECall]:
    """`flashinfer.fused_moe.trtllm_fp4_block_scale_routed_moe` (0.7.2): the routing is given.

    Args:
        topk_ids: int32 [T, K], `(id << 16) | bf16 bits of the weight`, or (ids int32, weights bf16 or
            fp32); ids are global.
        routing_bias, n_group, topk_group, routed_scaling_factor: not read.
        The rest: as for `trtllm_fp4_block_scale_moe`.
    """
    check_linear(hidden_states_scale_layout)
    experts = _experts(
        gemm1_weights=gemm1_weights,
        gemm1_weights_scale=gemm1_weights_scale,
        gemm2_weights=gemm2_weights,
        gemm2_weights_scale=gemm2_weights_scale,
        output1_scale_scalar=output1_scale_scalar,
        output1_scale_gate_scalar=output1_scale_gate_scalar,
        output2_scale_scalar=output2_scale_scalar,
        gemm1_bias=gemm1_bias,
        gemm2_bias=gemm2_bias,
        gemm1_alpha=gemm1_alpha,
        gemm1_beta=gemm1_beta,
        gemm1_clamp_limit=gemm1_clamp_limit,
        activation_type=activation_type,
        intermediate_size=intermediate_size,
        valid_hidden_size=valid_hidden_size,
        valid_intermediate_size=valid_intermediate_size,
        local_num_experts=local_num_experts,
        shared_experts=num_fused_shared_experts or 0,
    )
    call = make_moe_call(
        Activations(hidden_states, hidden_states_scale, per_token_scale),
        experts,
        num_experts=num_experts,
        routing=routing_of(1, top_k, None, None, None),
        local_expert_offset=local_expert_offset,
        topk=topk_ids,
        do_finalize=do_finalize,
        finalize_order=finalize_order,
        batch_invariant=batch_invariant,
        output=output,
        enable_pdl=enable_pdl,
        tune_max_num_tokens=tune_max_num_tokens,
        lora_delta=gemm1_lora_delta,
        shared_experts=num_fused_shared_experts or 0,
        nvfp4_4over6=nvfp4_4over6,
        fast_math=fast_math,
        build=build,
    )
    check_values(call)
    return call, FUSED_MOE.check_name(backend)


def _output(call: MoECall, results: list[torch.Tensor]) -> Any:
    """Return the output; with `stats` a pair of output and statistics."""
    if call.observe is None:
        return results[0]
    assert isinstance(call.observe, moe_statistics.Observer)
    return results[0], call.observe.statistics


@overload
def fused_moe(
    hidden_states: torch.Tensor,
    experts: Experts,
    routing: tuple[torch.Tensor, Routing] | tuple[torch.Tensor, torch.Tensor],
    *,
    activation: Mode | None = ...,
    routing_bias: torch.Tensor | None = ...,
    num_experts: int | None = ...,
    local_expert_offset: int = ...,
    backend: MoEBackend | str = ...,
    fast_math: bool | None = ...,
    build: LayerBuild = ...,
    nvfp4_4over6: Any = ...,
    finalize_order: FinalizeOrder = ...,
    batch_invariant: bool = ...,
    output_dtype: torch.dtype = ...,
    stats: Literal[False] = ...,
) -> torch.Tensor: ...
@overload
def fused_moe(
    hidden_states: torch.Tensor,
    experts: Experts,
    routing: tuple[torch.Tensor, Routing] | tuple[torch.Tensor, torch.Tensor],
    *,
    activation: Mode | None = ...,
    routing_bias: torch.Tensor | None = ...,
    num_experts: int | None = ...,
    local_expert_offset: int = ...,
    backend: MoEBackend | str = ...,
    fast_math: bool | None = ...,
    build: LayerBuild = ...,
    nvfp4_4over6: Any = ...,
    finalize_order: FinalizeOrder = ...,
    batch_invariant: bool = ...,
    output_dtype: torch.dtype = ...,
    stats: Literal[True],
) -> tuple[torch.Tensor, MoEStatistics]: ...
@overload
def fused_moe(
    hidden_states: torch.Tensor,
    experts: Experts,
    routing: tuple[torch.Tensor, Routing] | tuple[torch.Tensor, torch.Tensor],
    *,
    activation: Mode | None = ...,
    routing_bias: torch.Tensor | None = ...,
    num_experts: int | None = ...,
    local_expert_offset: int = ...,
    backend: MoEBackend | str = ...,
    fast_math: bool | None = ...,
    build: LayerBuild = ...,
    nvfp4_4over6: Any = ...,
    finalize_order: FinalizeOrder = ...,
    batch_invariant: bool = ...,
    output_dtype: torch.dtype = ...,
    stats: bool = ...,
) -> torch.Tensor | tuple[torch.Tensor, MoEStatistics]: ...
@FUSED_MOE.served(_output)
def fused_moe(
    hidden_states: torch.Tensor,
    experts: Experts,
    routing: tuple[torch.Tensor, Routing] | tuple[torch.Tensor, torch.Tensor],
    *,
    activation: Mode | None = None,
    routing_bias: torch.Tensor | None = None,
    num_experts: int | None = None,
    local_expert_offset: int = 0,
    backend: MoEBackend | str = "auto",
    fast_math: bool | None = None,
    build: LayerBuild = "cuda",
    nvfp4_4over6: Any = None,
    finalize_order: FinalizeOrder = "flashinfer",
    batch_invariant: bool = False,
    output_dtype: torch.dtype = torch.bfloat16,
    stats: bool = False,
) -> Asked[MoECall]:
    """The layer from ordinary tensors: quantize the hidden states, then the fused call.

    Args:
        hidden_states: [T, hidden size] bf16, contiguous, but for layers whose size is padded.
        experts: from `prepare_experts`, `assemble_experts` or a checkpoint; with
            `router_weight_on_input` the rows are scaled first, of which the routing may have one weight
            each.
        routing: (logits [T, E], a `Routing`), or (ids int32 [T, K], weights bf16 or fp32 [T, K]).
        activation: "per-token", "static" (experts with `input_amax`) or "bf16" (not quantized);
            omitted, static where the experts have static scales, else per token.
        num_experts: of all ranks; omitted with ids, the local ones.
        output_dtype: bf16, fp16 or fp32, of which FlashInfer writes the first alone.
        stats: also report what both quantizations did, by expert; not by FlashInfer, nor compiled. The
            output has the bits of the same backend without.
        The rest: as for `trtllm_fp4_block_scale_moe`; 4over6 is off unless given, for both
            quantizations.

    Returns:
        [T, hidden size] of output_dtype; with stats (that, a `MoEStatistics`).
    """
    checks.flag("stats", stats)
    checks.instance("experts", experts, Experts, "Experts, as prepare_experts makes them")
    activation = activation_mode(activation, experts)
    checks.tensor("hidden_states", hidden_states, (torch.bfloat16,), ("T", experts.hidden_size))
    # Of such a layer a caller may hold the rows among padding of its own.
    padded_size = experts.hidden_size != experts.padded_hidden_size
    given, num_experts = _routing(routing, experts.num_local, num_experts)
    if "topk" in given and routing_bias is not None:
        checks.wrong_value("routing_bias", routing_bias, "None with ids, which are chosen already")
    names = ("routing[0]", "routing[1]")
    call = make_moe_call(
        Activations(hidden_states.contiguous() if padded_size else hidden_states),
        experts,
        num_experts=num_experts,
        local_expert_offset=local_expert_offset,
        routing_bias=routing_bias,
        finalize_order=finalize_order,
        batch_invariant=batch_invariant,
        output_dtype=output_dtype,
        nvfp4_4over6=nvfp4_4over6,
        fast_math=fast_math,
        build=build,
        unpadded=True,
        quantize=None if activation == "bf16" else activation,
        names=names,
        **given,
    )
    if experts.router_weight_on_input:
        call = _weighed(call, hidden_states, routing)
    check_values(call, names)
    if stats:
        call = moe_statistics.observed(call)
    return call, FUSED_MOE.check_name(backend)


explain_fused_moe = FUSED_MOE.explaining(fused_moe)
layer_call = prepared(fused_moe)
"""Return the checked call and the backend's name from the arguments of `fused_moe`."""


def _weighed(call: MoECall, hidden_states: torch.Tensor, routing: Any) -> MoECall:
    """Return the call whose rows, in place of the results, are multiplied by the router's weights."""
    rows, (ids, ones) = weigh_rows(hidden_states, routing, call.routing_bias)
    return replace(
        call,
        activations=Activations(rows),
        routing=routing_of(1, 1, None, None, None),
        logits=None,
        routing_bias=None,
        ids=ids,
        weights=ones,
    )


def _routing(routing: Any, num_local: int, num_experts: int | None) -> tuple[dict[str, Any], int]:
    """Return the routing's arguments of `make_moe_call`, and the number of experts of all ranks."""
    allowed = "(logits [T, E], Routing) or (ids int32 [T, K], weights [T, K])"
    checks.pair("routing", routing, allowed)
    first, second = routing
    if isinstance(first, Routing) or not isinstance(second, Routing | torch.Tensor):
        kinds = ", ".join(type(part).__name__ for part in routing)
        raise TypeError(f"routing is ({kinds}); it must be {allowed}")
    if num_experts is not None:
        checks.integer("num_experts", num_experts, num_local)
    if not isinstance(second, Routing):
        return {"topk": (first, second)}, num_local if num_experts is None else num_experts
    if num_experts is None:
        checks.tensor("routing[0]", first, shape=("T", "E"))
        num_experts = first.shape[1]
        if num_experts < num_local:
            raise ValueError(
                f"routing[0] is {checks.given(first)}; it must have a column for each expert of all "
                f"ranks, of which {num_local} are here"
            )
    return {"logits": first, "routing": second}, num_experts


def _experts(
    *,
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
    activation_type: int,
    intermediate_size: int,
    valid_hidden_size: int | None,
    valid_intermediate_size: int | None,
    local_num_experts: int,
    shared_experts: int,
) -> Experts:
    activation = activation_of(activation_type, "activation_type")
    checks.tensor("gemm2_weights", gemm2_weights, (torch.uint8,), ("experts", "H", "I/2"))
    checks.integer("num_fused_shared_experts", shared_experts, 0)
    local, hidden, half = gemm2_weights.shape
    for name, given, expected in (
        ("local_num_experts", local_num_experts, local - shared_experts),
        ("intermediate_size", intermediate_size, half * 2),
    ):
        checks.integer(name, given)
        if given != expected:
            raise ValueError(f"{name} is {given}; it must be {expected}, which gemm2_weights hold")
    return Experts(
        gemm1_weights=gemm1_weights,
        gemm1_weights_scale=gemm1_weights_scale,
        gemm2_weights=gemm2_weights,
        gemm2_weights_scale=gemm2_weights_scale,
        output1_scale_scalar=output1_scale_scalar,
        output1_scale_gate_scalar=output1_scale_gate_scalar,
        output2_scale_scalar=output2_scale_scalar,
        hidden_size=hidden if valid_hidden_size is None else valid_hidden_size,
        intermediate_size=(
            intermediate_size if valid_intermediate_size is None else valid_intermediate_size
        ),
        activation=activation,
        gemm1_bias=gemm1_bias,
        gemm2_bias=gemm2_bias,
        gemm1_alpha=gemm1_alpha,
        gemm1_beta=gemm1_beta,
        gemm1_clamp_limit=gemm1_clamp_limit,
    )
