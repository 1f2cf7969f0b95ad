"""Sums, activations, roundings, finalize and routings with a mistake each."""

# SPDX-License-Identifier: Apache-2.0
import functools
from collections.abc import Callable
from dataclasses import replace
from typing import Any
from unittest import mock

import torch

from nvfp4_moe.differential.stages import Call
from nvfp4_moe.reference.moe import layer as moe
from nvfp4_moe.reference.moe import routing
from nvfp4_moe.reference.moe.finalize import finalize
from nvfp4_moe.reference.moe.layer import Stages
from nvfp4_moe.reference.moe.routing import Routing, RoutingMethodType, route
from nvfp4_moe.reference.numerics.accumulate import matmul
from nvfp4_moe.reference.recipe import BLOCK_SIZE
from nvfp4_moe.reference.weights.experts import Experts

Tensor = torch.Tensor
Change = Callable[[Tensor], Tensor]


def as_gemm(f: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Tensor, Tensor, Any], Tensor]:
    return lambda x, w, _: f(x, w)


def _matmul(x: Tensor, w: Tensor) -> Tensor:
    return matmul(x, w, "fp64")


def _skipped(x: Tensor, w: Tensor) -> Tensor:
    return _matmul(x[:, BLOCK_SIZE:], w[:, BLOCK_SIZE:])


def _twice(x: Tensor, w: Tensor) -> Tensor:
    return _matmul(x, w) + _matmul(x[:, :BLOCK_SIZE], w[:, :BLOCK_SIZE])


def _in_16_bits(dtype: torch.dtype) -> Callable[[Tensor, Tensor], Tensor]:
    """Partial sums of 64 kept in 16 bits."""

    def gemm(x: Tensor, w: Tensor) -> Tensor:
        total = x.new_zeros(x.shape[0], w.shape[0])
        for k in range(0, x.shape[1], 64):
            total = (total + _matmul(x[:, k : k + 64], w[:, k : k + 64])).to(dtype).float()
        return total

    return gemm


def _last_row_dropped(x: Tensor, w: Tensor) -> Tensor:
    out = _matmul(x, w)
    out[-1:] = 0
    return out


def _stale_row(x: Tensor, w: Tensor) -> Tensor:
    """The last row is what lay in the workspace: the first one's."""
    out = _matmul(x, w)
    out[-1] = out[0]
    return out


def _one_element(x: Tensor, w: Tensor) -> Tensor:
    """One term of one sum left out."""
    out = _matmul(x, w)
    product = x[0] * w[0]
    out[0, 0] -= product[product.abs().argmax()]
    return out


def _without_small(x: Tensor) -> Tensor:
    """Codes times block scales that e4m3, without its subnormals, cannot hold."""
    return torch.where(x.abs() < 2.0**-6, 0, x)


GEMMS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "one K tile skipped": _skipped,
    "one K tile added twice": _twice,
    "partial sums in bf16": _in_16_bits(torch.bfloat16),
    "partial sums in fp16": _in_16_bits(torch.float16),
    "last row of an expert dropped": _last_row_dropped,
    "a stale workspace row": _stale_row,
    "one product of one sum left out": _one_element,
    "hidden states below 2^-6 lost": lambda x, w: _matmul(_without_small(x), w),
    "weights below 2^-6 lost": lambda x, w: _matmul(x, _without_small(w)),
}
"""Both GEMMs can have them."""


def other_activation(f: Callable[[Tensor, Experts, int], Tensor]) -> Stages:
    return Stages(activate=f)


def of_other_experts(**changes: Any) -> Stages:
    return other_activation(lambda raw, e, i: moe.activate_raw(raw, replace(e, **changes), i))


def sigmoid_of_up(raw: Tensor, e: Experts, i: int) -> Tensor:
    up, gate = raw.chunk(2, -1)
    return moe.activate_raw(torch.cat([gate, up], -1), e, i)


def clamp_after_scale(raw: Tensor, e: Experts, i: int) -> Tensor:
    """The limit, which is in the domain of the sums, compared with what the scalar has multiplied."""
    assert e.gemm1_clamp_limit is not None
    limits = e.gemm1_clamp_limit / e.output1_scale_gate_scalar
    return moe.activate_raw(raw, replace(e, gemm1_clamp_limit=limits), i)


