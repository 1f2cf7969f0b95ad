"""The fused mixture of experts over every backend: FlashInfer's two functions, and a door of our own.

`auto` takes the first backend of `ORDER` that can serve, before any work starts; one that was named
never falls back. The two sums are each backend's own; everything else is the same to the bit.
"""

# SPDX-License-Identifier: Apache-2.0
import functools
import logging
from dataclasses import replace
from typing import Any

import torch

from ..reference import checks
from ..reference.activation import activation_of
from ..reference.moe.activations import Activations
from ..reference.moe.finalize import FinalizeOrder
from ..reference.moe.layer import fused_moe as reference_fused_moe
from ..reference.moe.routing import Routing
from ..reference.recipe import LayerBuild, SfLayout
from ..reference.weights.experts import Experts
from . import moe_statistics
from .backends import Explanation, UnsupportedError, triton_refusal_of
from .dispatch import nvfp4_quantize
from .flashinfer import (
    cute_dsl,
    cutlass,
    trtllm,
)
from .moe_call import (
    MoECall,
    Observe,
    check_linear,
    check_values,
    make_moe_call,
    routing_of,
)
from .moe_ops import FusedMoE
from .quantize_call import UNSET
from .weight_on_input import weigh_rows

_FLASHINFER = {m.NAME: m for m in (trtllm, cute_dsl, cutlass)}
ORDER = (*_FLASHINFER, "triton", "reference")
"""What `auto` tries, in order."""
_LINEAR = SfLayout.layout_linear
_log = logging.getLogger("nvfp4_moe")


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
    backend: str = "auto",
    fast_math: bool | None = None,
    build: LayerBuild = "cuda",
    nvfp4_4over6: Any = UNSET,
    finalize_order: FinalizeOrder = "flashinfer",
    batch_invariant: bool = False,
) -> list[torch.Tensor]:
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
        expert is not held here].

    Raises:
        ValueError, TypeError: an argument that no backend accepts.
        UnsupportedError: the named backend, or every one, cannot serve the call.
    """
    check_linear(hidden_states_scale_layout)
    routing = routing_of(
        routing_method_type, top_k, n_group, topk_group, routed_scaling_factor, norm_topk_prob
    )
    experts = _experts(
        gemm1_weights, gemm1_weights_scale, gemm2_weights, gemm2_weights_scale, output1_scale_scalar,
        output1_scale_gate_scalar, output2_scale_scalar, gemm1_bias, gemm2_bias, gemm1_alpha,
        gemm1_beta, gemm1_clamp_limit, activation_type, intermediate_size, valid_hidden_size,
        valid_intermediate_size, local_num_experts, num_fused_shared_experts or 0,
    )  # fmt: skip
    request = make_moe_call(
        Activations(hidden_states, hidden_states_scale, per_token_scale),
        experts,
        num_experts=num_experts,
        routing=routing,
        local_expert_offset=local_expert_offset,
        logits=routing_logits,
        routing_bias=routing_bias,
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
    if routing_replay_out is not None:
        ids, _ = request.routed()
        routing_replay_out[: ids.shape[0]] = ids.to(routing_replay_out.dtype)
    return serve(request, backend)


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
    backend: str = "auto",
    fast_math: bool | None = None,
    build: LayerBuild = "cuda",
    nvfp4_4over6: Any = UNSET,
    finalize_order: FinalizeOrder = "flashinfer",
    batch_invariant: bool = False,
) -> list[torch.Tensor]:
    """`flashinfer.fused_moe.trtllm_fp4_block_scale_routed_moe` (0.7.2): the routing is given.

    Args:
        topk_ids: int32 [T, K], `(id << 16) | bf16 bits of the weight`, or (ids int32, weights bf16 or
            fp32); ids are global.
        routing_bias, n_group, topk_group, routed_scaling_factor: not read.
        The rest: as for `trtllm_fp4_block_scale_moe`.
    """
    check_linear(hidden_states_scale_layout)
    experts = _experts(
        gemm1_weights, gemm1_weights_scale, gemm2_weights, gemm2_weights_scale, output1_scale_scalar,
        output1_scale_gate_scalar, output2_scale_scalar, gemm1_bias, gemm2_bias, gemm1_alpha,
        gemm1_beta, gemm1_clamp_limit, activation_type, intermediate_size, valid_hidden_size,
        valid_intermediate_size, local_num_experts, num_fused_shared_experts or 0,
    )  # fmt: skip
    request = make_moe_call(
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
    check_values(request)
    return serve(request, backend)


def fused_moe(
    hidden_states: torch.Tensor,
    experts: Experts,
    routing: tuple[torch.Tensor, Routing] | tuple[torch.Tensor, torch.Tensor],
    *,
    activation: str | None = None,
    routing_bias: torch.Tensor | None = None,
    num_experts: int | None = None,
    local_expert_offset: int = 0,
    backend: str = "auto",
    fast_math: bool | None = None,
    build: LayerBuild = "cuda",
    nvfp4_4over6: Any = None,
    finalize_order: FinalizeOrder = "flashinfer",
    batch_invariant: bool = False,
    output_dtype: torch.dtype = torch.bfloat16,
    stats: bool = False,
) -> torch.Tensor | Any:  # a pair with stats
    """The layer from ordinary tensors: quantize the hidden states, then the fused call.

    Args:
        hidden_states: [T, hidden size] bf16.
        experts: from `prepare_experts`, `assemble_experts` or a checkpoint; with
            `router_weight_on_input` the rows are scaled first, of which the routing may have one weight
            each.
        routing: (logits [T, E], a `Routing`), or (ids int32 [T, K], weights bf16 or fp32 [T, K]).
        activation: "per-token", "static" (experts with `input_amax`) or "bf16" (not quantized);
            omitted, static where the experts have static scales, else per token.
        num_experts: of all ranks; omitted with ids, those held here.
        output_dtype: bf16, fp16 or fp32, of which FlashInfer writes the first alone.
        stats: also report what both quantizations did, by expert; not by FlashInfer, nor compiled. The
            output has the bits of the same backend without.
        The rest: as for `trtllm_fp4_block_scale_moe`; 4over6 is off unless given, for both
        quantizations.

    Returns:
        [T, hidden size] of output_dtype; with stats (that, a `MoEStatistics`).
    """
    checks.flag("stats", stats)
    request = request_of_layer(
        hidden_states, experts, routing, activation, routing_bias, num_experts,
        local_expert_offset, fast_math, build, nvfp4_4over6, finalize_order,
        batch_invariant, output_dtype,
    )  # fmt: skip
    if not stats:
        return serve(request, backend)[0]
    request, seen = moe_statistics.observed(request)
    return serve(request, backend)[0], seen.statistics


def explain_fused_moe(
    hidden_states: torch.Tensor,
    experts: Experts,
    routing: tuple[torch.Tensor, Routing] | tuple[torch.Tensor, torch.Tensor],
    *,
    activation: str | None = None,
    routing_bias: torch.Tensor | None = None,
    num_experts: int | None = None,
    local_expert_offset: int = 0,
    backend: str = "auto",
    fast_math: bool | None = None,
    build: LayerBuild = "cuda",
    nvfp4_4over6: Any = None,
    finalize_order: FinalizeOrder = "flashinfer",
    batch_invariant: bool = False,
    output_dtype: torch.dtype = torch.bfloat16,
    stats: bool = False,
    capability: tuple[int, int] | None = None,
) -> Explanation:
    """Which backend `fused_moe` of the same arguments would run, and why each other would not.

    The hidden states are not quantized. `capability=(10, 0)` asks about another GPU.
    """
    try:
        request = request_of_layer(
            hidden_states, experts, routing, activation, routing_bias, num_experts,
            local_expert_offset, fast_math, build, nvfp4_4over6, finalize_order,
            batch_invariant, output_dtype, capability,
        )  # fmt: skip
        if stats:
            request, _ = moe_statistics.observed(request)
        _check_backend(backend)
    except (TypeError, ValueError) as error:
        return Explanation(None, tuple((name, str(error)) for name in ORDER))
    reasons = tuple((name, refusal(name, request)) for name in ORDER)
    name = _choose(request) if backend == "auto" else backend
    return Explanation(name if name and dict(reasons)[name] is None else None, reasons)


def refusal(backend: str, r: MoECall) -> str | None:
    """Why a backend cannot serve the request; None if it can."""
    if (reason := moe_statistics.refusal(backend, r)) is not None:
        return reason
    if backend in _FLASHINFER:
        return _FLASHINFER[backend].refusal(r)
    if r.lora_delta is not None:
        return "gemm1_lora_delta is FlashInfer's alone"
    if backend == "reference":
        if r.build == "cutlass" and torch.compiler.is_compiling():
            return 'torch.compile cannot trace build="cutlass"'
        return None
    if r.build == "cutlass":
        return 'build="cutlass" rounds the first GEMM to bf16, which these kernels do not'
    return triton_refusal_of(r.activations.hidden_states, "hidden_states are", r.capability)


def resolve(r: MoECall, backend: str) -> str:
    """The backend that serves the request.

    Raises:
        ValueError: there is none of this name.
        UnsupportedError: the named one, or every one, cannot serve it.
    """
    _check_backend(backend)
    name = _choose(r) if backend == "auto" else backend
    if name is None:
        reasons = "; ".join(f"{b}: {refusal(b, r)}" for b in ORDER)
        raise UnsupportedError(f"no backend can serve this call: {reasons}")
    if (reason := refusal(name, r)) is not None:
        raise UnsupportedError(f"backend {name} cannot serve this call: {reason}")
    return name


def serve(r: MoECall, backend: str) -> list[torch.Tensor]:
    name = resolve(r, backend)
    if r.quantize == "static" or (r.quantize and name in _FLASHINFER):
        r = with_codes(r)
    if name in _FLASHINFER:
        try:
            return _FLASHINFER[name].run(r)
        except RuntimeError as error:
            can_remember = name == trtllm.NAME and backend == "auto"
            if not can_remember or not trtllm.remember_missing_kernel(r, error):
                raise
            _log.warning("%s had no kernel, falling back: %s", name, error)
            return serve(r, backend)
    ids, weights = r.routed(name)
    if r.build == "cutlass":
        output = reference_fused_moe(
            r.activations, r.experts, ids, weights, recipe=r.recipe, cutlass=True,
            local_expert_offset=r.local_expert_offset, finalize_order=r.finalize_order,
            output_dtype=r.output_dtype,
        ).output  # fmt: skip
        return r.returned(output)
    output, rows, permuted = _implementation(name, r.observe)(
        r.activations,
        r.experts,
        ids,
        weights,
        recipe=r.recipe,
        local_expert_offset=r.local_expert_offset,
        finalize_order=r.finalize_order,
        do_finalize=r.do_finalize,
        num_experts=r.num_experts + r.shared_experts,
        output_dtype=r.output_dtype,
        batch_invariant=r.batch_invariant,
        quantize=r.quantize is not None,
    )
    if not r.do_finalize:
        return [rows, weights.bfloat16(), permuted]
    return r.returned(output)


def _implementation(name: str, observe: Observe | None = None) -> FusedMoE:
    if name == "triton":
        from . import moe as ours
    else:
        from . import reference_moe_ops as ours  # type: ignore[no-redef]
    if observe is not None:  # which no op has among its arguments
        return functools.partial(ours._fused_moe, observe=observe)
    return ours.fused_moe


def _choose(r: MoECall) -> str | None:
    """The backend of `auto`, None if none can serve. It never picks the interpreter."""
    for name in ORDER:
        if name == "triton" and r.capability is None:
            continue
        reason = refusal(name, r)
        if reason is None:
            return name
        if r.capability is not None and r.capability >= (10, 0):
            _log_once(name, reason)
    return None


@functools.lru_cache(maxsize=256)
def _log_once(backend: str, reason: str) -> None:
    _log.info("%s cannot serve, falling back: %s", backend, reason)


def _check_backend(backend: str) -> None:
    checks.one_of("backend", backend, ("auto", *ORDER))


def _experts(
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
    for name, given, held in (
        ("local_num_experts", local_num_experts, local - shared_experts),
        ("intermediate_size", intermediate_size, half * 2),
    ):
        checks.integer(name, given)
        if given != held:
            raise ValueError(f"{name} is {given}; it must be {held}, which gemm2_weights hold")
    return Experts(
        gemm1_weights, gemm1_weights_scale, gemm2_weights, gemm2_weights_scale, output1_scale_scalar,
        output1_scale_gate_scalar, output2_scale_scalar,
        hidden if valid_hidden_size is None else valid_hidden_size,
        intermediate_size if valid_intermediate_size is None else valid_intermediate_size,
        activation, gemm1_bias, gemm2_bias, gemm1_alpha, gemm1_beta, gemm1_clamp_limit,
    )  # fmt: skip


def request_of_layer(
    hidden_states: torch.Tensor,
    experts: Experts,
    routing: tuple[torch.Tensor, Any],
    activation: str | None,
    routing_bias: torch.Tensor | None,
    num_experts: int | None,
    local_expert_offset: int,
    fast_math: bool | None,
    build: LayerBuild,
    nvfp4_4over6: Any,
    finalize_order: FinalizeOrder,
    batch_invariant: bool,
    output_dtype: torch.dtype,
    capability: tuple[int, int] | None = None,
) -> MoECall:
    checks.instance("experts", experts, Experts, "Experts, as prepare_experts makes them")
    static = experts.input_scale is not None
    if activation is None:
        activation = "static" if static else "per-token"
    checks.one_of("activation", activation, ("per-token", "static", "bf16"))
    if activation == "static" and not static:
        raise ValueError(
            'activation is "static"; the experts must have been given input_amax for it'
        )
    if activation != "static" and static:
        raise ValueError(
            f'activation is "{activation}"; the experts\' scalars hold static scales, by which its '
            "results would be too large or too small: it must be static, or the experts prepared "
            "without input_amax"
        )
    checks.tensor("hidden_states", hidden_states, (torch.bfloat16,), ("T", experts.hidden_size))
    logits, given, how, num_experts = _routing(
        routing, hidden_states, experts.num_local, num_experts
    )
    if logits is None and routing_bias is not None:
        checks.wrong_value("routing_bias", routing_bias, "None with ids, which are chosen already")
    if experts.router_weight_on_input:
        hidden_states, given = weigh_rows(hidden_states, routing, routing_bias)
        logits, routing_bias, how = None, None, routing_of(1, 1, None, None, None)
    x = hidden_states
    width = experts.padded_hidden_size
    if width != x.shape[1]:
        x = torch.nn.functional.pad(x, (0, width - x.shape[1]))
    names = ("routing[0]", "routing[1]")
    request = make_moe_call(
        Activations(x),
        experts,
        num_experts=num_experts,
        routing=how,
        local_expert_offset=local_expert_offset,
        logits=logits,
        routing_bias=routing_bias,
        topk=given,
        finalize_order=finalize_order,
        batch_invariant=batch_invariant,
        output_dtype=output_dtype,
        nvfp4_4over6=nvfp4_4over6,
        fast_math=fast_math,
        build=build,
        capability=capability,
        quantize=None if activation == "bf16" else activation,  # type: ignore[arg-type]
        topk_names=names,
    )
    check_values(request, names)
    return request


def _routing(
    routing: Any, x: torch.Tensor, num_local: int, num_experts: int | None
) -> tuple[torch.Tensor | None, tuple[torch.Tensor, torch.Tensor] | None, Routing, int]:
    """(logits, (ids, weights), how, experts of all ranks), of which one of the first two is None."""
    allowed = "(logits [T, E], Routing) or (ids int32 [T, K], weights [T, K])"
    checks.pair("routing", routing, allowed)
    first, second = routing
    if isinstance(first, Routing) or not isinstance(second, Routing | torch.Tensor):
        kinds = ", ".join(type(part).__name__ for part in routing)
        raise TypeError(f"routing is ({kinds}); it must be {allowed}")
    if num_experts is not None:
        checks.integer("num_experts", num_experts, num_local)
    tokens = x.shape[0]
    if isinstance(second, Routing):
        floats = (torch.float32, torch.bfloat16)
        columns = "E" if num_experts is None else num_experts
        checks.tensor("routing[0]", first, floats, (tokens, columns), like=("hidden_states", x))
        if first.shape[1] < num_local:
            raise ValueError(
                f"routing[0] is {checks.given(first)}; it must have a column for each expert of all "
                f"ranks, of which {num_local} are here"
            )
        return first, None, second, first.shape[1]
    checks.tensor("routing[0]", first, (torch.int32,), (tokens, "K"), like=("hidden_states", x))
    weights = (torch.bfloat16, torch.float32)
    checks.tensor("routing[1]", second, weights, first.shape, like=("hidden_states", x))
    how = routing_of(1, first.shape[1], None, None, None)
    return None, (first, second), how, num_local if num_experts is None else num_experts


def with_codes(r: MoECall) -> MoECall:
    """The request with its bf16 hidden states quantized."""
    recipe, per_token = r.recipe, r.quantize == "per-token"
    scale = recipe.base_scale_inv if per_token else r.experts.input_scale
    assert scale is not None
    codes = nvfp4_quantize(
        r.activations.hidden_states, scale, _LINEAR,
        per_token_activation=per_token, nvfp4_4over6=recipe.four_over_six,
        fast_math=recipe.math == "fast", build=recipe.build,
    )  # fmt: skip
    return replace(r, activations=Activations(*codes), quantize=None)
