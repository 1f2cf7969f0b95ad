"""Intervals of numbers that fp32 cannot hold: overflow, underflow, NaN."""

# SPDX-License-Identifier: Apache-2.0
import itertools
from dataclasses import replace

import moe_cases
import pytest
import torch
from assertions import assert_inside
from moe_cases import GATED, PLAIN, Shape

from nvfp4_moe.cases.fuzz import Draw
from nvfp4_moe.cases.moe_case import MoECase
from nvfp4_moe.differential.verdict import Allowed
from nvfp4_moe.reference.activation import ActivationType
from nvfp4_moe.reference.bounds.accumulation import ANY_ORDER, CONTIGUOUS, sum_of_products
from nvfp4_moe.reference.bounds.interval import Interval, hull
from nvfp4_moe.reference.bounds.moe import fused_moe_bounds
from nvfp4_moe.reference.bounds.parallel import all_reduce_bounds
from nvfp4_moe.reference.bounds.product import Product
from nvfp4_moe.reference.moe import layer as moe
from nvfp4_moe.reference.moe.activations import Activations, quantize_activations
from nvfp4_moe.reference.moe.routing import Routing, RoutingMethodType
from nvfp4_moe.reference.numerics.accumulate import matmul
from nvfp4_moe.reference.numerics.fp32 import flush
from nvfp4_moe.reference.recipe import NVFP44Over6Config, Recipe
from nvfp4_moe.reference.weights.prepare import prepare_experts

INF, NAN = torch.inf, torch.nan
SHAPE = Shape(4, 128, 128, 2, 1)
IDS = torch.tensor([[0], [1], [0], [1]], dtype=torch.int32)
VALUES = (-INF, -3e38, -1.0, -1e-40, 0.0, 1e-40, 2.0, 3e38, INF, NAN)


def interval(low, high):
    return Interval(*(torch.tensor([end], dtype=torch.float64) for end in (low, high)))


@pytest.mark.parametrize(
    "low,high,held",
    [
        (-1, 2, (-1.0, -1e-40, 0.0, 1e-40, 2.0)),
        (3e38, INF, (3e38, INF)),
        (INF, INF, (INF,)),
        (-INF, -1, (-INF, -3e38, -1.0)),
        (NAN, NAN, (NAN,)),
        (-INF, INF, VALUES),
    ],
)
def test_what_an_interval_contains(low, high, held):
    found = interval(low, high).contains(torch.tensor(VALUES).double())
    assert [v for v, f in zip(VALUES, found.tolist(), strict=True) if f] == pytest.approx(
        held, nan_ok=True
    )


def ends(i):
    return [i.low.item(), i.high.item()]


@pytest.mark.parametrize(
    "a,b,product,total",
    [
        ((0, 0), (INF, INF), (NAN, NAN), (INF, INF)),
        ((0, 0), (3, INF), (-INF, INF), (3, INF)),
        ((0, 0), (-INF, INF), (-INF, INF), (-INF, INF)),
        ((1, 2), (3, INF), (3, INF), (4, INF)),
        ((1, 2), (NAN, NAN), (NAN, NAN), (NAN, NAN)),
        ((-INF, INF), (NAN, NAN), (NAN, NAN), (NAN, NAN)),
        ((-INF, -INF), (INF, INF), (-INF, -INF), (NAN, NAN)),
        ((-INF, 5), (INF, INF), (-INF, INF), (-INF, INF)),
    ],
)
def test_products_and_sums_of_what_is_not_finite(a, b, product, total):
    for x, y in ((interval(*a), interval(*b)), (interval(*b), interval(*a))):
        assert ends(x * y) == pytest.approx(product, nan_ok=True)
        assert ends(x + y) == pytest.approx(total, nan_ok=True)


def test_a_hull_of_numbers_and_nan_claims_nothing():
    assert hull(interval(NAN, NAN), interval(1, 2)).unknown.all()
    assert hull(interval(NAN, NAN), interval(NAN, NAN)).nan.all()


def test_products_in_any_association():
    """Three factors have partial products that overflow, underflow, both, or neither."""
    factors = torch.tensor(
        [
            [1e30, 1e30, 1e-30],
            [1e-30, 1e-30, 1e30],
            [1e30, 1e30, 1e-38],
            [3.0, 5.0, 7.0],
            [1e30, 1e30, 1e30],
            [1e30, 1e30, 0.0],
        ]
    )
    x, y, z = (f[:, None] for f in factors.T)
    found = Product.of(Interval.point(x)).times(y).times(z).result()
    for got in ((x * y) * z, x * (y * z), (x * z) * y):
        assert found.contains(got).all()
    assert found.single[:, 0].tolist() == [False, False, False, False, True, False]
    assert found.unknown[:, 0].tolist() == [False, False, True, False, False, True]
    assert not found.contains(torch.full_like(x, -1.0))[[0, 1, 3, 4]].any()
    assert ends(found[4]) == [INF, INF]


