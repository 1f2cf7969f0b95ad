"""Route in one Triton kernel, a program for each token: `reference.moe.routing`.

Experts, ties and weights are the reference's, to the bit: scores are compared by integer keys, and sums
have the reference's order. Exact functions are rounded from fp64: only an fp64 value that lies next to
an fp32 rounding border may round to the other side. A GPU's functions are its instructions.
"""

# SPDX-License-Identifier: Apache-2.0
import functools
from dataclasses import dataclass, fields

import torch
import triton
import triton.language as tl

from ...reference.moe.routing import (
    METHODS,
    Routing,
    RoutingMethodType,
    indivisible,
    one_block_a_token,
)
from ...reference.numerics import functions
from ...reference.numerics.fp32 import rcp_delta
from ..attributes import reader
from ..backends import log_fallback
from ..dispatch import Direct
from ..instruction_probe import functions_that_differ
from ..jit.arithmetic import add, div, flush, larger, log2, mul, rcp, to_bf16
from ..jit.instructions import LOG2E, ex2_approx, tanh_approx
from ..jit.pdl import await_previous
from ..launcher import launch, next_power_of_2
from ..records import recorder
from ..triton_target import INTERPRETING, arch, launch_options

RENORMALIZE = tl.constexpr(int(RoutingMethodType.Renormalize))
RENORMALIZE_NAIVE = tl.constexpr(int(RoutingMethodType.RenormalizeNaive))
TOP_K_SIGMOID = tl.constexpr(int(RoutingMethodType.TopKSigmoid))
LLAMA4 = tl.constexpr(int(RoutingMethodType.Llama4))
DEFAULT = tl.constexpr(int(RoutingMethodType.Default))
SIGMOID_RENORM = tl.constexpr(int(RoutingMethodType.SigmoidRenorm))
RAW_METHODS = tl.constexpr(tuple(int(method) for method in METHODS if method.raw))
NOTHING = tl.constexpr(-(2**31))
"""Below the key of every expert."""
MOST_GROUPS = 32
"""The kernel unrolls a step for each chosen group. FlashInfer's has at most 8 groups."""
BIASED_METHODS = tl.constexpr(tuple(int(method) for method in METHODS if method.biased))


@triton.constexpr_function
def is_raw(method):
    return method in RAW_METHODS.value


@triton.constexpr_function
def is_biased(method):
    return method in BIASED_METHODS.value


@triton.constexpr_function
def slots_of(k):
    """Return the least power of two >= k."""
    return 1 << (k - 1).bit_length()


@triton.jit
def _sigmoid(x, table_ptr, APPROXIMATE: tl.constexpr, ARCH: tl.constexpr):
    """Return 0.5 * tanh(0.5 * x) + 0.5, so that scores near 0 tie at multiples of 2^-25."""
    if APPROXIMATE:
        return 0.5 * tanh_approx(mul(x, tl.zeros_like(x) + 0.5, True, ARCH), table_ptr, ARCH) + 0.5
    e = tl.exp(-tl.abs(x.to(tl.float64)))
    half = ((1.0 - e) / (1.0 + e)).to(tl.float32)
    return 0.5 * tl.where(x < 0, -half, half) + 0.5


@triton.jit
def _exp(x, table_ptr, APPROXIMATE: tl.constexpr, ARCH: tl.constexpr):
    if APPROXIMATE:
        return ex2_approx(mul(x, tl.zeros_like(x) + LOG2E, True, ARCH), table_ptr, ARCH)
    return flush(tl.exp(x.to(tl.float64)).to(tl.float32), True, ARCH)


@triton.jit
def _share(x, total, rcp_delta_ptr, APPROXIMATE: tl.constexpr, ARCH: tl.constexpr):
    """Return x / total, of a scalar."""
    total = tl.zeros_like(x) + total
    if APPROXIMATE:
        return mul(x, rcp(total, rcp_delta_ptr, ARCH), True, ARCH)
    return div(x, total, True, ARCH)


