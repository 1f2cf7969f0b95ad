"""One call of the fused mixture of experts, checked: what every backend is asked and judged by."""

# SPDX-License-Identifier: Apache-2.0
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any, Literal, get_args

import torch

from ..reference.activation import ActivationType
from ..reference.experts import Experts
from ..reference.moe import OUTPUT_DTYPES, Activations, FinalizeOrder
from ..reference.recipe import BLOCK_SIZE, Build, LayerBuild, Recipe, SfLayout
from ..reference.routing import (
    Routing,
    RoutingMethodType,
    append_shared_experts,
    route,
    unpack_topk,
)
from . import environment
from .capability import capability_of
from .request import UNSET, four_over_six_of, is_unset, math_of

Quantize = Literal["per-token", "static"]
"""What is still to be done to bf16 hidden states; Triton does the first on its way."""

Observe = Callable[[torch.Tensor, torch.Tensor, torch.Tensor | None], None]
"""Is shown ids [T, K], the intermediate [T * K, padded I] before it is quantized (bf16, fp32 with static
scales), and the row of each slot, [T * K] int32, -1 held elsewhere; None: slot by slot, all there."""


@dataclass(frozen=True)
class MoERequest:
    """The arguments of a fused call, normalized; made by `make_moe_request`, which checks them."""

    activations: Activations
    experts: Experts
    num_experts: int
    local_expert_offset: int
    routing: Routing
    logits: torch.Tensor | None  # [T, E]; None: the routing is given
    routing_bias: torch.Tensor | None
    ids: torch.Tensor | None  # [T, K] int32, with weights [T, K]
    weights: torch.Tensor | None
    recipe: Recipe  # of the intermediate
    build: LayerBuild
    explicit_4over6: bool
    do_finalize: bool
    finalize_order: FinalizeOrder
    batch_invariant: bool
    output: torch.Tensor | None
    output_dtype: torch.dtype
    enable_pdl: bool | None
    tune_max_num_tokens: int
    lora_delta: torch.Tensor | None
    shared_experts: int
    capability: tuple[int, int] | None  # of the GPU asked about; None on the CPU
    quantize: Quantize | None = None
    observe: Observe | None = None

    @property
    def is_w4a16(self) -> bool:
        return self.activations.is_bf16 and self.quantize is None

    @property
    def is_static(self) -> bool:
        if self.activations.is_bf16:
            return self.quantize == "static"
        return self.activations.is_static

    @property
    def tokens(self) -> int:
        return self.activations.hidden_states.shape[0]

    @property
    def device(self) -> torch.device:
        return self.activations.hidden_states.device

    def returned(self, output: torch.Tensor) -> list[torch.Tensor]:
        """What a finalized call returns: in the caller's tensor where one is given."""
        return [output if self.output is None else self.output.copy_(output)]

    def routed(self, backend: str = "reference") -> tuple[torch.Tensor, torch.Tensor]:
        """(ids [T, K] int32, weights [T, K]), from the logits where those are given."""
        if self.logits is None:
            assert self.ids is not None and self.weights is not None
            return self.ids, self.weights
        if backend == "triton":
            from . import routing as ours

            if ours.refusal(self.routing) is None:
                return ours.route(self.logits, self.routing, self.routing_bias)
        result = route(self.logits, self.routing, self.routing_bias)
        result = append_shared_experts(result, self.shared_experts, self.num_experts)
        return result.ids, result.weights_bf16


