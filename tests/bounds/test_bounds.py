"""The intervals of the fused call: they hold what keeps the contract, and little else."""

# SPDX-License-Identifier: Apache-2.0
from dataclasses import replace

import moe_cases
import pytest
import torch
from assertions import assert_bitwise, assert_inside
from moe_cases import GATED, PLAIN, Shape

from nvfp4_moe.differential.conforming import truncating
from nvfp4_moe.reference.activation import ActivationType
from nvfp4_moe.reference.bounds import product as bounds_product
from nvfp4_moe.reference.bounds.accumulation import ANY_ORDER, CONTIGUOUS, FP32, sum_of_products
from nvfp4_moe.reference.bounds.activation import activation_bounds
from nvfp4_moe.reference.bounds.interval import Interval
from nvfp4_moe.reference.bounds.moe import fused_moe_bounds
from nvfp4_moe.reference.bounds.product import Product
from nvfp4_moe.reference.bounds.requantize import requantize_blocks, requantize_rows
from nvfp4_moe.reference.moe import layer as moe
from nvfp4_moe.reference.moe.activations import Activations, hidden_values
from nvfp4_moe.reference.numerics.accumulate import matmul
from nvfp4_moe.reference.quantize import quantize_block_scales, quantize_per_token
from nvfp4_moe.reference.recipe import NVFP44Over6Config, Recipe

RECIPES = [
    Recipe(),
    Recipe("exact"),
    Recipe(build="cute-dsl"),
    Recipe("fast", NVFP44Over6Config()),
    Recipe("exact", NVFP44Over6Config(256, "MSE")),
    Recipe("exact", NVFP44Over6Config(448, "MAE", True)),
]
SHAPE = Shape(6, 272, 176, 4, 2)
FIRST = torch.zeros(1, dtype=torch.int64)  # the expert of every row


def bounds_of(case, **options):
    return fused_moe_bounds(case.activations, case.experts, case.ids, case.weights, **options)


def output_of(case, **options):
    return moe.fused_moe(case.activations, case.experts, case.ids, case.weights, **options).output


@pytest.mark.parametrize("kind", GATED + PLAIN, ids=lambda k: k.name)
@pytest.mark.parametrize("mode", ["per-token", "static", "bf16"])
def test_the_reference_is_inside(kind, mode):
    case = moe_cases.make(SHAPE, kind, mode)
    for recipe in RECIPES if mode == "per-token" else RECIPES[:1]:
        bounds = bounds_of(case, recipe=recipe)
        for accumulate in ("fp64", "fp32"):
            got = output_of(case, recipe=recipe, accumulate=accumulate)
            assert_inside(got, bounds.output, f"{recipe} {accumulate}")


def test_small_calls_are_determined_to_the_bit():
    """Codes times scales have few bits: fp32 holds every partial sum of 272 of them."""
    case = moe_cases.make(SHAPE)
    bounds = bounds_of(case)
    assert_bitwise(bounds.accumulator1.low, bounds.accumulator1.high, "first sums")
    single = (bounds.output.low == bounds.output.high).double().mean()
    assert single > 0.95
    bf16 = bounds_of(moe_cases.make(SHAPE, mode="bf16"))
    assert (bf16.output.low == bf16.output.high).double().mean() < 0.5


def products(k, seed=0, n=4, m=8):
    g = torch.Generator().manual_seed(seed)
    x, w = torch.randn(n, k, generator=g).bfloat16(), torch.randn(m, k, generator=g).bfloat16()
    return x.float(), w.float()


@pytest.mark.parametrize("k", [16, 100, 1024])
def test_sums_in_other_orders_and_widths(k):
    x, w = products(k)
    found = sum_of_products(Interval.point(x), w, ANY_ORDER)
    ordered = sum_of_products(Interval.point(x), w, CONTIGUOUS)
    assert (ordered.high - ordered.low <= found.high - found.low).all()
    order = torch.randperm(k)
    assert_inside(matmul(x, w, "fp32"), ordered, "ascending")
    assert_inside(matmul(x[:, order], w[:, order], "fp32"), found, "permuted")
    assert_inside(truncating(16, 1)(x, w, None), ordered, "truncating")
    largest = (x[:, None] * w[None]).sort(-1).values
    ones = torch.ones(1, k)
    worst = matmul(largest.flatten(0, 1), ones, "fp32").view(4, 8)
    assert_inside(worst, found, "negative terms first")


def test_a_sum_of_16_bits_is_outside():
    x, w = products(1024)
    total = torch.zeros(4, 8)
    for k in range(0, 1024, 64):
        total = (total + x[:, k : k + 64] @ w[:, k : k + 64].T).half().float()
    assert not sum_of_products(Interval.point(x), w, ANY_ORDER).contains(total).all()
    # The 14 bits that Hopper's tensor cores keep of fp8 products.
    coarse = truncating(16, -10)(x, w, None)
    assert not sum_of_products(Interval.point(x), w, ANY_ORDER).contains(coarse).all()


def test_exact_sums_are_points_and_others_are_not():
    x = torch.tensor([[1.0, 2.0**12, -(2.0**12), 0.0]])
    one = torch.ones(1, 4)
    found = sum_of_products(Interval.point(x), one, FP32)
    assert found.low == found.high == 1
    x[0, 1:3] *= 2**13  # 2^25 + 1 is not an fp32 number
    found = sum_of_products(Interval.point(x), one, FP32)
    assert found.low <= 0 and found.high >= 1