@triton.jit
def _sum_of_all(x, BY_BLOCKS: tl.constexpr, ARCH: tl.constexpr):
    """Sum numbers of no sign in the order of FlashInfer's kernels of Default (`_softmax_of_all`)."""
    LANES: tl.constexpr = 32 if x.shape[0] > 32 else x.shape[0]
    WARPS: tl.constexpr = x.shape[0] // LANES
    x = tl.reshape(x, (WARPS, LANES))
    if BY_BLOCKS:
        for _ in tl.static_range(log2(LANES)):
            x = tl.sum(tl.reshape(x, (WARPS, x.shape[1] // 2, 2)), 2)
    warp = tl.arange(0, WARPS)[:, None]
    total = tl.sum(tl.where(warp == 0, x, 0.0), 0)
    for i in tl.static_range(1, WARPS):
        total = add(total, tl.sum(tl.where(warp == i, x, 0.0), 0), True, ARCH)
    return _warp_sum(total)


@triton.jit
def _warp_sum(x):
    """Sum by a butterfly, lane i with lane i + width / 2: sums of two, which commute."""
    LEVELS: tl.constexpr = log2(x.shape[0])
    for _ in tl.static_range(LEVELS):
        x = tl.sum(tl.reshape(x, (2, x.shape[0] // 2)), 0)
    return tl.sum(x, 0)


@triton.jit
def _key(x, COMPUTED: tl.constexpr, ARCH: tl.constexpr):
    """Return sign-magnitude integers, as the kernels of FlashInfer compare."""
    bits = x.to(tl.int32, bitcast=True)
    if COMPUTED and ARCH == 0:  # a GPU's arithmetic makes positive NaN only; the host's does not
        bits = tl.where(x == x, bits, 0x7FC00000)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def _in_best_groups(
    key, score, GROUPS: tl.constexpr, TOP: tl.constexpr, LANES: tl.constexpr, ARCH: tl.constexpr
):
    """Return where the TOP groups are whose two best scores have the largest sums.

    `key` int32 and `score` fp32 hold LANES of each group, one group after another.
    """
    ROWS: tl.constexpr = key.shape[0] // LANES
    key = tl.reshape(key, (ROWS, LANES))
    score = tl.reshape(score.to(tl.int32, bitcast=True), (ROWS, LANES))
    lane = tl.arange(0, LANES)[None, :]
    first = _first_of_best(key, lane, LANES)
    second = _first_of_best(tl.where(lane == first, NOTHING, key), lane, LANES)
    best = tl.sum(tl.where(lane == first, score, 0), 1).to(tl.float32, bitcast=True)
    next_best = tl.sum(tl.where(lane == second, score, 0), 1).to(tl.float32, bitcast=True)
    group = tl.arange(0, ROWS)
    sums = _key(add(best, next_best, True, ARCH), True, ARCH)
    sums = tl.where(group < GROUPS, sums, NOTHING)
    chosen = tl.zeros((ROWS,), tl.int32)
    for _ in tl.static_range(TOP):
        largest = tl.min(tl.where(sums == tl.max(sums, 0), group, ROWS), 0)
        chosen = tl.where(group == largest, 1, chosen)
        sums = tl.where(group == largest, NOTHING, sums)
    return tl.reshape(tl.broadcast_to(chosen[:, None], (ROWS, LANES)), (ROWS * LANES,)) != 0


@triton.jit
def _first_of_best(key, lane, LANES: tl.constexpr):
    """Return the lane of each row's largest key, the smallest of several: [rows, 1]."""
    best = tl.max(key, 1, keep_dims=True)
    return tl.min(tl.where(key == best, lane, LANES), 1, keep_dims=True)


@triton.jit
def slot_weights(
    chosen, scale, table_ptr, rcp_delta_ptr, K: tl.constexpr, METHOD: tl.constexpr,
    NORM: tl.constexpr, SLOTS: tl.constexpr, ARCH: tl.constexpr, APPROXIMATE: tl.constexpr,
):  # fmt: skip
    """Return a token's weights, fp32 [SLOTS], from the values of its K experts."""
    live = tl.arange(0, SLOTS) < K
    if METHOD == RENORMALIZE or METHOD == RENORMALIZE_NAIVE:
        top = tl.max(tl.where(live, chosen, float("-inf")), 0)
        e = tl.where(live, _exp(chosen - top, table_ptr, APPROXIMATE, ARCH), 0.0)
        weight = _share(e, _warp_sum(e), rcp_delta_ptr, APPROXIMATE, ARCH)
    elif METHOD == LLAMA4 or METHOD == TOP_K_SIGMOID:
        weight = _sigmoid(chosen, table_ptr, APPROXIMATE, ARCH)
    elif is_biased(METHOD):
        total = _warp_sum(tl.where(live, chosen, 0.0)) + 1e-20
        scaled = mul(chosen, tl.zeros_like(chosen) + scale, True, ARCH)
        weight = _share(scaled, total, rcp_delta_ptr, APPROXIMATE, ARCH)
    elif METHOD == SIGMOID_RENORM and NORM:
        total = larger(_warp_sum(tl.where(live, chosen, 0.0)), 1e-20, ARCH)
        weight = _share(chosen, total, rcp_delta_ptr, APPROXIMATE, ARCH)
    else:
        weight = chosen
    return weight


@triton.jit
def raw_scores(x, METHOD: tl.constexpr):
    """Return the scores of a method that compares logits: for Llama4 NaN is the lowest."""
    if METHOD == LLAMA4:
        x = tl.where(x == x, x, float("-inf"))
    return x


@triton.jit
def store_experts(
    logits_ptr, ids_ptr, T, E, K: tl.constexpr, METHOD: tl.constexpr, ROWS: tl.constexpr,
    WIDTH: tl.constexpr, ARCH: tl.constexpr,
):  # fmt: skip
    """Write the experts of all T tokens by a method that compares logits, int32 [T, K].

    They are those of `route_kernel`. A row of [ROWS, WIDTH] is in one warp if each warp has a row, and
    an expert's lane writes it, so that the warps do not wait for one another.

    Args:
        logits_ptr: [T, E] fp32 or bf16.
        ROWS: a power of two >= T.
        WIDTH: a power of two >= E.
    """
    token = tl.arange(0, ROWS)[:, None]
    expert = tl.arange(0, WIDTH)[None, :]
    left = (token < T) & (expert < E)
    x = tl.load(logits_ptr + token * E + expert, left, other=float("-inf")).to(tl.float32)
    key = tl.where(left, _key(raw_scores(x, METHOD), False, ARCH), NOTHING)
    slot = tl.full((ROWS, WIDTH), K, tl.int32)
    for i in tl.static_range(K):
        best = tl.max(key, 1, keep_dims=True)
        first = tl.min(tl.where(left & (key == best), expert, WIDTH), 1, keep_dims=True)
        slot = tl.where(expert == first, i, slot)
        left = left & (expert != first)
        key = tl.where(expert == first, NOTHING, key)
    tl.store(ids_ptr + token * K + slot, tl.broadcast_to(expert, (ROWS, WIDTH)), slot < K)


@triton.jit
def store_weights(
    logits_ptr, ids_ptr, weights_ptr, token, E, table_ptr, rcp_delta_ptr, K: tl.constexpr,
    METHOD: tl.constexpr, ARCH: tl.constexpr, APPROXIMATE: tl.constexpr,
):  # fmt: skip
    """Write a token's weights, bf16 [K], by a method that compares logits: those of `route_kernel`.

    Args:
        ids_ptr: [T, K], by `store_experts`.
    """
    SLOTS: tl.constexpr = slots_of(K)
    slot = tl.arange(0, SLOTS)
    expert = tl.load(ids_ptr + token * K + slot, slot < K, other=0)
    x = tl.load(logits_ptr + token * E + expert).to(tl.float32)
    # Else the compiler sees that bf16 becomes bf16 again, and keeps the bits of a NaN.
    x = mul(x, tl.zeros_like(x) + 1.0, False, ARCH)
    # No such method has a factor or a norm.
    weight = slot_weights(
        raw_scores(x, METHOD), None, table_ptr, rcp_delta_ptr, K, METHOD, False, SLOTS, ARCH,
        APPROXIMATE,
    )  # fmt: skip
    tl.store(weights_ptr + token * K + slot, to_bf16(weight, ARCH), slot < K)


@triton.jit
def route_kernel(
    logits_ptr,  # [T, E] fp32 or bf16
    bias_ptr,  # [E] fp32 or bf16, or None
    ids_ptr,  # [T, K] int32
    weights_ptr,  # [T, K] bf16
    scale,  # routed_scaling_factor
    E,
    table_ptr,  # with APPROXIMATE in the interpreter, of `jit.instructions`
    rcp_delta_ptr,  # with APPROXIMATE in the interpreter, int8 [2^23]
    K: tl.constexpr,
    METHOD: tl.constexpr,
    NORM: tl.constexpr,  # norm_topk_prob
    WIDTH: tl.constexpr,  # a power of two: LANES for each of GROUPS, or more
    LANES: tl.constexpr,  # a power of two >= E / GROUPS
    SLOTS: tl.constexpr,  # a power of two >= K
    ARCH: tl.constexpr,
    APPROXIMATE: tl.constexpr = False,  # by the instructions of the GPU
    BY_BLOCKS: tl.constexpr = False,  # the order of Default's sum, where APPROXIMATE
    GROUPS: tl.constexpr = 1,  # which divides E
    TOP_GROUPS: tl.constexpr = 1,
):
    await_previous(ARCH)
    token = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, WIDTH)
    expert = lane // LANES * (E // GROUPS) + lane % LANES
    inside = (lane % LANES < E // GROUPS) & (expert < E)
    x = tl.load(logits_ptr + token * E + expert, inside, other=float("-inf")).to(tl.float32)
    BIASED: tl.constexpr = is_biased(METHOD)
    RAW: tl.constexpr = is_raw(METHOD)
    if RAW:
        value = raw_scores(x, METHOD)
        score = value
    elif METHOD == DEFAULT:
        e = _exp(x - tl.max(x, 0), table_ptr, APPROXIMATE, ARCH)
        total = _sum_of_all(e, BY_BLOCKS, ARCH) if APPROXIMATE else _warp_sum(e)
        value = _share(e, total, rcp_delta_ptr, APPROXIMATE, ARCH)
        score = value
    else:
        value = _sigmoid(x, table_ptr, APPROXIMATE, ARCH)
        score = value
        if BIASED and bias_ptr is not None:
            bias = tl.load(bias_ptr + expert, inside, other=0.0).to(tl.float32)
            if GROUPS > 1:
                bias = to_bf16(bias, ARCH).to(tl.float32)
            score = add(score, bias, True, ARCH)
    key = tl.where(inside, _key(score, not RAW, ARCH), NOTHING)
    if GROUPS > 1:
        inside = inside & _in_best_groups(key, score, GROUPS, TOP_GROUPS, LANES, ARCH)
        key = tl.where(inside, key, NOTHING)

    slot = tl.arange(0, SLOTS)
    ids = tl.zeros((SLOTS,), tl.int32)
    chosen = tl.zeros((SLOTS,), tl.int32)
    value = value.to(tl.int32, bitcast=True)  # of which a sum with zeros keeps -0 and NaN
    for i in tl.static_range(K):
        best = tl.max(key, 0)
        first = tl.min(tl.where(inside & (key == best), expert, WIDTH), 0)
        ids = tl.where(slot == i, first, ids)
        chosen = tl.where(slot == i, tl.sum(tl.where(expert == first, value, 0), 0), chosen)
        inside = inside & (expert != first)
        key = tl.where(expert == first, NOTHING, key)

    weight = slot_weights(
        chosen.to(tl.float32, bitcast=True), scale, table_ptr, rcp_delta_ptr, K, METHOD, NORM, SLOTS,
        ARCH, APPROXIMATE,
    )  # fmt: skip
    live = slot < K
    tl.store(ids_ptr + token * K + slot, ids, live)
    tl.store(weights_ptr + token * K + slot, to_bf16(weight, ARCH), live)


def refusal(routing: Routing, device: torch.device) -> str | None:
    """Return why the kernel does not route so on the device; the reference then does, to the same bits.

    The functions of a GPU are measured on the device, once in a process.
    """
    if routing.grouped and (routing.n_group or 0) > MOST_GROUPS:
        return f"n_group is {routing.n_group}; the kernel has at most {MOST_GROUPS} groups"
    if routing.functions == "exact" or INTERPRETING:
        return None
    named = f"functions={routing.functions!r}"
    if device.type != "cuda":
        return f"{named} are measured on a GPU, and the tensors are on the {device.type}"
    if wrong := functions_that_differ(device):
        return f"{named} are not those of this GPU, whose instructions differ for {wrong} arguments"
    return None


@dataclass(frozen=True)
class Router:
    """Logits and how they are routed, in the form that kernels and ops take; `router_of` checks it."""

    logits: torch.Tensor  # [T, E] fp32 or bf16
    bias: torch.Tensor | None  # [E] fp32 or bf16
    method: RoutingMethodType
    top_k: int
    scale: float  # routed_scaling_factor
    norm: bool  # norm_topk_prob
    groups: int  # 1: none
    top_groups: int
    approximate: bool  # by the instructions of the GPU

    @property
    def shape(self) -> tuple[int, int]:
        """Return the shape of ids and weights, (T, K)."""
        return self.logits.shape[0], self.top_k

    def launched(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Do what `routed` does, inside of an op, which needs no other one."""
        return _launched(*_FIELDS(self))

    def routed(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return ids int32 [T, K] and weights bf16 [T, K]."""
        given = _FIELDS(self)
        routed: tuple[torch.Tensor, torch.Tensor]
        routed = _launched(*given) if _DIRECT.serves(given) else _op(*given)
        return routed


_FIELDS = reader(*("method.value" if f.name == "method" else f.name for f in fields(Router)))


def try_router(logits: torch.Tensor, routing: Routing, bias: torch.Tensor | None) -> Router | None:
    """Return what the kernel takes, or None where it is refused; the reason is logged, once."""
    reason = refusal(routing, logits.device)
    if reason is None:
        return router_of(logits, routing, bias)
    if not torch.compiler.is_compiling():
        log_fallback("the routing", "triton", reason)
    return None


@functools.cache
def instruction_table(device: torch.device) -> torch.Tensor:
    """Return what the interpreter reads in place of the instructions (`jit.instructions`)."""
    tanh = (functions.tanh_table(exponent, device) for exponent in functions.LEADING_BITS)
    return torch.cat([functions.ex2_table(device), *tanh])


def _launched(
    logits: torch.Tensor,
    bias: torch.Tensor | None,
    method: int,
    top_k: int,
    scale: float,
    norm: bool,
    groups: int,
    top_groups: int,
    approximate: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    tokens, experts = logits.shape
    ids = torch.empty((tokens, top_k), dtype=torch.int32, device=logits.device)
    weights = torch.empty((tokens, top_k), dtype=torch.bfloat16, device=logits.device)
    if tokens:
        lanes = next_power_of_2(experts // groups)
        width = max(16, lanes * next_power_of_2(groups))
        lanes = lanes if groups > 1 else width
        reads = approximate and INTERPRETING
        launch(route_kernel, (tokens,),
            logits.contiguous(), bias, ids, weights, scale, experts,
            instruction_table(logits.device) if reads else None,
            rcp_delta(logits.device) if reads else None,
            K=top_k, METHOD=method, NORM=norm, WIDTH=width, SLOTS=next_power_of_2(top_k),
            ARCH=arch(logits.device), APPROXIMATE=approximate,
            BY_BLOCKS=approximate and one_block_a_token(logits, top_k),
            GROUPS=groups, TOP_GROUPS=top_groups, LANES=lanes,
            num_warps=1 if width <= 256 else 4, **launch_options(logits.device),
        )  # fmt: skip
    return ids, weights


_op = torch.library.custom_op("nvfp4_moe::triton_route", _launched, mutates_args=())
_DIRECT = Direct(_op)
_op.register_torch_dispatch(recorder.Recorder, recorder.inside(_launched))


@_op.register_fake
def _(logits, bias, method, top_k, scale, norm, groups, top_groups, approximate):  # type: ignore[no-untyped-def]
    shape = (logits.shape[0], top_k)
    return logits.new_empty(shape, dtype=torch.int32), logits.new_empty(shape, dtype=torch.bfloat16)


def router_of(logits: torch.Tensor, routing: Routing, bias: torch.Tensor | None = None) -> Router:
    """Check a routing that `refusal` does not name.

    Raises:
        ValueError: K > E, a bias that the method does not read, or groups that do not divide E, are of
            one expert or have fewer than K in those chosen.
    """
    if routing.top_k > logits.shape[1]:
        raise ValueError(f"top_k is {routing.top_k}; logits has only {logits.shape[1]} experts")
    if bias is not None and not routing.method.biased:
        raise ValueError(f"bias is given; {routing.method.name} has none, so it must be None")
    if routing.grouped and (reason := indivisible(routing, logits.shape[1])):
        raise ValueError(reason)
    return Router(
        logits,
        bias,
        routing.method,
        routing.top_k,
        routing.scale,
        routing.norm_topk_prob,
        (routing.n_group or 1) if routing.grouped else 1,
        (routing.topk_group or 1) if routing.grouped else 1,
        routing.functions != "exact",
    )


def route(
    logits: torch.Tensor, routing: Routing, bias: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return ids int32 [T, K] and weights bf16 [T, K]; `refusal` names what has no kernel.

    Raises:
        ValueError: as `router_of`.
    """
    return router_of(logits, routing, bias).routed()