def make_moe_request(
    activations: Activations,
    experts: Experts,
    *,
    num_experts: int,
    routing: Routing,
    local_expert_offset: int = 0,
    logits: torch.Tensor | None = None,
    routing_bias: torch.Tensor | None = None,
    topk: Any = None,
    do_finalize: bool = True,
    finalize_order: FinalizeOrder = "flashinfer",
    batch_invariant: bool = False,
    output: torch.Tensor | None = None,
    output_dtype: torch.dtype | None = None,
    enable_pdl: bool | None = None,
    tune_max_num_tokens: int = 8192,
    lora_delta: torch.Tensor | None = None,
    shared_experts: int = 0,
    nvfp4_4over6: Any = UNSET,
    fast_math: bool | None = None,
    build: LayerBuild = "cuda",
    capability: tuple[int, int] | None = None,
    quantize: Quantize | None = None,
) -> MoERequest:
    """Check what no backend accepts, and resolve what the environment decides.

    Raises:
        ValueError, TypeError: one argument, what was given and what is allowed.
    """
    _check_experts(experts)
    tokens = _check_activations(activations, experts)
    ids = weights = None
    if topk is None:
        _check_logits(logits, routing_bias, tokens, num_experts, routing)
    else:
        ids, weights = _topk(topk, tokens, routing.top_k)
    if shared_experts and (topk is not None or not routing.grouped):
        raise ValueError(
            f"num_fused_shared_experts is {shared_experts}; only DeepSeekV3 with groups, routed from "
            "logits, has any"
        )
    most = num_experts + shared_experts - experts.num_local
    if not 0 <= local_expert_offset <= most or (shared_experts and most):
        raise ValueError(
            f"local_expert_offset is {local_expert_offset}; with {experts.num_local} local experts "
            f"of {num_experts} + {shared_experts} shared it must be 0 to {most}, and shared experts "
            "need them all"
        )
    if finalize_order not in ("flashinfer", "slot"):
        raise ValueError(f"finalize_order is {finalize_order!r}; it must be flashinfer or slot")
    width = experts.hidden_size
    if output is not None and (
        output.dtype not in OUTPUT_DTYPES
        or tuple(output.shape) != (tokens, width)
        or not output.is_contiguous()
    ):
        raise ValueError(
            f"output is {output.dtype} of shape {tuple(output.shape)}; it must be contiguous "
            f"({tokens}, {width}), bfloat16, float16 or float32"
        )
    if output_dtype is None:
        output_dtype = torch.bfloat16 if output is None else output.dtype
    if output_dtype not in OUTPUT_DTYPES:
        raise ValueError(
            f"output_dtype is {output_dtype}; it must be torch.bfloat16, float16 or float32"
        )
    _check_devices(activations, experts, logits, routing_bias, ids, weights, output)
    explicit = not is_unset(nvfp4_4over6)
    config = four_over_six_of(nvfp4_4over6) if explicit else environment.four_over_six()
    if build not in get_args(LayerBuild):
        raise ValueError(f"build is {build!r}; it must be one of {get_args(LayerBuild)}")
    quantizers: Build = "cuda" if build == "cutlass" else build
    math = math_of(fast_math, quantizers)
    if capability is None:
        capability = capability_of(activations.hidden_states)
    request = MoERequest(
        activations, experts, num_experts, local_expert_offset, routing, logits, routing_bias, ids,
        weights, Recipe(math, config, quantizers), build, explicit, do_finalize,
        "slot" if batch_invariant else finalize_order, batch_invariant, output, output_dtype,
        enable_pdl, tune_max_num_tokens, lora_delta, shared_experts, capability,
        quantize,
    )  # fmt: skip
    if build == "cutlass" and (experts.cutlass is None or not request.is_static or not do_finalize):
        raise ValueError(
            'build is "cutlass", a layer of static scales, finalized, whose experts come from '
            "nvfp4_moe.with_cutlass"
        )
    return request


def _want(name: str, t: Any, dtypes: tuple[torch.dtype, ...], shape: tuple[int, ...]) -> None:
    allowed = " or ".join(str(d).removeprefix("torch.") for d in dtypes)
    if not isinstance(t, torch.Tensor):
        raise TypeError(f"{name} is {type(t).__name__}; it must be a tensor, {allowed} {shape}")
    if t.dtype not in dtypes or tuple(t.shape) != shape:
        given = str(t.dtype).removeprefix("torch.")
        raise ValueError(f"{name} is {given} {tuple(t.shape)}; it must be {allowed} {shape}")
    if not t.is_contiguous():
        raise ValueError(f"{name} is not contiguous (strides {t.stride()}); it must be")


