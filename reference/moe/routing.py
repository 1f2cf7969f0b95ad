"""From router logits to experts and weights: FlashInfer's ten routing methods for one token row l.

    0 Default           s = softmax(l);       top-k of s;  w = s
    1 Renormalize       top-k of l;  w = softmax of the K
    2 DeepSeekV3        s = sigmoid(l);  top-k of s + bias, or of its best groups;
                        w = s * scale / (sum of the K s + 1e-20)
    3 Llama4            top-1 of l;  w = sigmoid
    4 RenormalizeNaive  FlashInfer runs Renormalize for it (`trtllm_fused_moe_routing_runner.cu:304`)
    5 TopK              top-k of l;  w = l
    6 SigmoidRenorm     s = sigmoid(l);  top-k of s;  w = s / max(sum, 1e-20), or s without norm
    7 MiniMax2          DeepSeekV3 without groups
    8 Sigmoid           s = sigmoid(l);  top-k of s;  w = s
    9 TopKSigmoid       top-k of l;  w = sigmoid

The policies are in FlashInfer 0.7.2's `RoutingCustomPolicy.cuh:54-530`, groups and Llama4 in
`trtllm_fused_moe_routing_deepseek.cu:125` and `trtllm_fused_moe_routing_llama4.cu:42`. Load-bearing:

- Selection compares bits, not values (`RoutingKernelTopK.cuh:53`): the descending order of
  sign-magnitude integers, then the smaller index. +0 is therefore above -0, a NaN above +inf if its
  sign is clear and below -inf if set. NaNs that a GPU computed have a clear sign: a NaN logit is
  the *first* choice of every method but Llama4, which skips NaN (`..._llama4.cu:56`).
- Raw logits (1, 3, 4, 5, 9) are compared in their own type, so bf16 logits tie where fp32 ones do
  not; the others compare fp32 scores, which tie where sigmoid saturates (l > 17, l < -17).
- sigmoid(x) = 0.5 * tanh(0.5 * x) + 0.5 (`RoutingKernel.cuh:128`), with a correctly rounded tanh
  here unless `Routing.functions` names a GPU's. FlashInfer builds with -use_fast_math
  (`jit/core.py:746`), for which nvcc 13.0 emits `tanh.approx.f32`, of relative error up to 2^-11: its
  scores may be off by 2^-12, whatever their size, and experts nearer to each other than twice that may
  change places. exp and the divisions of softmax are approximate too.
- Subnormal inputs and results of fp32 arithmetic are zero, which that flag makes them: scores of
  Default below 2^-126 tie. Raw logits are compared as they are.
- Sums are a warp's butterfly (`coalesced_reduce.h:67`), which makes the K-sums here FlashInfer's.
  Default's sum over all experts has another order in each of its kernels; with a GPU's functions it
  is that of the kernel which FlashInfer takes for the shape, and else the butterfly.

Not determined: fewer than K scores above -inf. The kernels put -inf in the place of what they have
chosen and may choose it again (`RoutingKernelTopK.cuh:283`, `:313`); here no expert comes twice.
And between experts 32 apart Llama4's kernel sees no difference between the two zeros.
"""

# SPDX-License-Identifier: Apache-2.0
import enum
import math
from dataclasses import dataclass
from typing import NamedTuple

import torch

from .. import checks
from ..numerics.fp32 import Arithmetic
from ..numerics.functions import FUNCTIONS, Exact, FunctionsName, functions, positive_nan
from ..numerics.subnormals import kept


class RoutingMethodType(enum.IntEnum):
    """FlashInfer's names and values (`tllm_enums.py:10`)."""

    Default = 0
    Renormalize = 1
    DeepSeekV3 = 2
    Llama4 = 3
    RenormalizeNaive = 4
    TopK = 5
    SigmoidRenorm = 6
    MiniMax2 = 7
    Sigmoid = 8
    TopKSigmoid = 9
    Unspecified = 10

    @property
    def raw(self) -> bool:
        """True if it selects by logits, in their own type; else by scores in fp32."""
        return _METHODS[self].raw

    @property
    def biased(self) -> bool:
        """True if it reads a bias of each expert, and a factor of the weights."""
        return _METHODS[self].biased


@dataclass(frozen=True)
class _Method:
    """A row of the table. FlashInfer's kernels have at most `experts` and `top_k`."""

    raw: bool = False
    biased: bool = False
    # The last tier of each list covers all before it (`RoutingCustomPolicy.cuh:829-900`).
    experts: int = 256
    top_k: int = 8