def associations(factors):
    """Every product of these, as nested pairs."""
    first, *rest = factors
    if not rest:
        yield first
    for taken in itertools.product((False, True), repeat=len(rest)):
        left = [first, *itertools.compress(rest, taken)]
        right = [x for x, t in zip(rest, taken, strict=True) if not t]
        if right:
            yield from itertools.product(associations(left), associations(right))


def evaluated(pair, after):
    """The product of nested pairs in fp32, each number and each part put through `after`."""
    if isinstance(pair, tuple):
        return after(evaluated(pair[0], after) * evaluated(pair[1], after))
    return after(pair)


@pytest.mark.parametrize("count", [2, 3, 4])
def test_every_association_flushed_or_not(count):
    d = Draw(count)
    factors = [
        torch.stack([d.scalars(1, d.exponent(), 1.0) for _ in range(800)]) for _ in range(count)
    ]
    product = Product.of(Interval.point(factors[0]))
    for factor in factors[1:]:
        product = product.times(factor)
    found = product.result()
    for pair in associations(factors):
        for after in (torch.clone, flush):
            assert found.contains(evaluated(pair, after)).all()
    assert found.unknown.double().mean() < 0.1 and found.nan.any()


@pytest.mark.parametrize("accumulation", [ANY_ORDER, CONTIGUOUS], ids=lambda a: a.name)
def test_sums_that_overflow(accumulation):
    """One way for sure, one way perhaps, both ways, and operands that are not finite."""
    big = 3e38
    x = torch.tensor(
        [
            [big, big, 1.0, 0.0],
            [big, big, -big, 1.0],
            [big, big, -big, -big],
            [INF, 1.0, 2.0, -big],
            [INF, -INF, 0.0, 0.0],
            [NAN, 1.0, 0.0, 0.0],
        ]
    )
    w = torch.tensor([[1.0, 1.0, 1.0, 1.0], [0.0, 1.0, 1.0, 1.0]])
    found = sum_of_products(Interval.point(x), w, accumulation)
    assert ends(found[0, 0]) == [INF, INF] and found.low[0, 1] == pytest.approx(big)
    assert found.low[1, 0] < 3.1e38 and found.high[1, 0] == INF
    assert found.unknown[2, 0] and ends(found[3, 0]) == [INF, INF]
    assert found.nan[3:, 1].tolist() == [True, True, True] and found.nan[4:, 0].all()
    assert found.contains(matmul(x, w, "fp32")).all()
    either = torch.tensor([[INF, -big, -big, 1.0]])  # inf first, or the sum of the others, -inf
    assert sum_of_products(Interval.point(either), w[:1], accumulation).unknown.all()
    maybe = Interval(x[0:1].double(), torch.tensor([[INF, big, 1.0, 0.0]]).double())
    assert sum_of_products(maybe, w, accumulation).unknown.all()


@pytest.mark.parametrize("exponent", [0, -6, -8, -9, -10, -11, -12])
def test_squares_that_leave_fp32(exponent):
    """4over6 by MSE squares differences below 2^-63: it chooses 6 then, both errors being zero."""
    recipe = Recipe("exact", NVFP44Over6Config(err_mode="MSE"))
    torch.manual_seed(0)
    w13, w2 = torch.randn(2, 256, 512) / 512**0.5, torch.randn(2, 512, 128) / 128**0.5
    experts = prepare_experts(w13.bfloat16(), w2.bfloat16())
    x = (torch.randn(64, 512) * 10.0**exponent).bfloat16()
    a, ids, ones = quantize_activations(x, recipe), IDS.repeat(16, 1), torch.ones(64, 1)
    for accumulation in (ANY_ORDER, CONTIGUOUS):
        found = fused_moe_bounds(a, experts, ids, ones, recipe=recipe, accumulation=accumulation)
        got = moe.fused_moe(a, experts, ids, ones, recipe=recipe).output
        assert_inside(got, found.output, accumulation.name)