def _check_experts(e: Experts) -> None:
    if not isinstance(e.activation, ActivationType) or not e.activation.implemented:
        names = ", ".join(a.name for a in ActivationType if a.implemented)
        raise ValueError(f"activation_type is {e.activation!r}; it must be one of {names}")
    w1, w2 = e.gemm1_weights, e.gemm2_weights
    for name, w in (("gemm1_weights", w1), ("gemm2_weights", w2)):
        if not isinstance(w, torch.Tensor) or w.dim() != 3:
            raise ValueError(
                f"{name} must be a tensor of 3 dimensions: [experts, rows, columns / 2]"
            )
    local, rows, half = w1.shape
    hidden, gated = half * 2, e.activation.gated
    if rows % 128 or hidden % 128:
        raise ValueError(
            f"gemm1_weights has shape {tuple(w1.shape)}; its rows, and H = {hidden}, must be multiples "
            "of 128: pad with zeros and give valid_hidden_size or valid_intermediate_size"
        )
    intermediate = rows // 2 if gated else rows
    u8, f8, f32 = (torch.uint8,), (torch.float8_e4m3fn,), (torch.float32,)
    _want("gemm1_weights", w1, u8, (local, rows, half))
    _want("gemm2_weights", w2, u8, (local, hidden, intermediate // 2))
    _want("gemm1_weights_scale", e.gemm1_weights_scale, f8, (local, rows, hidden // BLOCK_SIZE))
    _want(
        "gemm2_weights_scale",
        e.gemm2_weights_scale,
        f8,
        (local, hidden, intermediate // BLOCK_SIZE),
    )
    for name in ("output1_scale_scalar", "output1_scale_gate_scalar", "output2_scale_scalar"):
        _want(name, getattr(e, name), f32, (local,))
    for name in ("alpha", "beta", "clamp_limit"):
        value = getattr(e, f"gemm1_{name}")
        if value is None:
            continue
        _want(f"gemm1_{name}", value, f32, (local,))
        if name not in e.activation.parameters:
            raise ValueError(f"gemm1_{name} is given, which activation {e.activation.name} has not")
    if e.gemm1_bias is not None:
        _want("gemm1_bias", e.gemm1_bias, f32, (local, rows))
    if e.gemm2_bias is not None:
        _want("gemm2_bias", e.gemm2_bias, f32, (local, hidden))
    for name, value, most in (
        ("valid_hidden_size", e.hidden_size, hidden),
        ("valid_intermediate_size", e.intermediate_size, intermediate),
    ):
        if not most - 128 < value <= most or value % BLOCK_SIZE:
            raise ValueError(
                f"{name} is {value}; of {most} padded it must be a multiple of {BLOCK_SIZE} above "
                f"{most - 128}"
            )


def _check_activations(a: Activations, e: Experts) -> int:
    states, hidden = a.hidden_states, e.padded_hidden_size
    if not isinstance(states, torch.Tensor) or states.dim() != 2:
        raise ValueError("hidden_states must be a tensor of 2 dimensions")
    tokens = states.shape[0]
    if a.is_bf16:
        _want("hidden_states", states, (torch.bfloat16,), (tokens, hidden))
        if a.block_scales is not None or a.per_token_scale is not None:
            raise ValueError(
                "hidden_states_scale and per_token_scale must be None with bf16 hidden_states"
            )
        return tokens
    _want("hidden_states", states, (torch.uint8,), (tokens, hidden // 2))
    scales = a.block_scales
    if scales is None:
        raise ValueError("hidden_states_scale is None; NVFP4 hidden_states need their block scales")
    if scales.dtype not in (torch.float8_e4m3fn, torch.uint8) or (
        scales.numel() != tokens * hidden // BLOCK_SIZE or not scales.is_contiguous()
    ):
        raise ValueError(
            f"hidden_states_scale is {scales.dtype} of shape {tuple(scales.shape)}, strides "
            f"{scales.stride()}; it must be float8_e4m3fn of {tokens} x {hidden // BLOCK_SIZE} "
            "elements, linear, contiguous"
        )
    if a.per_token_scale is not None:
        _want("per_token_scale", a.per_token_scale, (torch.float32,), (tokens,))
    return tokens


def _check_logits(
    logits: torch.Tensor | None,
    bias: torch.Tensor | None,
    tokens: int,
    num_experts: int,
    routing: Routing,
) -> None:
    if routing.top_k > num_experts:
        raise ValueError(f"top_k is {routing.top_k}; of {num_experts} experts it is at most that")
    floats = (torch.float32, torch.bfloat16)
    _want("routing_logits", logits, floats, (tokens, num_experts))
    if bias is not None:
        _want("routing_bias", bias, floats, (num_experts,))


def _topk(topk: Any, tokens: int, top_k: int) -> tuple[torch.Tensor, torch.Tensor]:
    shape = (tokens, top_k)
    if isinstance(topk, torch.Tensor):
        _want("topk_ids", topk, (torch.int32,), shape)
        return unpack_topk(topk)
    if not isinstance(topk, tuple | list) or len(topk) != 2:
        raise TypeError(
            f"topk_ids is {type(topk).__name__}; it must be packed int32 or (ids, weights)"
        )
    ids, weights = topk
    _want("topk_ids[0]", ids, (torch.int32,), shape)
    _want("topk_ids[1]", weights, (torch.bfloat16, torch.float32), shape)
    return ids, weights


def _check_devices(a: Activations, e: Experts, *others: torch.Tensor | None) -> None:
    device = a.hidden_states.device
    held = {f.name: getattr(e, f.name) for f in fields(e)}
    held |= {"hidden_states_scale": a.block_scales, "per_token_scale": a.per_token_scale}
    names = ("routing_logits", "routing_bias", "topk_ids[0]", "topk_ids[1]", "output")
    held |= dict(zip(names, others, strict=True))
    for name, t in held.items():
        if isinstance(t, torch.Tensor) and t.device != device:
            raise ValueError(f"{name} is on {t.device}; hidden_states are on {device}")


def routing_of(
    method: Any,
    top_k: int,
    n_group: int | None,
    topk_group: int | None,
    routed_scaling_factor: float | None,
    norm_topk_prob: bool = True,
) -> Routing:
    """FlashInfer's routing keywords as one value."""
    try:
        kind = RoutingMethodType(int(method))
    except (TypeError, ValueError):
        raise ValueError(
            f"routing_method_type is {method!r}; it must be 0 to 9 ({RoutingMethodType.__name__})"
        ) from None
    return Routing(kind, top_k, n_group, topk_group, routed_scaling_factor, norm_topk_prob)


def check_linear(layout: Any) -> None:
    """`hidden_states_scale_layout`: linear, or not said."""
    if layout is not None and int(layout) != SfLayout.layout_linear:
        raise ValueError(
            f"hidden_states_scale_layout is {layout!r}; it must be layout_linear, in which every "
            "backend reads hidden_states_scale"
        )