_M = RoutingMethodType
_CUDA = Arithmetic(ftz=True)
_METHODS = {
    _M.Default: _Method(),
    _M.Renormalize: _Method(raw=True, experts=2048, top_k=32),
    _M.DeepSeekV3: _Method(biased=True, experts=1024, top_k=32),
    _M.Llama4: _Method(raw=True, experts=128, top_k=1),
    _M.RenormalizeNaive: _Method(raw=True, experts=2048, top_k=32),
    _M.TopK: _Method(raw=True),
    _M.SigmoidRenorm: _Method(),
    _M.MiniMax2: _Method(biased=True, experts=1024, top_k=32),
    _M.Sigmoid: _Method(),
    _M.TopKSigmoid: _Method(raw=True),
}
METHODS = tuple(_METHODS)
"""All but Unspecified."""


@dataclass(frozen=True)
class Routing:
    """The rule by which tokens choose experts. A field that the method would not read is refused.

    Args:
        method: any but Unspecified; an integer or FlashInfer's own member is accepted.
        n_group: groups of consecutive experts, DeepSeekV3 only; None, 0 and 1 mean no groups.
        topk_group: how many groups may be chosen from, with groups only.
        routed_scaling_factor: factor of the weights, DeepSeekV3 and MiniMax2 only; None is 1.
        norm_topk_prob: whether SigmoidRenorm divides by the sum; no other method reads it.
        functions: "exact", or the GPU whose exp, tanh and reciprocal the routing has to the bit
            (`numerics/functions.py`). Ids and weights are then FlashInfer's on that GPU. Default's sum
            has the order of the kernel that FlashInfer takes for the number of tokens, so that its last
            bits depend on that number.

    Raises:
        ValueError: naming the field.
    """

    method: RoutingMethodType
    top_k: int
    n_group: int | None = None
    topk_group: int | None = None
    routed_scaling_factor: float | None = None
    norm_topk_prob: bool = True
    functions: FunctionsName = "exact"

    def __post_init__(self) -> None:
        try:
            method = RoutingMethodType(self.method)
        except ValueError:
            method = RoutingMethodType.Unspecified
        if method == RoutingMethodType.Unspecified or isinstance(self.method, bool):
            names = ", ".join(m.name for m in METHODS)
            checks.wrong_value("method", self.method, f"one of {names}")
        object.__setattr__(self, "method", method)
        checks.integer("top_k", self.top_k, 1)
        for name in ("n_group", "topk_group"):
            if (value := getattr(self, name)) is not None:
                checks.integer(name, value, 0)
        groups = self.n_group or 0
        if groups > 1 and method != RoutingMethodType.DeepSeekV3:
            checks.wrong_value("n_group", groups, f"None, 0 or 1 with {method.name}")
        if groups > 1 and not 1 <= (self.topk_group or 0) <= groups:
            checks.wrong_value("topk_group", self.topk_group, f"from 1 to n_group, {groups}")
        if groups <= 1 and self.topk_group not in (None, 0, 1):
            checks.wrong_value("topk_group", self.topk_group, "None, 0 or 1 without groups")
        factor = self.routed_scaling_factor
        if factor is not None:
            checks.number("routed_scaling_factor", factor)
            if not method.biased and factor != 1:
                allowed = f"None or 1 with {method.name}, which has none"
                checks.wrong_value("routed_scaling_factor", factor, allowed)
        checks.flag("norm_topk_prob", self.norm_topk_prob)
        if self.functions not in FUNCTIONS:
            checks.wrong_value("functions", self.functions, f"one of {', '.join(FUNCTIONS)}")

    @property
    def grouped(self) -> bool:
        return (self.n_group or 0) > 1

    @property
    def scale(self) -> float:
        return 1.0 if self.routed_scaling_factor is None else self.routed_scaling_factor


class RoutingResult(NamedTuple):
    """The experts of each token, best first.

    `scores` is what top-k compared: logits or scores, bias included, before any limit to groups.
    """

    ids: torch.Tensor  # int32 [T, K], global expert ids
    weights: torch.Tensor  # fp32 [T, K], before the rounding to bf16
    scores: torch.Tensor  # fp32 [T, E]

    @property
    def weights_bf16(self) -> torch.Tensor:
        """Return the weights [T, K] bf16 that the kernels pass on, for logits of any type."""
        return self.weights.to(torch.bfloat16)