@pytest.mark.parametrize("kind", GATED + PLAIN, ids=lambda k: k.name)
def test_the_activation_of_an_interval(kind):
    """Values drawn from it have their activations inside, and its ends have nearly all of it."""
    g = torch.Generator().manual_seed(int(kind))
    given = {"alpha": 1.702, "beta": 1.0, "clamp_limit": 1.5}
    given = {name: given[name] for name in kind.parameters}
    case = moe_cases.make(Shape(1, 128, 64, 1, 1), kind, **given)
    width = case.experts.gemm1_weights.shape[1]
    centre = torch.randn(64, width, generator=g).double() * 40
    low = centre.float().double()
    high = (centre + torch.rand(64, width, generator=g) * 3).float().double()
    found = activation_bounds(Interval(low, high), case.experts, FIRST)
    for _ in range(50):
        part = torch.rand(64, width, generator=g).double()
        inner = (low + part * (high - low)).float()
        assert_inside(moe.activate_raw(inner, case.experts, 0), found, kind.name)
    points = activation_bounds(Interval.point(low), case.experts, FIRST)
    width = (points.high - points.low) / points.magnitude.clamp(min=1e-6)
    coarse = (ActivationType.GegluTanh, ActivationType.Situ)
    assert width.median() < (2**-8 if kind in coarse else 2**-17)


@pytest.mark.parametrize(
    "kind", [ActivationType.Silu, ActivationType.Gelu, ActivationType.GegluTanh]
)
def test_the_minimum_between_the_ends(kind):
    case = moe_cases.make(Shape(1, 128, 64, 1, 1), kind)
    gate = 1 / case.experts.output1_scale_gate_scalar[0]
    columns = case.experts.gemm1_weights.shape[1]
    ones = torch.ones(1, columns) * gate
    ones[:, : columns // 2] = 1 / case.experts.output1_scale_scalar[0] if kind.gated else gate
    argument = torch.ones(1, columns)
    argument[:, : columns // 2 if kind.gated else 0] = 0  # of the gate alone; up is 1
    low, high = (ones * torch.where(argument == 1, end, 1.0) for end in (-3.0, -0.2))
    found = activation_bounds(Interval(low.double(), high.double()), case.experts, FIRST)
    for end in torch.linspace(-3, -0.2, 57):
        inner = ones * torch.where(argument == 1, end, 1.0)
        assert_inside(moe.activate_raw(inner, case.experts, 0), found, f"{end}")


@pytest.mark.parametrize("recipe", RECIPES, ids=str)
def test_the_requantization_of_an_interval(recipe):
    """Rows drawn from it, maxima and blocks at the ends included."""
    g = torch.Generator().manual_seed(1)
    centre = torch.randn(8, 64, generator=g) * torch.rand(8, 1, generator=g) * 8
    centre[0] = 0
    step = centre.abs() * 2.0**-8
    ends = [(centre + sign * step).bfloat16().double() for sign in (-1, 1)]
    found, scale, row, unknown = requantize_rows(Interval(*ends), recipe)
    assert not unknown.any() and len(row) > 8
    for trial in range(40):
        part = torch.randint(0, 2, centre.shape, generator=g).bool()
        if trial < 2:
            part = torch.full_like(part, trial == 1)
        x = torch.where(part, ends[1], ends[0]).bfloat16()
        q = quantize_per_token(x, recipe.base_scale_inv, recipe)
        values = hidden_values(Activations(q.codes, q.block_scales))
        for r in range(8):
            mine = (row == r) & (scale == q.per_token_scale[r])
            assert mine.sum() >= 1, f"the maximum of row {r} is no candidate"
            at = mine.nonzero()[0, 0]
            assert_inside(values[r], found[at], f"row {r}")


def test_points_are_requantized_to_one_value():
    x = torch.randn(8, 64).bfloat16()
    for recipe in RECIPES:
        found, scale, _, _ = requantize_rows(Interval.point(x), recipe)
        q = quantize_per_token(x, recipe.base_scale_inv, recipe)
        values = hidden_values(Activations(q.codes, q.block_scales)).double()
        assert_bitwise(found.low, values, "low")
        assert_bitwise(found.high, values, "high")
        assert_bitwise(scale, q.per_token_scale, "scale")


def test_static_blocks_hold_fast_and_exact():
    x = torch.randn(8, 64) * 500
    found = requantize_blocks(Interval(x.double() * (1 - 1e-6), x.double() * (1 + 1e-6)), Recipe())
    for recipe in RECIPES[:2]:
        q = quantize_block_scales(x, recipe)
        values = hidden_values(Activations(q.codes, q.block_scales))
        assert_inside(values, found, str(recipe))


def test_bounds_given_an_intermediate():
    case = moe_cases.make(SHAPE)
    steps = moe.fused_moe(
        case.activations, case.experts, case.ids, case.weights, keep_steps=True
    ).steps
    exact = bounds_of(case, intermediate=steps["intermediate"].float())
    assert (exact.rows.low == exact.rows.high).all()
    wrong = steps["intermediate"].float() * 1.02
    other = bounds_of(case, intermediate=wrong)
    assert not other.rows.contains(exact.rows.low).all()


def test_bounds_without_their_error_would_be_wrong(monkeypatch):
    """The terms that widen the intervals are needed: a heavy-tailed call leaves narrower ones."""
    x, w = products(4096, n=16, m=64)
    zero = replace(CONTIGUOUS, per_term=0.0, per_step=0.0)
    found = sum_of_products(Interval.point(x), w, zero)
    assert not found.contains(matmul(x, w, "fp32")).all()
    monkeypatch.setattr(bounds_product, "U", 0.0)
    point = Product.of(Interval.point(torch.full((64,), 3.0)))
    scale = torch.rand(64) + 1
    assert not point.times(scale).result().contains(3.0 * scale).all()
