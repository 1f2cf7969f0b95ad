"""Prepared values stay within fp32 for all weights, biases, limits and maxima."""

# SPDX-License-Identifier: Apache-2.0
from dataclasses import fields

import pytest
import torch
import training_cases
from assertions import assert_bitwise
from moe_cases import GATED, PLAIN

from nvfp4_moe import fake_quantized_moe, fused_moe
from nvfp4_moe.reference.activation import ActivationType
from nvfp4_moe.reference.moe import fp8
from nvfp4_moe.reference.recipe import NVFP44Over6Config, Recipe
from nvfp4_moe.reference.weights.experts import Experts
from nvfp4_moe.reference.weights.layout import gemm1_values
from nvfp4_moe.reference.weights.prepare import assemble_experts, prepare_experts, quantize_weight
from nvfp4_moe.reference.weights.scalars import MOST_OF_WEIGHTS, MOST_RAW, static_encode_scale

MAGNITUDES = [2.0**-133, 1e-39, 1e-37, 7e-36, 1e-34, 1e-30, 1e-20, 1.0, 1e20, 2.0**124]
TINY = MAGNITUDES[:4]
H, INNER = 64, 64
SWIGLU, SITU, RELU2 = ActivationType.Swiglu, ActivationType.Situ, ActivationType.Relu2
RECIPES = [
    Recipe(math, four, build)
    for build in ("cuda", "cute-dsl")
    for math in ("exact", "fast")
    for four in (None, NVFP44Over6Config(256, "MSE"))
]


def weights(kind, sizes, seed=0):
    """An expert of each size: fp32, values that bf16 holds."""
    g = torch.Generator().manual_seed(seed)
    rows = INNER * (2 if kind.gated else 1)
    size = torch.tensor(sizes, dtype=torch.float64)[:, None, None]
    shapes = (len(sizes), rows, H), (len(sizes), H, INNER)
    return tuple((torch.randn(s, generator=g).clamp(-7, 7) * size).bfloat16() for s in shapes)


def biases(kind, sizes, size):
    rows = INNER * (2 if kind.gated else 1)
    ends = torch.linspace(-1, 1, rows) * size, torch.linspace(1, -1, H) * size
    return {
        name: end.expand(len(sizes), -1).contiguous()
        for name, end in zip(("w13_bias", "w2_bias"), ends, strict=True)
    }


def assert_in_fp32(e: Experts, what: str) -> None:
    for field in fields(e):
        t = getattr(e, field.name)
        if isinstance(t, torch.Tensor) and t.dtype != torch.uint8:
            assert t.float().isfinite().all(), (what, field.name)
            if field.name.startswith("output"):
                assert (t >= torch.finfo(torch.float32).tiny).all(), (what, field.name)


@pytest.mark.parametrize("recipe", RECIPES, ids=str)
def test_of_every_recipe(recipe):
    for kind in (SWIGLU, RELU2):
        e = prepare_experts(*weights(kind, MAGNITUDES), kind, recipe=recipe)
        assert_in_fp32(e, kind.name)


@pytest.mark.parametrize("amax", [None, 1e-45, 1e-30, 1.0, 3.4e38])
@pytest.mark.parametrize("kind", [SWIGLU, ActivationType.SwigluStep, SITU, RELU2], ids=str)
def test_beside_every_bias_limit_and_static_scale(kind, amax):
    w = weights(kind, MAGNITUDES)
    static = {} if amax is None else {"input_amax": amax, "intermediate_amax": amax}
    for size in (1e-45, 1.0, 3.4e38):
        given = {name: size for name in kind.parameters.keys() & {"beta", "clamp_limit"}}
        e = prepare_experts(*w, kind, **biases(kind, MAGNITUDES, size), **given, **static)
        assert_in_fp32(e, f"{kind.name}, {size}, {amax}")
        for held in (e.gemm1_bias, e.gemm2_bias, e.gemm1_beta if kind == SWIGLU else None):
            assert held is None or held.abs().max() <= MOST_RAW * 1.001


def test_ordinary_weights_keep_the_scale_of_their_maximum():
    w13, w2 = weights(SWIGLU, MAGNITUDES)
    e = prepare_experts(w13, w2, **biases(SWIGLU, MAGNITUDES, 1e3), beta=1.0)
    amax = w13.abs().amax((1, 2)).float()
    encode = amax.reciprocal() * 2688.0
    held = e.output1_scale_gate_scalar
    own = encode <= MOST_RAW / 1e3
    assert own.tolist() == [size >= 1e-30 for size in MAGNITUDES]
    assert_bitwise(held[own], encode[own].reciprocal(), "scalar")
    assert (held[~own] == held[0]).all()


def test_weights_are_near_their_values_or_the_grid_of_the_least_scale():
    w13, w2 = weights(SWIGLU, MAGNITUDES)
    e = prepare_experts(w13, w2)
    for i in range(len(MAGNITUDES)):
        scalar = e.output1_scale_gate_scalar[i].double()
        got = gemm1_values(e, i)[:, :H].double() * scalar
        error = (got - w13[i].double()).abs().max()
        assert error <= max(w13[i].double().abs().max() / 6, 6 * 2.0**-10 / MOST_OF_WEIGHTS), i
    codes, scales, decode = quantize_weight(w13[3], w13[3].abs().amax(), Recipe("exact"))
    assert decode == 1 / MOST_OF_WEIGHTS and codes.any() and scales.any()


