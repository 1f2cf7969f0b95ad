"""One call of the fused mixture of experts: its arguments, checked and packed once."""

# SPDX-License-Identifier: Apache-2.0
from collections.abc import Callable
from dataclasses import KW_ONLY, dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any, Literal, TypeVar, get_args

import torch

from ...reference import checks
from ...reference.activation import check_activation
from ...reference.moe.finalize import FinalizeOrder
from ...reference.moe.hidden_states import Activations
from ...reference.moe.layer import OUTPUT_DTYPES
from ...reference.moe.routing import (
    Routing,
    RoutingMethodType,
    RoutingResult,
    append_shared_experts,
    route,
    unpack_topk,
)
from ...reference.moe.variants import VARIANTS, Variant
from ...reference.recipe import BLOCK_SIZE, LayerBuild, Recipe, SfLayout
from ...reference.weights.experts import Experts
from .. import environment
from ..attributes import reader
from ..device import capability_of
from ..quantize.call import UNSET, check_optional_flags, four_over_six_of, is_unset, math_of

if TYPE_CHECKING:
    from . import routing as in_triton

Quantize = Literal["per-token", "static"]
"""The quantization that bf16 hidden states still need; Triton does "per-token" within its kernels."""

Mode = Literal["per-token", "static", "bf16"]
"""The quantization of hidden states and intermediate; "bf16" means none."""

Observe = Callable[[torch.Tensor, torch.Tensor, torch.Tensor | None], None]
"""It is called with the ids [T, K], the intermediate [T * K, padded I] before it is quantized (bf16, or
fp32 with static scales), and the row of each slot, [T * K] int32, -1 for an expert of another rank. None
in place of the rows: the intermediate is slot by slot."""


TOPK_NAMES = ("topk_ids[0]", "topk_ids[1]")
"""The names that FlashInfer's function has for ids and weights."""
LOGITS_NAMES = ("routing_logits", "")
"""The name that FlashInfer's function has for the logits."""


def padded_columns(rows: torch.Tensor, columns: int) -> torch.Tensor:
    """Return rows with zeros behind their last column, up to `columns`."""
    width = rows.shape[-1]
    return rows if columns == width else torch.nn.functional.pad(rows, (0, columns - width))