@kept
def route(
    logits: torch.Tensor,
    routing: Routing,
    bias: torch.Tensor | None = None,
    ids: torch.Tensor | None = None,
) -> RoutingResult:
    """Experts and weights of each token; the module's docstring has the arithmetic.

    tanh and exp are rounded from fp64 and sums have a fixed order, so that a row's result does not
    depend on its place, nor on the device unless an fp64 value lies next to an fp32 rounding border.

    Args:
        logits: [T, E] fp32 or bf16.
        bias: [E] fp32 or bf16, added to the scores that select and absent from the weights;
            DeepSeekV3 and MiniMax2 only. With groups it is rounded to bf16 first
            (`trtllm_fused_moe_routing_deepseek.cu:159-162`). None is zero.
        ids: [T, K] uint8, int16, int32 or int64, experts that were chosen before, by a server, and are
            taken as they are (rollout routing replay: arXiv 2510.11370). The weights are those of these
            experts, by the method, of the logits that are given; they have a gradient. None: chosen
            here.

    Raises:
        ValueError: a wrong shape or type, K > E, a bias that the method would not read, or groups
            that do not divide E, are of one expert or have fewer than K in those chosen; ids of no
            expert, where values are read (`NVFP4_MOE_CHECK_VALUES`).
    """
    _check(logits, routing, bias)
    if ids is not None:
        _check_ids(ids, logits, routing)
    method, k, f = routing.method, routing.top_k, functions(routing.functions)
    values = logits.float()

    def best(key: torch.Tensor) -> torch.Tensor:
        return _order(key)[:, :k] if ids is None else ids.long()

    if method.raw:
        # Llama4's maximum is a comparison by value, which a NaN loses.
        llama4 = method == RoutingMethodType.Llama4
        scores = values.masked_fill(values.isnan(), -math.inf) if llama4 else values
        ids = best(_key(scores))
        chosen = scores.gather(1, ids)
        if method in (RoutingMethodType.Renormalize, RoutingMethodType.RenormalizeNaive):
            weights = _softmax(chosen, f)
        elif method == RoutingMethodType.TopK:
            weights = chosen
        else:
            weights = f.sigmoid(chosen)
    elif method == RoutingMethodType.Default:
        by_blocks = routing.functions != "exact" and one_block_a_token(values, k)
        scores = _softmax_of_all(values, f, routing.functions, by_blocks)
        ids = best(_key(scores))
        weights = scores.gather(1, ids)
    elif method.biased:
        unbiased = scores = f.sigmoid(values)
        if bias is not None:
            bias = bias.to(torch.bfloat16) if routing.grouped else bias
            scores = positive_nan(_CUDA.add(unbiased, _CUDA.flush(bias.float())))
        key = _key(scores)
        ids = best(_limit_to_groups(key, scores, routing) if routing.grouped else key)
        chosen = unbiased.gather(1, ids)
        weights = f.div(_CUDA.mul(chosen, routing.scale), _warp_sum(chosen) + 1e-20)
    else:
        scores = f.sigmoid(values)
        ids = best(_key(scores))
        weights = scores.gather(1, ids)
        if method == RoutingMethodType.SigmoidRenorm and routing.norm_topk_prob:
            # fmaxf, so that a NaN sum counts as 1e-20 (`RoutingCustomPolicy.cuh:373`).
            total = _warp_sum(weights)
            weights = f.div(weights, torch.fmax(total, torch.full_like(total, 1e-20)))
    return RoutingResult(ids.int(), weights, scores)


def append_shared_experts(
    result: RoutingResult, num_shared: int, num_experts: int
) -> RoutingResult:
    """`num_fused_shared_experts`: every token also goes to the experts E, E+1, ..., weight 1.

    They follow the K routed slots, in ascending order, and their weight is exactly 1.0: neither
    part of the sum nor multiplied by routed_scaling_factor
    (`trtllm_fused_moe_routing_deepseek.cu:342-362`). Their GEMM weights are the rows after the
    routed experts'. FlashInfer has them in DeepSeekV3 with groups only
    (`trtllm_fused_moe_routing_runner.cu:69`, `:117`, `:220`, `:268`), without expert parallelism
    (`trtllm_fused_moe_kernel_launcher.cu:1723`), for at most 32 of them, E + shared <= 512 and
    K + shared <= 32 (`..._deepseek.cu:548-566`).

    Raises:
        ValueError: num_shared is negative, or num_experts is not the E of `result`.
    """
    checks.integer("num_shared", num_shared, 0)
    if num_experts != result.scores.shape[1]:
        checks.wrong_value(
            "num_experts", num_experts, f"{result.scores.shape[1]}, as of the result"
        )
    ids, weights, scores = result
    tokens = ids.shape[0]
    shared = torch.arange(num_experts, num_experts + num_shared, device=ids.device, dtype=ids.dtype)
    ids = torch.cat([ids, shared.expand(tokens, num_shared)], dim=1)
    weights = torch.cat([weights, weights.new_ones(tokens, num_shared)], dim=1)
    return RoutingResult(ids, weights, scores)