def call(experts, expert):
    g = torch.Generator().manual_seed(1)
    x = torch.randn(3, H, generator=g).bfloat16()
    return x, (torch.full((3, 1), expert, dtype=torch.int32), torch.ones(3, 1))


@pytest.mark.parametrize("kind", GATED + PLAIN, ids=lambda k: k.name)
def test_beside_biases_tiny_weights_are_zeros(kind):
    """The layer's values, and the gradients of everything."""
    given = training_cases.options_of(kind)
    both = {}
    for sizes in (TINY, [0.0] * len(TINY)):
        w13, w2 = weights(kind, sizes)
        added = biases(kind, sizes, 1.0)
        experts = prepare_experts(w13, w2, kind, **added, **given)
        found = []
        for e in range(len(sizes)):
            x, routing = call(experts, e)
            leaves = [t.float().requires_grad_() for t in (w13, w2, *added.values())]
            x.requires_grad_()
            y = fake_quantized_moe(
                x,
                leaves[0],
                leaves[1],
                routing,
                kind,
                w13_bias=leaves[2],
                w2_bias=leaves[3],
                **given,
            )
            assert_bitwise(y.detach(), fused_moe(x.detach(), experts, routing), "value")
            found += [y.detach(), *torch.autograd.grad(y.float().sum(), leaves)]
        both[sizes[0] > 0] = found
    for got, want in zip(both[True], both[False], strict=True):
        assert got.isfinite().all()
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-30)


@pytest.mark.parametrize("size", [1e-36, 1e-10, 1e12])
def test_gradients_do_not_pass_through_the_scalars(size):
    """The layer is linear in w13: its gradient does not depend on the size of w13."""
    kind = ActivationType.Identity
    x, routing = call(None, 0)
    found = []
    for scale in (1.0, size):
        w13, w2 = weights(kind, [1.0])
        w13 = (w13.float() * scale).bfloat16().requires_grad_()
        y = fake_quantized_moe(x, w13, w2, routing, kind)
        (grad,) = torch.autograd.grad(y.float().sum() * 2.0**-30, w13)
        found.append(grad.float() * 2.0**30)
    assert found[1].isfinite().all() and found[1].abs().max() > 0
    torch.testing.assert_close(found[1], found[0], rtol=2**-7, atol=1e-3)


def test_quantized_weights_whose_scale_is_none():
    """A checkpoint's expert of scale 0, or of one that its bias does not fit: same values, in fp32."""
    kind = SWIGLU
    sizes = [0.0, 2.0**-140, 1e-30, 1.0]
    w13, w2 = weights(kind, [1.0] * 4)
    first, second = (
        [
            torch.stack(t)
            for t in zip(
                *(quantize_weight(m, m.abs().amax(), Recipe("exact")) for m in w), strict=True
            )
        ]
        for w in (w13, w2)
    )
    for q in (first, second):
        q[2] = torch.tensor(sizes)
    apart = first[2][:, None] * torch.tensor([1.0, 0.5])
    for decode in (first[2], apart):
        plain = assemble_experts(*first[:2], decode, *second)
        e = assemble_experts(*first[:2], decode, *second, **biases(kind, sizes, 1e9), beta=1e9)
        assert_in_fp32(plain, "no bias")
        assert_in_fp32(e, "bias")
        assert not gemm1_values(e, 0).any() and not gemm1_values(e, 1).any()
        for made in (plain, e):  # an ordinary expert is left alone
            assert_bitwise(made.gemm1_weights_scale[3], plain.gemm1_weights_scale[3], "scales")
            assert made.output1_scale_gate_scalar[3] == decode.reshape(4, -1)[3, -1]
        x, routing = call(e, 2)
        assert fused_moe(x, e, routing).isfinite().all()


@pytest.mark.parametrize("amax", [5e-324, 1e-45, 2e-27, 3.0, 3e38, 1e41, 1e300])
def test_static_encode_scales(amax):
    """Every positive number: a normal fp32 number that ordinary scalars can be divided by."""
    scale = torch.tensor(static_encode_scale(amax), dtype=torch.float32)
    assert 2.0**-126 <= scale <= 2.0**100
    if 1e-26 < amax < 1e41:
        assert scale == torch.tensor(2688 / amax, dtype=torch.float32)


@pytest.mark.parametrize("name", ["alpha", "beta"])
def test_a_bound_of_situ_is_positive(name):
    """tanh(x / 0) would be NaN at 0."""
    w = weights(SITU, [1.0])
    for value in (0.0, -1.0, torch.inf, torch.tensor([0.0])):
        with pytest.raises(ValueError, match=f"{name}.* is .*; it must be positive and finite"):
            prepare_experts(*w, SITU, **{name: value})
    prepare_experts(*weights(SWIGLU, [1.0]), **{name: -1.0})


def test_fp8_of_the_smallest_weights():
    amax = torch.tensor([2.0**-149, 1e-38, 1e-30, 1.0, 3e38, 0.0])
    encode = fp8.encode_scale(amax)
    assert encode.isfinite().all() and encode[-1] == 1
    assert_bitwise(encode[2:4], 448.0 / amax[2:4], "ordinary")
    codes = fp8.quantize_per_tensor(torch.zeros(6), encode)
    assert not codes.float().any()
