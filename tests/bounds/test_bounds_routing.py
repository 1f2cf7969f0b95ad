"""Bounds of routing: approximate kernels are inside, mistakes are outside."""

# SPDX-License-Identifier: Apache-2.0
import itertools
from collections.abc import Callable
from dataclasses import dataclass, replace
from unittest import mock

import moe_cases
import pytest
import torch
from assertions import assert_bitwise, assert_inside
from moe_cases import Shape
from routing_cases import (
    BIASED,
    GROUPED,
    RAW,
    SIGMOID,
    VARIANTS,
    M,
    bias_of,
    each_dtype,
    each_method,
    logits_of,
    name,
    variants,
)

from nvfp4_moe.cases.moe_case import MoECase
from nvfp4_moe.reference.bounds import routing as bounds_routing
from nvfp4_moe.reference.bounds.interval import Interval
from nvfp4_moe.reference.bounds.moe import fused_moe_bounds, routed_moe_bounds
from nvfp4_moe.reference.bounds.routing import routing_bounds
from nvfp4_moe.reference.bounds.selection import SETS, selections
from nvfp4_moe.reference.moe import layer as moe
from nvfp4_moe.reference.moe import routing
from nvfp4_moe.reference.moe.finalize import finalize
from nvfp4_moe.reference.moe.routing import Routing, route
from nvfp4_moe.reference.weights.cutlass import with_cutlass

EXPERTS = 16
SHAPE = Shape(24, 128, 64, EXPERTS, 4)


def sign(x, salt):
    """-1 or 1, a function of the bits of x, as an approximation's error is."""
    bits = x.float().contiguous().view(torch.int32).long()
    return ((bits * 2654435761 + salt * 40503) >> 15 & 1) * 2 - 1


def tanh_approx(direction):
    def sigmoid(x):
        d = sign(x, 1) if direction is None else direction
        tanh = torch.tanh(0.5 * x.double()) * (1 + 0.999 * 2.0**-11 * d)
        return 0.5 * tanh.float() + 0.5

    return sigmoid


def approximate_exp(x, salt=0):
    """As far off as `__expf` may be."""
    ulps = 2 + 1.17 * x.double().abs()
    return (x.double().exp() * (1 + ulps * 2.0**-23 * sign(x, salt) * 0.99)).float()


def sigmoid_by_exp(x):
    return 1 / (1 + approximate_exp(-x))


def in_order(order):
    def total(values):
        sum_ = torch.zeros_like(values[..., 0])
        for i in order(range(values.shape[-1])):
            sum_ = sum_ + values[..., i]
        return sum_[..., None]

    return total


@dataclass
class Kernel:
    """Other last bits for `route`."""

    sigmoid: Callable = routing._sigmoid
    exp: Callable = lambda x: x.double().exp().float()
    total: Callable = routing._warp_sum
    divide: Callable = torch.div

    def softmax(self, values):
        exp = self.exp(values - values.amax(-1, keepdim=True))
        return self.divide(exp, self.total(exp))

    def in_fp32(self, *args):
        patches = {"_sigmoid": self.sigmoid, "_softmax": self.softmax, "_warp_sum": self.total}
        with mock.patch.multiple(routing, **patches):
            return route(*args)

    def route(self, *args):
        """(ids, bf16 weights)."""
        found = self.in_fp32(*args)
        return found.ids, found.weights_bf16


def by_reciprocal(a, b):
    return a * (1 / b * (1 + 2.0**-23))


KERNELS = {
    "the reference": Kernel(),
    "tanh.approx, of either sign": Kernel(tanh_approx(None)),
    "tanh.approx, too small": Kernel(tanh_approx(-1)),
    "tanh.approx, too large": Kernel(tanh_approx(1)),
    "sigmoid by exp": Kernel(sigmoid_by_exp, total=in_order(reversed)),
    "exp with errors": Kernel(exp=approximate_exp),
    "exp with other errors": Kernel(exp=lambda x: approximate_exp(x, 7), divide=by_reciprocal),
    "ascending sums": Kernel(total=in_order(iter)),
    "all of it": Kernel(tanh_approx(None), approximate_exp, in_order(reversed), by_reciprocal),
}