def beta_after_scale(raw: Tensor, e: Experts, i: int) -> Tensor:
    assert e.gemm1_beta is not None
    beta = e.gemm1_beta / e.output1_scale_scalar
    return moe.activate_raw(raw, replace(e, gemm1_beta=beta), i)


def bias_after_scale(raw: Tensor, e: Experts, i: int) -> Tensor:
    assert e.gemm1_bias is not None
    bias = e.gemm1_bias / e.output1_scale_gate_scalar[:, None]
    return moe.activate_raw(raw, replace(e, gemm1_bias=bias), i)


def coarse_sigmoid(raw: Tensor, e: Experts, i: int) -> Tensor:
    """A relative error of 2^-11, as of tanh.approx."""
    return moe.activate_raw(raw, e, i) * (1 + 2.0**-11)


def _bf16_truncated(x: Tensor) -> Tensor:
    return (x.contiguous().view(torch.int32) & -65536).view(torch.float32).bfloat16()


def _bf16_half_up(x: Tensor) -> Tensor:
    return (x.contiguous().view(torch.int32) + 0x8000 & -65536).view(torch.float32).bfloat16()


def _two_roundings(x: Tensor) -> Tensor:
    """By way of 12 bits."""
    bits = x.contiguous().view(torch.int32)
    return ((bits + 0x7FF + (bits >> 12 & 1)) & -4096).view(torch.float32).bfloat16()


ROUNDINGS: dict[str, Change] = {
    "kept in fp32": lambda x: x,
    "truncated to bf16": _bf16_truncated,
    "ties of bf16 rounded up": _bf16_half_up,
    "rounded twice": _two_roundings,
    "rounded to fp16": lambda x: x.half().float(),
}
"""Roundings of the intermediate and of the rows."""


def other_finalize(f: Callable[[Tensor, Tensor], Tensor]) -> Stages:
    return Stages(finalize=lambda rows, weights, *_: f(rows, weights.float()))


def in_bf16(rows: Tensor, w: Tensor) -> Tensor:
    total = torch.zeros_like(rows[:, 0]).bfloat16()
    for k in range(rows.shape[1]):
        total = (total.float() + w[:, k, None] * rows[:, k]).bfloat16()
    return total.float()


def unfused(rows: Tensor, w: Tensor) -> Tensor:
    total = torch.zeros_like(rows[:, 0])
    for k in range(rows.shape[1]):
        total = total + (w[:, k, None] * rows[:, k]).bfloat16().float()
    return total


def one_lost(rows: Tensor, w: Tensor) -> Tensor:
    """A race: one element of one slot is not added."""
    rows = rows.clone()
    rows[0, 0, int(rows[0, 0].abs().argmax())] = 0
    return finalize(rows, w, "flashinfer")


def other_order(rows: Tensor, weights: Tensor, order: Any, is_local: Any) -> Tensor:
    return finalize(rows, weights, "slot", is_local)


def weights_in_fp16(rows: Tensor, weights: Tensor, *rest: Any) -> Tensor:
    return finalize(rows, weights.half(), *rest)


def weights_first(rows: Tensor, weights: Tensor, *_: Any) -> Tensor:
    """Each weighted row rounded to bf16."""
    weighted = (rows * weights.float()[..., None]).bfloat16().float()
    return finalize(weighted, torch.ones_like(weights), "slot")


def _rerouted(**changes: Any) -> Callable[[Call], tuple[Tensor, Tensor]]:
    def routed(call: Call) -> tuple[Tensor, Tensor]:
        result = route(call.logits, replace(call.routing, **changes), call.routing_bias)
        return result.ids, result.weights_bf16

    return routed


def _largest_index(call: Call) -> tuple[Tensor, Tensor]:
    flipped = call.logits.flip(1)
    result = route(flipped, call.routing, None)
    return call.logits.shape[1] - 1 - result.ids, result.weights_bf16