@pytest.mark.parametrize(
    "kind,exponent",
    [(ActivationType.Identity, 35), (ActivationType.Relu, 36), (ActivationType.Swiglu, 18)],
)
def test_overflow_before_a_scalar_brings_it_back(kind, exponent):
    torch.manual_seed(0)
    rows = 256 if kind.gated else 128
    w13 = (torch.randn(2, rows, 128) * 10.0**exponent / 128**0.5).bfloat16()
    experts = prepare_experts(w13, (torch.randn(2, 128, 128) * 1e-2).bfloat16(), kind)
    a = quantize_activations(torch.randn(4, 128).bfloat16(), Recipe())
    ids, ones = IDS, torch.ones(4, 1)
    found = fused_moe_bounds(a, experts, ids, ones).output
    got = moe.fused_moe(a, experts, ids, ones).output
    assert not got.isfinite().all() and found.contains(got).all()


@pytest.mark.parametrize("kind", GATED + PLAIN, ids=lambda k: k.name)
@pytest.mark.parametrize("value", [NAN, INF])
def test_a_token_that_must_be_nan(kind, value):
    """Its scale is NaN, or infinite: no number passes for it, nor a NaN for another token."""
    case = moe_cases.make(SHAPE, kind)
    scale = case.activations.per_token_scale.clone()
    scale[2] = value
    a = replace(case.activations, per_token_scale=scale)
    output = fused_moe_bounds(a, case.experts, case.ids, case.weights).output
    got = moe.fused_moe(a, case.experts, case.ids, case.weights).output
    assert got[2].isnan().all() == output.nan[2].all() and output.contains(got).all()
    if got[2].isnan().all():
        assert not output.contains(torch.zeros_like(got))[2].any()
    others = torch.tensor([0, 1, 3])
    assert not output.contains(torch.full_like(got, NAN))[others].any()


def test_a_reduction_of_what_is_not_finite():
    parts = torch.tensor(
        [
            [INF, INF, 3e38, 3e38, NAN, -3e38],
            [-INF, 1.0, 3e38, 3e38, 1.0, 1.0],
            [1.0, 1.0, -3e38, 1.0, 1.0, -3e38],
        ]
    ).bfloat16()
    found = all_reduce_bounds([Interval.point(p) for p in parts], *[torch.bfloat16] * 2)
    assert found.nan.tolist() == [True, False, False, False, True, False]
    assert found.low[1] == INF and found.low[3] == INF and found.high[5] == -INF
    assert found.low[2] < 3.1e38 and found.high[2] == INF


def test_flashinfer_alone_may_drop_one_of_two_equal_ids():
    made = moe_cases.make(Shape(4, 128, 128, 4, 2))
    ids = made.ids.clone()
    ids[1, 1] = ids[1, 0]
    case = MoECase(
        "",
        made.activations,
        made.experts,
        Routing(RoutingMethodType.Renormalize, ids.shape[1]),
        4,
        ids=ids,
        weights=made.weights,
    )
    dropped = ids.clone()
    dropped[1, 1] = -1
    got = moe.fused_moe(case.activations, case.experts, dropped, made.weights).output
    assert (got[1] != case.reference()[1]).any()
    for backend, seen in (
        ("triton", True),
        ("flashinfer:cute-dsl", True),
        ("flashinfer:trtllm", False),
    ):
        assert (Allowed(case, backend=backend).first(got) is not None) == seen, backend
    assert Allowed(case, backend="flashinfer:trtllm").wrong(got + 1)[0].any()


@pytest.mark.parametrize("kind", [ActivationType.Swiglu, ActivationType.Relu], ids=lambda k: k.name)
def test_flashinfer_alone_may_drop_a_nan_in_its_epilogue(kind):
    """A number where the contract says NaN: seen of ours, not of FlashInfer's closed kernels."""
    made = moe_cases.make(SHAPE, kind, "bf16")
    x = made.activations.hidden_states.clone()
    x[2, 5] = NAN
    routing = Routing(RoutingMethodType.Renormalize, 1)
    case = MoECase("", Activations(x), made.experts, routing, 2, ids=IDS, weights=made.weights)
    got = case.reference()
    assert got[2].isnan().all() and got[[0, 1, 3]].isfinite().all()
    dropped = got.nan_to_num(nan=1.0)
    for backend, seen in (("triton", True), ("reference", True), ("flashinfer:trtllm", False)):
        judge = Allowed(case, backend=backend)
        assert judge.first(got) is None
        assert judge.wrong(dropped)[2].all() == seen, backend
        assert judge.wrong(torch.full_like(got, NAN))[[0, 1, 3]].all()