def near_ties(tokens, experts, seed=0, dtype=torch.float32):
    """Every second expert's logit is its neighbour's, or a few 2^-12 from it."""
    logits = logits_of(tokens, experts, seed, scale=1.0)
    g = torch.Generator().manual_seed(seed)
    step = torch.randint(-3, 4, (tokens, experts // 2), generator=g) * 2.0**-12
    logits[:, 1::2] = logits[:, ::2] + torch.where(
        torch.rand(step.shape, generator=g) < 0.3, step, 1.0
    )
    return logits.to(dtype)


def given(wanted, seed=0, tokens=64, experts=EXPERTS, dtype=torch.float32):
    bias = bias_of(experts, seed=seed) * 0.1 if wanted.method in BIASED else None
    return near_ties(tokens, experts, seed, dtype), wanted, bias


@variants
@each_dtype
def test_approximate_kernels_are_inside(routing, dtype):
    for seed in range(3):
        args = given(routing, seed, dtype=dtype)
        bounds = routing_bounds(*args)
        assert bounds.unknown.double().mean() < 0.1
        for what, kernel in KERNELS.items():
            ids, weights = kernel.route(*args)
            assert bounds.outside(ids, weights) == 0, f"{what}, seed {seed}"


def test_near_ties_are_chosen_either_way():
    """The test above has kernels that choose other experts, and that order them otherwise."""
    args = given(Routing(M.Sigmoid, 5), tokens=256)
    want = route(*args).ids
    ids, _ = KERNELS["tanh.approx, of either sign"].route(*args)
    other_order = (ids != want).any(1)
    other_set = (ids.sort(1).values != want.sort(1).values).any(1)
    assert other_set.sum() > 3 and (other_order & ~other_set).sum() > 3
    bounds = routing_bounds(*args)
    several = (bounds.ids != bounds.ids[:1]).any(-1).any(0)
    assert several[other_set].all()
    assert not bounds.ordered[0][other_order & ~other_set].any()


def test_equal_logits_are_no_near_tie():
    logits = torch.zeros(2, 8)
    logits[1, 3:] = 20.0
    for wanted in VARIANTS[:-4]:
        bounds = routing_bounds(logits, wanted)
        if bounds.unknown.any():
            continue
        assert len(bounds.ids) == 1 and bounds.ordered.all()
        assert_bitwise(bounds.ids[0], route(logits, wanted).ids, name(wanted))


@each_method
def test_weights_are_few_values(method):
    wanted = Routing(method, 1 if method == M.Llama4 else 8)
    logits = logits_of(128, 128, scale=1.0)
    bounds = routing_bounds(logits, wanted, bias_of(128) * 0.05 if method in BIASED else None)
    single = (bounds.weights.low == bounds.weights.high).double().mean()
    softmax = (M.Default, M.Renormalize, M.RenormalizeNaive, M.TopK)
    assert single > (0.99 if method in softmax else 0.8)
    assert not bounds.unknown.any()
    steps = (
        end.bfloat16().view(torch.int16).int() for end in (bounds.weights.high, bounds.weights.low)
    )
    assert next(steps).sub(next(steps)).amax() <= 1
    if method in RAW:
        assert len(bounds.ids) == 1 and bounds.ordered.all()


@pytest.mark.parametrize("wanted", [v for v in VARIANTS if not v.grouped], ids=name)
def test_fp32_weights_are_inside_and_near(wanted, monkeypatch):
    """Before the rounding to bf16, which hides most errors of a few ulp."""
    monkeypatch.setattr(bounds_routing, "rounded", lambda dtype, x: x)
    logits = logits_of(256, 64, scale=3.0)
    bias = bias_of(64) if wanted.method in BIASED else None
    bounds = routing_bounds(logits, wanted, bias)
    assert bounds.unknown.double().mean() < 0.1
    for what, kernel in KERNELS.items():
        found = kernel.in_fp32(logits, wanted, bias)
        assert bounds.outside(found.ids, found.weights) == 0, what
    width = (bounds.weights.high - bounds.weights.low) / bounds.weights.high
    sigmoid = wanted.method in SIGMOID or wanted.method in (M.TopKSigmoid, M.Llama4)
    assert width.median() < (2.0**-10 if sigmoid else 2.0**-16)


# The sets, against all there are


def admissible(low, high, inputs, chosen, pool):
    def before(i, j):
        return low[i] > high[j] or (inputs[i] == inputs[j] and i < j)

    return not any(before(b, a) for a in chosen for b in pool if b not in chosen)


def every_set(low, high, inputs, wanted, groups):
    experts = range(len(low))
    pools = [experts]
    if groups is not None:
        size, names = len(low) // len(groups[0]), range(len(groups[0]))
        some = itertools.combinations(names, wanted.topk_group)
        pools = [
            [e for e in experts if e // size in c]
            for c in some
            if admissible(*groups, names, c, names)
        ]
    return {
        c
        for pool in pools
        for c in itertools.combinations(pool, wanted.top_k)
        if admissible(low, high, inputs, c, pool)
    }


@pytest.mark.parametrize(
    "wanted", [Routing(M.MiniMax2, 3), Routing(M.DeepSeekV3, 4, 4, 3)], ids=name
)
def test_all_sets_are_found(wanted):
    g = torch.Generator().manual_seed(0)
    tokens, experts = 200, 8
    x = torch.randint(0, 13, (tokens, experts), generator=g).double() / 2  # equal logits among them
    bias = torch.zeros(experts).double()
    width = torch.rand(tokens, 1, generator=g).double() * 1.4
    keys = Interval(x - width, x + width)
    ids, many = selections(keys, x, bias, wanted)
    assert 0 < many.sum() < tokens / 2 and len(ids) == SETS
    for t in range(tokens):
        low, high = keys.low[t].tolist(), keys.high[t].tolist()
        groups = None
        if wanted.grouped:
            slack = 1 + 2.0**-24
            two = [
                torch.tensor(end).view(wanted.n_group, -1).sort(1, descending=True).values
                for end in (low, high)
            ]
            sums = [end[:, :2].sum(1) for end in two]
            groups = sums[0].div(slack).tolist(), sums[1].mul(slack).tolist()
        want = every_set(low, high, x[t].tolist(), wanted, groups)
        found = {tuple(sorted(some)) for some in ids[:, t].tolist()}
        assert many[t] or found == want
        assert bool(many[t]) == (len(want) > SETS)


# Mistakes


def test_wrong_ids_and_weights_are_counted():
    for wanted in VARIANTS:
        logits = logits_of(16, EXPERTS)
        bias = bias_of(EXPERTS) if wanted.method in BIASED else None
        bounds = routing_bounds(logits, wanted, bias)
        right = route(logits, wanted, bias)
        ids, weights = right.ids, right.weights_bf16
        k = wanted.top_k
        assert bounds.outside(ids, weights) == 0
        top = bounds.weights.high[:, ~bounds.unknown].amax(0)
        other = weights.clone()
        other[~bounds.unknown] = torch.nextafter(top.bfloat16(), torch.tensor(torch.inf).bfloat16())
        assert bounds.outside(ids, other) == (~bounds.unknown).sum() * k, name(wanted)
        known = int((~bounds.unknown).nonzero()[0])
        worst = ids.clone()
        worst[known, -1] = int(right.scores[known].argmin())
        if int(worst[known, -1]) not in bounds.ids[:, known]:
            assert bounds.outside(worst, weights) >= 1, name(wanted)
        if k > 1:
            twice = ids.clone()
            twice[known, -1] = twice[known, 0]
            assert bounds.outside(twice, weights) >= 1, name(wanted)
        if k > 1 and bounds.ordered[:, known].all():
            assert bounds.outside(ids.flip(1), weights.flip(1)) >= 1, name(wanted)


def test_an_id_twice_is_counted():
    logits = logits_of(8, EXPERTS)
    right = route(logits, Routing(M.TopK, 2))
    ids, weights = (t[:, :1].expand(-1, 2) for t in (right.ids, right.weights_bf16))
    assert routing_bounds(logits, Routing(M.TopK, 2)).outside(ids, weights) == 8


def test_what_is_not_determined_is_unknown():
    logits = logits_of(6, EXPERTS)
    logits[0, 3], logits[1, 3], logits[2, :14] = torch.nan, torch.inf, -torch.inf
    logits[3] = 0.0
    logits[3, 5] = -0.0
    few = [False, False, True, False, False, False]
    assert routing_bounds(logits, Routing(M.Renormalize, 4)).unknown.tolist() == few
    assert routing_bounds(logits, Routing(M.Default, 4)).unknown.tolist()[:2] == [True, True]
    assert routing_bounds(logits, Routing(M.Sigmoid, 4)).unknown.tolist()[:2] == [True, False]
    llama = routing_bounds(logits, Routing(M.Llama4, 1)).unknown.tolist()
    assert llama == [False, False, False, True, False, False]
    logits[4] = 1 + torch.arange(EXPERTS) * 2.0**-14
    assert routing_bounds(logits, Routing(M.Sigmoid, 4)).unknown[4]
    assert routing_bounds(logits - 60, Routing(M.SigmoidRenorm, 4)).unknown.all()


@pytest.mark.parametrize("method", [M.Renormalize, M.TopK, M.TopKSigmoid, M.Llama4], ids=str)
def test_infinite_and_nan_logits_that_are_selected_by_their_bits(method):
    """The reference's weights are inside; a finite one for NaN or infinity is not."""
    wanted = Routing(method, 1 if method == M.Llama4 else 3)
    logits = logits_of(4, EXPERTS)
    logits[0, 3], logits[1, 3], logits[2, 3] = torch.nan, torch.inf, -torch.inf
    found, right = routing_bounds(logits, wanted), route(logits, wanted)
    assert not found.unknown.any() and found.outside(right.ids, right.weights_bf16) == 0
    wrong = right.weights_bf16.nan_to_num(nan=0.25, posinf=1.0)
    changed = ~(wrong == right.weights_bf16)
    assert found.outside(right.ids, wrong) == int(changed.sum())
    assert changed.any() or method == M.Llama4


# Outputs


def layer(seed=0):
    return moe_cases.make(SHAPE, seed=seed)


def output_of(case, ids, weights, order="flashinfer"):
    return moe.fused_moe(case.activations, case.experts, ids, weights, finalize_order=order).output


@pytest.mark.parametrize(
    "wanted",
    [
        Routing(M.Sigmoid, 4),
        Routing(M.MiniMax2, 6),
        Routing(M.Default, 4),
        Routing(M.Renormalize, 4),
        GROUPED,
    ],
    ids=name,
)
def test_the_output_of_approximate_kernels_is_inside(wanted):
    case = layer()
    args = given(wanted, tokens=SHAPE.tokens)
    order = "slot" if wanted.grouped else "flashinfer"
    allowed = routed_moe_bounds(case.activations, case.experts, *args, finalize_order=order)
    seen = []
    for what, kernel in KERNELS.items():
        found = kernel.route(*args)
        if any(all(map(torch.equal, found, other)) for other in seen):
            continue
        seen.append(found)
        assert_inside(output_of(case, *found, order), allowed, what)
    ids, weights = route(*args).ids, route(*args).weights_bf16
    wrong = output_of(case, ids, weights * (1 + 2.0**-7))
    assert not allowed.contains(wrong).all()
    other = ids.clone()
    other[:, -1] = route(*args).scores.argmin(1)
    assert not allowed.contains(output_of(case, other, weights)).all()


def test_a_token_with_too_many_sets_is_unknown():
    case = layer()
    logits = logits_of(SHAPE.tokens, EXPERTS)
    logits[2] = 1 + torch.arange(EXPERTS) * 2.0**-14
    allowed = routed_moe_bounds(case.activations, case.experts, logits, Routing(M.Sigmoid, 4))
    assert allowed.low[2].isinf().all() and allowed.high[2].isinf().all()
    assert allowed.low[[0, 1, 3]].isfinite().all()


def test_slots_in_another_order_are_inside():
    """The order is not known; the heavy cancellation makes it show in fp32."""
    case = layer()
    wanted = Routing(M.Sigmoid, 4)
    logits = torch.full((SHAPE.tokens, EXPERTS), -4.0)
    logits[:, :4] = 1 + torch.arange(4) * 2.0**-13
    allowed = routed_moe_bounds(
        case.activations, case.experts, logits, wanted, output_dtype=torch.float32
    )
    weights = routing_bounds(logits, wanted).weights.low[0].bfloat16()
    ids = torch.arange(4).int().expand(SHAPE.tokens, 4)
    rows = moe.fused_moe(case.activations, case.experts, ids, weights).rows.float()
    found = set()
    for order in map(list, itertools.permutations(range(4))):
        got = finalize(rows[:, order], weights[:, order], "slot")
        assert_inside(got, allowed, str(order))
        found.add(got.sum(dtype=torch.float64).item())
    assert len(found) > 1


def test_local_experts_of_a_routed_call():
    shape = Shape(24, 128, 64, EXPERTS, 4, 4, 8)
    case = moe_cases.make(shape)
    args = given(Routing(M.MiniMax2, 4), tokens=24)
    allowed = routed_moe_bounds(case.activations, case.experts, *args, local_expert_offset=4)
    for what, kernel in KERNELS.items():
        got = moe.fused_moe(
            case.activations, case.experts, *kernel.route(*args), local_expert_offset=4
        ).output
        assert_inside(got, allowed, what)


def test_what_a_case_allows():
    """From logits all that may be chosen; with ids and weights given, these."""
    case = layer()
    wanted = Routing(M.Sigmoid, 4)
    logits = near_ties(SHAPE.tokens, EXPERTS)
    chosen = route(logits, wanted)
    given = {
        "topk": MoECase(
            "given",
            case.activations,
            case.experts,
            wanted,
            EXPERTS,
            ids=chosen.ids,
            weights=chosen.weights_bf16,
        ),
        "logits": MoECase("routed", case.activations, case.experts, wanted, EXPERTS, logits=logits),
    }
    allowed = {what: c.allowed() for what, c in given.items()}
    for what, c in given.items():
        assert_inside(c.reference(), allowed[what], what)
    ids, weights = KERNELS["tanh.approx, of either sign"].route(logits, wanted)
    got = output_of(case, ids, weights)
    assert_inside(got, allowed["logits"])
    assert not allowed["topk"].contains(got).all()


def test_what_a_case_of_cutlass_allows():
    static = moe_cases.make(SHAPE, mode="static")
    experts = with_cutlass(static.experts)
    for build in ("cutlass", "cuda"):
        case = MoECase(
            build,
            static.activations,
            experts,
            Routing(M.Renormalize, 4),
            EXPERTS,
            logits=logits_of(SHAPE.tokens, EXPERTS),
            build=build,
        )
        allowed = case.allowed()
        assert_inside(case.reference(), allowed, build)
        other = replace(case, build="cuda" if build == "cutlass" else "cutlass")
        assert not allowed.contains(other.reference()).all()


def test_an_interval_of_weights():
    """Intervals of either sign, or of both: the ends of the products are at corners."""
    case = layer()
    g = torch.Generator().manual_seed(3)
    centre = torch.randn(case.ids.shape, generator=g)
    ends = [(centre + s * 0.2 * torch.rand(centre.shape, generator=g)).bfloat16() for s in (-1, 1)]
    weights = Interval(*(end.double() for end in ends))
    assert ((weights.low < 0) & (weights.high > 0)).any()
    found = fused_moe_bounds(case.activations, case.experts, case.ids, weights).output
    rows = moe.fused_moe(case.activations, case.experts, case.ids, ends[0]).rows.float()
    touched = torch.zeros_like(found.low, dtype=torch.bool)
    for _ in range(40):
        part = torch.randint(0, 3, centre.shape, generator=g)
        between = (
            ends[0].float() + torch.rand(centre.shape, generator=g) * (ends[1] - ends[0]).float()
        )
        some = torch.where(part == 0, ends[0], torch.where(part == 1, ends[1], between.bfloat16()))
        some = torch.minimum(torch.maximum(some, ends[0]), ends[1])
        got = finalize(rows, some, "flashinfer").bfloat16()
        assert_inside(got, found)
        touched |= (got.double() == found.low) | (got.double() == found.high)
    assert touched.double().mean() > 0.5
    point = fused_moe_bounds(case.activations, case.experts, case.ids, Interval.point(ends[0]))
    as_given = fused_moe_bounds(case.activations, case.experts, case.ids, ends[0])
    assert_bitwise(point.output.low, as_given.output.low, "given weights")