def _biased_weights(call: Call) -> tuple[Tensor, Tensor]:
    right = route(call.logits, call.routing, call.routing_bias)
    assert call.routing_bias is not None
    scores = torch.sigmoid(call.logits.float()) + call.routing_bias
    chosen = scores.gather(1, right.ids.long())
    scale = call.routing.routed_scaling_factor or 1.0
    return right.ids, (chosen * scale / chosen.sum(1, keepdim=True)).bfloat16()


def _where(name: str, value: Callable[..., Tensor]) -> Callable[[Call], tuple[Tensor, Tensor]]:
    """The routing while a function of it is another."""

    def routed(call: Call) -> tuple[Tensor, Tensor]:
        with mock.patch.object(routing, name, functools.partial(value, call)):
            return _right(call)

    return routed


_LIMIT, _SUM = routing._limit_to_groups, routing._warp_sum


def _masked_at_zero(_: Call, key: Tensor, scores: Tensor, how: Routing) -> Tensor:
    """0 in place of the least score outside of the chosen groups."""
    return _LIMIT(key, scores, how).clamp(min=0).where(_LIMIT(key, scores, how) != key, key)


def _last_of_equal_groups(_: Call, key: Tensor, scores: Tensor, how: Routing) -> Tensor:
    shape = (scores.shape[0], how.n_group or 1, -1)

    def reversed_groups(t: Tensor) -> Tensor:
        return t.reshape(shape).flip(1).reshape(t.shape)

    return reversed_groups(_LIMIT(reversed_groups(key), reversed_groups(scores), how))


def _unrounded_bias(call: Call, _: Tensor, scores: Tensor, how: Routing) -> Tensor:
    assert call.routing_bias is not None
    scores = scores + (call.routing_bias - call.routing_bias.bfloat16().float())
    return _LIMIT(routing._key(scores), scores, how)


def _without_epsilon(_: Call, values: Tensor) -> Tensor:
    return _SUM(values) - 1e-20


def _in_fp16(call: Call) -> tuple[Tensor, Tensor]:
    result = route(call.logits.half().float(), call.routing, call.routing_bias)
    return result.ids, result.weights_bf16


def _right(call: Call) -> tuple[Tensor, Tensor]:
    result = route(call.logits, call.routing, call.routing_bias)
    return result.ids, result.weights_bf16


def other_weights(f: Change) -> Callable[[Call], tuple[Tensor, Tensor]]:
    return lambda call: (_right(call)[0], f(_right(call)[1].float()).bfloat16())


def _not_biased(call: Call) -> tuple[Tensor, Tensor]:
    zero = torch.zeros_like(call.logits[0]).float()
    result = route(call.logits, call.routing, zero)
    return result.ids, result.weights_bf16


ROUTINGS: dict[str, tuple[str, Callable[[Call], tuple[Tensor, Tensor]]]] = {
    "softmax before top-k, not normalized": ("qwen", _rerouted(method=RoutingMethodType.Default)),
    "sigmoid for softmax": ("qwen", _rerouted(method=RoutingMethodType.SigmoidRenorm)),
    "ties to the larger index": ("qwen", _largest_index),
    "weights exchanged": ("qwen", other_weights(lambda w: w.flip(1))),
    "weights normalized twice over": ("heavy", other_weights(lambda w: w / w.sum(1, keepdim=True))),
    "the bias in the weights": ("deepseek", _biased_weights),
    "the bias not added": ("deepseek", _not_biased),
    "one group more": ("deepseek", _rerouted(topk_group=3)),
    "scaling factor left out": ("deepseek", _rerouted(routed_scaling_factor=1.0)),
    "logits compared in fp16": ("near logits", _in_fp16),
    "other groups at 0": ("negative groups", _where("_limit_to_groups", _masked_at_zero)),
    "ties of groups to the larger index": (
        "equal groups",
        _where("_limit_to_groups", _last_of_equal_groups),
    ),
    "the groups' bias not rounded": ("fine bias", _where("_limit_to_groups", _unrounded_bias)),
    "no epsilon in the sum": ("saturated", _where("_warp_sum", _without_epsilon)),
}