def refusal(routing: Routing, num_experts: int, has_bias: bool = True) -> str | None:
    """Return why FlashInfer's FP4 MoE cannot route so from logits; None if it can.

    These are FlashInfer's limits; the reference itself has none but K <= E and whole groups. Its
    FP8 MoE and `trtllm_gen_routing` are stricter with DeepSeekV3: n_group not 0, K <= 8 up to 384
    experts and 22 above, and K below the number of experts in the chosen groups
    (`trtllm_fused_moe_kernel_launcher.cu:4240-4259`, `trtllm_fused_moe_routing_binding.cu:95-112`).
    """
    e, k, name = num_experts, routing.top_k, routing.method.name
    if k > e:
        return f"top_k is {k}, more than the {e} experts"
    if routing.grouped:
        return _grouped_refusal(routing, e)
    most = _METHODS[routing.method]
    if e > most.experts:
        return f"{name} has kernels for up to {most.experts} experts, not {e}"
    if k > most.top_k:
        return f"{name} has kernels for top_k up to {most.top_k}, not {k}"
    if routing.method.biased and not has_bias:
        # `RoutingCustomPolicy.cuh:232`: the pointer is followed unchecked.
        return f"{name} without groups reads a bias, and there is none"
    return None


def pack_topk(ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Return (id << 16) | the bf16 weight's bits: FlashInfer's packed `topk_ids` (`RoutingKernel.h:33`).

    Contract: ids fit int16 (-1, no expert, included); fp32 weights are rounded to bf16.

    Args:
        ids: integers [T, K].
        weights: bf16 or fp32 [T, K].

    Returns:
        int32 [T, K].
    """
    if ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
        raise ValueError(f"ids is {ids.dtype}; it must be of an integer type")
    if weights.dtype not in (torch.bfloat16, torch.float32):
        raise ValueError(f"weights is {weights.dtype}; it must be bfloat16 or float32")
    if ids.shape != weights.shape:
        raise ValueError(
            f"weights has shape {tuple(weights.shape)}; it must be that of ids, {tuple(ids.shape)}"
        )
    # The mask: the int16 of a negative weight would extend its sign over the id.
    bits = weights.to(torch.bfloat16).view(torch.int16).int() & 0xFFFF
    return (ids.int() << 16) | bits


def unpack_topk(packed: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return int32 ids and bf16 weights: the inverse of `pack_topk`."""
    if packed.dtype != torch.int32:
        raise ValueError(f"packed is {packed.dtype}; it must be int32")
    bits = packed << 16 >> 16  # sign-extended, so that it is in int16's range
    return packed >> 16, bits.to(torch.int16).view(torch.bfloat16)


def _check(logits: torch.Tensor, routing: Routing, bias: torch.Tensor | None) -> None:
    floats = (torch.float32, torch.bfloat16)
    checks.tensor("logits", logits, floats, ("T", "E"))
    experts = logits.shape[1]
    if routing.top_k > experts:
        checks.wrong_value("top_k", routing.top_k, f"at most {experts}, the columns of logits")
    if bias is not None:
        if not routing.method.biased:
            allowed = f"None with {routing.method.name}, which has none"
            checks.wrong_value("bias", bias, allowed)
        checks.tensor("bias", bias, floats, (experts,), like=("logits", logits))
    if routing.grouped and (reason := indivisible(routing, experts)):
        raise ValueError(reason)


def _check_ids(ids: torch.Tensor, logits: torch.Tensor, routing: Routing) -> None:
    tokens, experts = logits.shape
    integers = (torch.uint8, torch.int16, torch.int32, torch.int64)
    checks.tensor("ids", ids, integers, (tokens, routing.top_k), like=("logits", logits))
    if checks.reads_values(ids):
        checks.values("ids", ids, (ids >= 0) & (ids < experts), f"from 0 to {experts - 1}")


def indivisible(routing: Routing, num_experts: int) -> str | None:
    """Return why the experts do not divide into the groups of a routing that has some."""
    groups, chosen = routing.n_group or 1, routing.topk_group or 1
    if num_experts % groups or num_experts // groups < 2:
        return (
            f"n_group is {groups}; {num_experts} experts must divide into equal groups of 2 or more"
        )
    available = num_experts // groups * chosen
    if routing.top_k > available:
        return f"top_k is {routing.top_k}; the {chosen} chosen groups have only {available} experts"
    return None


def _grouped_refusal(routing: Routing, num_experts: int) -> str | None:
    """`trtllm_fused_moe_routing_runner.cu:160-161`, `trtllm_fused_moe_routing_deepseek.cu:513-546`."""
    groups, chosen = routing.n_group or 1, routing.topk_group or 1
    if reason := indivisible(routing, num_experts):
        return reason
    limits = (
        ("top_k", routing.top_k, 22),
        ("topk_group", chosen, 4),
        ("n_group", groups, 8),
        ("the number of experts", num_experts, 512),
        ("the number of experts in a group", num_experts // groups, 32),
    )
    for what, value, largest in limits:
        if value > largest:
            return f"{what} is {value}; DeepSeekV3 with groups takes at most {largest}"
    if num_experts % 4:
        return f"the number of experts is {num_experts}; with groups it must be a multiple of 4"
    return None


def _limit_to_groups(key: torch.Tensor, scores: torch.Tensor, routing: Routing) -> torch.Tensor:
    """`key`, below any other outside of the groups whose two best scores have the largest sums."""
    tokens, experts = scores.shape
    groups = routing.n_group or 1
    shape = (tokens, groups, experts // groups)
    grouped = scores.reshape(shape)
    two = grouped.gather(2, _order(key.reshape(shape))[..., :2])
    group_scores = positive_nan(_CUDA.add(two[..., 0], two[..., 1]))
    best = _order(_key(group_scores))[:, : routing.topk_group]
    allowed = torch.zeros_like(group_scores, dtype=torch.bool).scatter(1, best, True)
    outside = ~allowed[..., None].expand(shape).reshape(tokens, experts)
    # By key, not by score: an expert of a chosen group precedes others even with a score of -inf.
    return key.masked_fill(outside, torch.iinfo(torch.int32).min)


def _key(scores: torch.Tensor) -> torch.Tensor:
    """int32 in the order in which the kernels see fp32: -NaN, -inf, ..., -0, +0, ..., inf, NaN."""
    bits = scores.view(torch.int32)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


def _order(key: torch.Tensor) -> torch.Tensor:
    """Indices of the last dimension, largest key first; torch.topk promises nothing about ties."""
    return key.sort(dim=-1, descending=True, stable=True).indices


def _softmax(values: torch.Tensor, f: Exact) -> torch.Tensor:
    exp = f.exp(values - values.amax(dim=-1, keepdim=True))
    return positive_nan(f.div(exp, _warp_sum(exp)))


def _softmax_of_all(
    values: torch.Tensor, f: Exact, name: FunctionsName, by_blocks: bool
) -> torch.Tensor:
    """Default's scores; the order of their sum is FlashInfer's where the functions are a GPU's.

    A warp adds what each lane holds, then its lanes (`RoutingKernel.cuh:217-250`). Threads of a block of
    256 have one expert each: a warp adds down, then the warps' sums are added in order
    (`RoutingCustomPolicy.cuh:119-165`).
    """
    if name == "exact":
        return _softmax(values, f)
    exp = f.exp(_CUDA.sub(values, values.amax(dim=-1, keepdim=True)))
    lanes = torch.nn.functional.pad(exp, (0, -values.shape[1] % 32)).unflatten(1, (-1, 32))
    if by_blocks:
        for step in (1, 2, 4, 8, 16):
            behind = torch.nn.functional.pad(lanes[..., step:], (0, step))
            lanes = _CUDA.add(lanes, behind)
        total = _in_order(lanes[..., 0])
    else:
        total = _warp_sum(_in_order(lanes.mT))[..., 0]
    return positive_nan(f.div(exp, total[:, None]))


def _in_order(parts: torch.Tensor) -> torch.Tensor:
    """[...]: the last dimension, added left to right."""
    total = parts[..., 0]
    for part in parts.unbind(-1)[1:]:
        total = _CUDA.add(total, part)
    return total


def one_block_a_token(values: torch.Tensor, top_k: int) -> bool:
    """Return True if FlashInfer's kernel of Default has a block for each token.

    `routing_custom.cuh:1575-1829`, for at most 256 experts.
    """
    tokens, experts = values.shape
    if tokens <= 16:
        return False
    if tokens > 256:
        return experts >= 256 and tokens <= 1024
    return top_k >= 8 and tokens * top_k >= 1536 if experts < 160 else tokens > 64


def _warp_sum(values: torch.Tensor) -> torch.Tensor:
    """Sum to [..., 1] by a butterfly, lane i with lane i + width / 2, zeros behind the last lane."""
    width = 1 << (values.shape[-1] - 1).bit_length()
    lanes = torch.nn.functional.pad(values, (0, width - values.shape[-1]))
    while width > 1:
        width //= 2
        lanes = lanes[..., :width] + lanes[..., width:]
    return lanes