def padded_activations(a: Activations, columns: int) -> Activations:
    """Return hidden states of as many columns, zeros behind their own, with zero scales of codes."""
    if a.is_bf16:
        return Activations(padded_columns(a.hidden_states, columns))
    assert a.block_scales is not None
    codes = padded_columns(a.hidden_states, columns // 2)
    scales = padded_columns(a.block_scales, columns // BLOCK_SIZE)
    return Activations(codes, scales, a.per_token_scale)


class LayerMode:
    """The quantization of hidden states and intermediate, from fields that every call has."""

    activations: Activations
    experts: Experts
    recipe: Recipe
    quantize: Quantize | None

    def quantizer_arguments(self) -> tuple[float | torch.Tensor, dict[str, Any]]:
        """Return the scale and the keywords by which bf16 hidden states are to be quantized."""
        recipe, per_token = self.recipe, self.quantize == "per-token"
        scale = recipe.base_scale_inv if per_token else self.experts.input_scale
        assert scale is not None
        return scale, {
            "per_token_activation": per_token,
            "nvfp4_4over6": recipe.four_over_six,
            "fast_math": recipe.math == "fast",
            "build": recipe.build,
        }

    @property
    def is_w4a16(self) -> bool:
        return self.activations.is_bf16 and self.quantize is None

    @property
    def is_static(self) -> bool:
        if self.activations.is_bf16:
            return self.quantize == "static"
        return self.activations.is_static

    @property
    def mode(self) -> Mode:
        """The quantization of hidden states and intermediate."""
        return "static" if self.is_static else "bf16" if self.is_w4a16 else "per-token"


@dataclass(frozen=True)
class KernelCall(LayerMode):
    """The part of a call that kernels read; it crosses `torch.library` (`ops`).

    The routing is given beside it: ids [T, K] int32, and weights [T, K].
    """

    activations: Activations  # bf16 ones may lack the weights' padding columns: `padded`
    experts: Experts
    num_experts: int  # of all ranks, over which the slots are spread; without shared experts
    shared_experts: int = 0
    local_expert_offset: int = 0
    # Of the intermediate. Dynamo of torch 2.11 refuses a default that is an object, used or not.
    recipe: Recipe = field(default_factory=Recipe)
    do_finalize: bool = True
    finalize_order: FinalizeOrder = "flashinfer"
    batch_invariant: bool = False
    output_dtype: torch.dtype = torch.bfloat16
    quantize: Quantize | None = None

    @property
    def all_experts(self) -> int:
        """The number of experts of all ranks, with the shared ones."""
        return self.num_experts + self.shared_experts


@dataclass(frozen=True)
class MoECall(KernelCall):
    """The checked arguments of a fused call; made by `make_moe_call`.

    The routing is one of two: `logits` and how they are routed, or `ids` and `weights`.
    """

    _: KW_ONLY
    routing: Routing
    logits: torch.Tensor | None = None  # [T, E]; None: the routing is given
    routing_bias: torch.Tensor | None = None
    ids: torch.Tensor | None = None  # [T, K] int32, with weights [T, K]
    weights: torch.Tensor | None = None
    build: LayerBuild = "cuda"
    output: torch.Tensor | None = None
    enable_pdl: bool | None = None
    tune_max_num_tokens: int = 8192
    lora_delta: torch.Tensor | None = None
    routing_replay_out: torch.Tensor | None = None  # [>= T, K]: the ids are written into it
    capability: tuple[int, int] | None = None  # of the GPU asked about; None on the CPU
    observe: Observe | None = None

    @property
    def variant(self) -> Variant:
        """Return the variant whose bits the call has."""
        return VARIANTS[self.build]

    @property
    def tokens(self) -> int:
        return self.activations.hidden_states.shape[0]

    @property
    def device(self) -> torch.device:
        return self.activations.hidden_states.device

    def placed(self, output: torch.Tensor) -> list[torch.Tensor]:
        """Return the results of a finalized call, in the caller's tensor if one is given."""
        return [output if self.output is None else self.output.copy_(output)]

    def router(self) -> "in_triton.Router | None":
        """Return the logits as Triton's kernels route them; None where they do not, or have none."""
        if self.logits is None:
            return None
        from . import routing as ours

        return ours.try_router(self.logits, self.routing, self.routing_bias)

    def routed(self, backend: str = "reference") -> tuple[torch.Tensor, torch.Tensor]:
        """Return ids [T, K] int32 and weights [T, K], routed from logits if those are given."""
        if self.logits is None:
            assert self.ids is not None and self.weights is not None
            return self.ids, self.weights
        router = self.router() if backend == "triton" else None
        if router is not None:
            result = RoutingResult(*router.routed(), self.logits)
        else:
            result = route(self.logits, self.routing, self.routing_bias)
        if self.shared_experts:
            result = append_shared_experts(result, self.shared_experts, self.num_experts)
        return result.ids, result.weights_bf16


_Call = TypeVar("_Call", bound=KernelCall)


def padded(call: _Call) -> _Call:
    """Return the call whose hidden states have the weights' columns, zeros behind their own."""
    states, columns = call.activations.hidden_states, call.experts.padded_hidden_size
    if not call.activations.is_bf16 or states.shape[1] == columns:
        return call
    return replace(call, activations=padded_activations(call.activations, columns))


def make_moe_call(
    activations: Activations,
    experts: Experts,
    *,
    num_experts: int,
    routing: Routing | None = None,
    topk: Any = None,
    finalize_order: FinalizeOrder = "flashinfer",
    output_dtype: torch.dtype | None = None,
    nvfp4_4over6: Any = UNSET,
    fast_math: bool | None = None,
    build: LayerBuild = "cuda",
    names: tuple[str, str] | None = None,
    unpadded: bool = False,
    **options: Any,
) -> MoECall:
    """Check what no backend accepts, and resolve what the environment decides.

    Args:
        routing: how `logits`, an option, are routed; None with topk: K is that of the ids.
        topk: ids and weights, or both packed in one tensor.
        names: of the routing's two tensors, for messages; omitted, FlashInfer's.
        unpadded: bf16 hidden states have [T, hidden size], without padding columns.
        options: other fields of `MoECall`.

    Raises:
        ValueError, TypeError: one argument, what was given and what is allowed.
    """
    check_optional_flags(fast_math=fast_math)
    checks.one_of("finalize_order", finalize_order, get_args(FinalizeOrder))
    checks.one_of("build", build, get_args(LayerBuild))
    checks.integer("num_experts", num_experts, 1)
    check_experts(experts)
    columns = experts.hidden_size if unpadded else experts.padded_hidden_size
    tokens = _check_activations(activations, experts, columns)
    if topk is not None:
        top_k = "K" if routing is None else routing.top_k
        options["ids"], options["weights"] = _topk(topk, tokens, top_k, names or TOPK_NAMES)
        if routing is None:
            routing = routing_of(1, options["ids"].shape[1], None, None, None)
    assert routing is not None, "with logits"
    output, batch_invariant = options.get("output"), options.get("batch_invariant")
    if output_dtype is None:
        output_dtype = output.dtype if isinstance(output, torch.Tensor) else torch.bfloat16
    config = (
        environment.four_over_six() if is_unset(nvfp4_4over6) else four_over_six_of(nvfp4_4over6)
    )
    quantizers = VARIANTS[build].quantizers
    call = MoECall(
        activations,
        experts,
        num_experts,
        routing=routing,
        recipe=Recipe(math_of(fast_math, quantizers), config, quantizers),
        build=build,
        finalize_order="slot" if batch_invariant else finalize_order,
        output_dtype=output_dtype,
        capability=capability_of(activations.hidden_states),
        **options,
    )
    _check_options(call)
    if topk is None:
        _check_logits(call, (names or LOGITS_NAMES)[0])
    _check_placement(call)
    _check_devices(call, names)
    return call


def _check_options(call: MoECall) -> None:
    checks.flag("do_finalize", call.do_finalize)
    checks.flag("batch_invariant", call.batch_invariant)
    check_optional_flags(enable_pdl=call.enable_pdl)
    checks.integer("num_fused_shared_experts", call.shared_experts, 0)
    if call.shared_experts and (call.logits is None or not call.routing.grouped):
        raise ValueError(
            f"num_fused_shared_experts is {call.shared_experts}; only DeepSeekV3 with groups, routed "
            "from logits, has any"
        )
    shape = (call.tokens, call.experts.hidden_size)
    if call.output is not None:
        checks.tensor("output", call.output, OUTPUT_DTYPES, shape, contiguous=True)
    if call.output_dtype not in OUTPUT_DTYPES:
        allowed = checks.any_of(map(str, OUTPUT_DTYPES))
        checks.wrong_value("output_dtype", call.output_dtype, allowed)
    _check_variant(call)


def _check_variant(call: MoECall) -> None:
    """The limits of a variant on every backend."""
    layout = call.variant.layout
    if not call.variant.static_only or layout is None:
        return
    if not layout.is_in(call.experts) or not call.is_static or not call.do_finalize:
        raise ValueError(
            f'build is "{call.build}", a layer of static scales, finalized, whose experts come from '
            f"nvfp4_moe.{layout.add.__name__}"
        )


def _check_placement(call: MoECall) -> None:
    """Check that the local experts are among those of all ranks."""
    offset, shared = call.local_expert_offset, call.shared_experts
    checks.integer("local_expert_offset", offset)
    local = call.experts.num_local
    most = call.all_experts - local
    if not 0 <= offset <= most or (shared and most):
        raise ValueError(
            f"local_expert_offset is {offset}; with {local} local experts of {call.num_experts} + "
            f"{shared} shared it must be 0 to {most}, and shared experts need them all"
        )


def _want(name: str, t: Any, dtypes: tuple[torch.dtype, ...], shape: tuple[int | str, ...]) -> None:
    checks.tensor(name, t, dtypes, shape, contiguous=True)


def check_experts(e: Experts) -> None:
    check_activation(e.activation)
    w1, w2 = e.gemm1_weights, e.gemm2_weights
    u8, f8, f32 = (torch.uint8,), (torch.float8_e4m3fn,), (torch.float32,)
    checks.tensor("gemm1_weights", w1, u8, ("experts", "rows", "H/2"))
    local, rows, half = w1.shape
    hidden, gated = half * 2, e.activation.gated
    if rows % 128 or hidden % 128:
        raise ValueError(
            f"gemm1_weights is {checks.given(w1)}; its rows, and H = {hidden}, must be multiples of "
            "128: pad with zeros and give valid_hidden_size or valid_intermediate_size"
        )
    intermediate = rows // 2 if gated else rows
    _want("gemm1_weights", w1, u8, (local, rows, half))
    _want("gemm2_weights", w2, u8, (local, hidden, intermediate // 2))
    for name, columns in (("gemm1", hidden), ("gemm2", intermediate)):
        name, height = f"{name}_weights_scale", rows if name == "gemm1" else hidden
        _want(name, getattr(e, name), f8, (local, height, columns // BLOCK_SIZE))
    for name in ("output1_scale_scalar", "output1_scale_gate_scalar", "output2_scale_scalar"):
        _want(name, getattr(e, name), f32, (local,))
    for name in ("alpha", "beta", "clamp_limit"):
        value = getattr(e, f"gemm1_{name}")
        if value is None:
            continue
        _want(f"gemm1_{name}", value, f32, (local,))
        if name not in e.activation.parameters:
            raise ValueError(
                f"gemm1_{name} is {checks.given(value)}; it must be None with activation "
                f"{e.activation.name}, which does not read it"
            )
    if e.gemm1_bias is not None:
        _want("gemm1_bias", e.gemm1_bias, f32, (local, rows))
    if e.gemm2_bias is not None:
        _want("gemm2_bias", e.gemm2_bias, f32, (local, hidden))
    for name, value, most in (
        ("valid_hidden_size", e.hidden_size, hidden),
        ("valid_intermediate_size", e.intermediate_size, intermediate),
    ):
        checks.integer(name, value)
        if not most - 128 < value <= most or value % BLOCK_SIZE:
            raise ValueError(
                f"{name} is {value}; of {most} padded it must be a multiple of {BLOCK_SIZE} above "
                f"{most - 128}"
            )


def activation_mode(activation: Mode | None, experts: Experts) -> Mode:
    """Return how hidden states are quantized; None means as the experts' scales say."""
    static = experts.input_scale is not None
    if activation is None:
        activation = "static" if static else "per-token"
    checks.one_of("activation", activation, get_args(Mode))
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
    return activation


def _check_activations(a: Activations, e: Experts, columns: int) -> int:
    """Return the number of tokens; bf16 hidden states must have `columns`."""
    states, hidden = a.hidden_states, e.padded_hidden_size
    checks.tensor(
        "hidden_states", states, (torch.uint8, torch.bfloat16), ("T", "H/2, or H of bf16")
    )
    tokens = states.shape[0]
    if a.is_bf16:
        _want("hidden_states", states, (torch.bfloat16,), (tokens, columns))
        for name, value in (
            ("hidden_states_scale", a.block_scales),
            ("per_token_scale", a.per_token_scale),
        ):
            if value is not None:
                checks.wrong_value(name, value, "None with bfloat16 hidden_states")
        return tokens
    _want("hidden_states", states, (torch.uint8,), (tokens, hidden // 2))
    scales, blocks = a.block_scales, hidden // BLOCK_SIZE
    dtypes = (torch.float8_e4m3fn, torch.uint8)
    if scales is None or scales.numel() != tokens * blocks:  # FlashInfer, too, asks for no shape
        wanted = f"a tensor of float8_e4m3fn [{tokens}, {blocks}], linear"
        checks.wrong_value("hidden_states_scale", scales, wanted)
    checks.tensor("hidden_states_scale", scales, dtypes, contiguous=True)
    if a.per_token_scale is not None:
        _want("per_token_scale", a.per_token_scale, (torch.float32,), (tokens,))
    return tokens


def _check_logits(call: MoECall, name: str) -> None:
    checks.integer("top_k", call.routing.top_k, 1, call.num_experts)
    floats = (torch.float32, torch.bfloat16)
    _want(name, call.logits, floats, (call.tokens, call.num_experts))
    if call.routing_bias is not None:
        _want("routing_bias", call.routing_bias, floats, (call.num_experts,))


def _topk(
    topk: Any, tokens: int, top_k: int | str, names: tuple[str, str]
) -> tuple[torch.Tensor, torch.Tensor]:
    shape: tuple[int | str, ...] = (tokens, top_k)
    if isinstance(topk, torch.Tensor):
        _want("topk_ids", topk, (torch.int32,), shape)
        return unpack_topk(topk)
    checks.pair("topk_ids", topk, "packed int32 [T, K] or (ids, weights)")
    ids, weights = topk
    _want(names[0], ids, (torch.int32,), shape)
    _want(names[1], weights, (torch.bfloat16, torch.float32), tuple(ids.shape))
    return ids, weights


def check_values(r: MoECall, names: tuple[str, str] = TOPK_NAMES) -> None:
    """Raise for an id that is no expert's, and for a NaN weight of an expert, where they can be read.

    It is apart from `make_moe_call`, so that a call which was recorded on a GPU can be replayed
    anywhere. An id of -1 stands for no expert, whose weight is not read.

    Args:
        names: of ids and weights, for the message.
    """
    if r.ids is None or r.weights is None or not checks.reads_values(r.ids, r.weights):
        return
    last = r.num_experts + r.shared_experts - 1
    known = (r.ids >= -1) & (r.ids <= last)
    checks.values(names[0], r.ids, known, f"-1 (no expert) or from 0 to {last}")
    checks.values(names[1], r.weights, ~r.weights.isnan() | (r.ids < 0), "no NaN")


_DEVICE_NAMES = (
    *(f.name for f in fields(Experts) if f.type in (torch.Tensor, torch.Tensor | None)),
    "hidden_states_scale",
    "per_token_scale",
    "routing_bias",
    "output",
)
_DEVICE_TENSORS = reader(
    *(f"experts.{name}" for name in _DEVICE_NAMES[:-4]),
    "activations.block_scales",
    "activations.per_token_scale",
    "routing_bias",
    "output",
)


def _check_devices(call: MoECall, names: tuple[str, str] | None) -> None:
    states = call.activations.hidden_states
    given = call.logits is None
    first, second = names or (TOPK_NAMES if given else LOGITS_NAMES)
    routing = (call.ids, call.weights) if given else (call.logits, None)
    for name, t in zip(
        (*_DEVICE_NAMES, first, second), (*_DEVICE_TENSORS(call), *routing), strict=True
    ):
        if t is not None and t.device != states.device:
            checks.same_device(name, t, "hidden_states", states)


def routing_of(
    method: Any,
    top_k: int,
    n_group: int | None,
    topk_group: int | None,
    routed_scaling_factor: float | None,
    norm_topk_prob: bool = True,
) -> Routing:
    """Return FlashInfer's routing keywords as one value."""
    try:
        kind = RoutingMethodType(int(method))
    except (TypeError, ValueError):
        raise ValueError(
            f"routing_method_type is {checks.given(method)}; it must be 0 to 9 "
            f"({RoutingMethodType.__name__})"
        ) from None
    return Routing(kind, top_k, n_group, topk_group, routed_scaling_factor, norm_topk_prob)


def check_linear(layout: Any) -> None:
    """Check `hidden_states_scale_layout`: it is linear or omitted."""
    if layout is not None and layout != SfLayout.layout_linear:
        checks.wrong_value(
            "hidden_states_scale_layout",
            layout,
            "layout_linear, in which every backend reads hidden_states_scale",
        )
