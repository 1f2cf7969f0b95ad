"""The reference's producers: their accuracy, their order, and what the doors reject."""

# SPDX-License-Identifier: Apache-2.0
import math

import producer_cases
import pytest
import torch
from assertions import assert_bitwise, assert_inside, assert_quantized
from hypothesis import given, settings
from hypothesis import strategies as st

from nvfp4_moe import (
    UnsupportedError,
    add_rmsnorm_nvfp4_quantize,
    rmsnorm_nvfp4_quantize,
    silu_and_mul_nvfp4_quantize,
)
from nvfp4_moe.kernels import triton_target
from nvfp4_moe.reference import fused_quantize
from nvfp4_moe.reference.bounds.interval import Interval, rounded
from nvfp4_moe.reference.quantize import quantize_per_token
from nvfp4_moe.reference.recipe import NVFP44Over6Config, Recipe, SfLayout

ULP = 2.0**-23


@pytest.fixture(autouse=True)
def on_a_cpu(monkeypatch):
    monkeypatch.setattr(triton_target, "INTERPRETING", False)


def test_exp_is_within_an_ulp_and_a_half():
    t = torch.linspace(-87, 88.7, 2**20)
    want = t.double().exp()
    assert ((fused_quantize.exp(t).double() - want) / want).abs().max() < 1.5 * ULP
    ends = torch.tensor([88.73, 1e30, math.inf, -1e30, -math.inf, math.nan, 0.0])
    got = fused_quantize.exp(ends)
    assert got[:3].isinf().all() and (got[3:5] == fused_quantize.exp(torch.tensor(-87.0))).all()
    assert got[5].isnan() and got[6] == 1


def test_silu_of_every_number_is_inside_the_interval():
    """The interval is fp64's +- 6 * 2^-23: exp within 2 ulp, one sum, one quotient and one product.

    Below -88.7 the exponential is infinite, and at most 89 * 2^-128 is lost.
    """
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    gate = bits.view(torch.bfloat16)
    gate = gate[gate.isfinite()][:, None]
    exact = gate.double() * torch.sigmoid(gate.double()) * 3
    interval = Interval.point(exact).widened(exact.abs() * 6 * ULP + 3 * 89 * 2.0**-128)
    got = fused_quantize.silu_and_mul(torch.cat((gate, torch.full_like(gate, 3)), 1))
    assert_inside(got, rounded(torch.bfloat16, interval), "silu")


def test_the_gate_is_the_first_half():
    x = torch.tensor([[100.0, 2.0]]).bfloat16()
    assert fused_quantize.silu_and_mul(x).tolist() == [[200.0]]
    assert fused_quantize.silu_and_mul(x.flip(1)).item() == pytest.approx(176, abs=1)


@settings(max_examples=30)
@given(m=st.integers(1, 4), k=st.integers(1, 300), seed=st.integers(0, 99))
def test_the_sum_of_squares_is_a_tree(m, k, seed):
    x = torch.randn(m, k, generator=torch.Generator().manual_seed(seed))

    def tree(terms):
        if len(terms) == 1:
            return terms[0]
        padded = terms + [torch.zeros(())] * (len(terms) % 2)
        return tree([a + b for a, b in zip(padded[::2], padded[1::2], strict=True)])

    for row, got in zip(x, fused_quantize.sum_of_squares(x), strict=True):
        assert_bitwise(got[None], tree(list(row * row))[None], f"{k} columns")


def test_the_square_root_is_rounded_to_nearest():
    """torch's own root in fp32 is not, on some processors; `math.sqrt` is, in fp64."""
    g = torch.Generator().manual_seed(0)
    bits = torch.randint(0, 0x7F800000, (20000,), generator=g, dtype=torch.int32)
    x = torch.cat((bits.view(torch.float32), torch.linspace(0.5, 2, 20000, dtype=torch.float32)))
    want = torch.tensor([math.sqrt(v) for v in x.tolist()], dtype=torch.float64).float()
    assert_bitwise(fused_quantize.square_root(x), want, "square root")


@pytest.mark.parametrize("k", [16, 2048, 7168])
def test_norms_are_near_those_of_fp64(k):
    x, weight = producer_cases.matrix(4, k), producer_cases.matrix(1, k, seed=1)[0]
    residual = producer_cases.matrix(4, k, seed=2)
    for total, got in (
        (x.double(), fused_quantize.rmsnorm(x, weight, 1e-5)),
        (x.double() + residual.double(), fused_quantize.add_rmsnorm(x, residual, weight, 1e-5)[0]),
    ):
        root = (total.square().mean(1, keepdim=True) + 1e-5).sqrt()
        exact = total / root * weight.double()
        # log2(K) + 1 roundings of a sum of squares, halved by the root, then six more.
        interval = Interval.point(exact).widened(exact.abs() * (0.5 * math.log2(2 * k) + 6) * ULP)
        assert_inside(got, rounded(torch.bfloat16, interval), f"K {k}")


def test_the_norm_is_of_the_sum_before_it_is_rounded():
    """As FlashInfer's: 256 + 1 is no bf16 number, so that the residual loses what the norm has."""
    x, residual = torch.full((1, 16), 256.0).bfloat16(), torch.zeros(1, 16).bfloat16()
    residual[0, :8] = 1
    weight = torch.ones(16).bfloat16() * 128
    normed, kept = fused_quantize.add_rmsnorm(x, residual, weight, 0.0)
    assert (kept == 256).all()
    fp32 = x.float() + residual.float()
    r = fp32[0].double().square().mean().rsqrt()
    assert (normed == (fp32.double() * r * 128).bfloat16()).all()


# The doors


@pytest.mark.parametrize("dtype", producer_cases.DTYPES)
@pytest.mark.parametrize("layout", list(SfLayout), ids=lambda layout: layout.name)
def test_the_doors_are_the_two_steps(dtype, layout):
    x, weight = producer_cases.matrix(9, 64, dtype), producer_cases.matrix(1, 64, dtype)[0]
    residual = producer_cases.matrix(9, 64, dtype, seed=4)
    recipe = Recipe("exact", NVFP44Over6Config(256), "cute-dsl")
    options = {
        "sfLayout": layout,
        "nvfp4_4over6": recipe.four_over_six,
        "fast_math": False,
        "build": "cute-dsl",
    }

    def two(values, r):
        return quantize_per_token(values, r.base_scale_inv, r, layout)

    both = torch.cat((x, residual), 1)
    assert_quantized(
        silu_and_mul_nvfp4_quantize(both, **options),
        two(fused_quantize.silu_and_mul(both, "cute-dsl"), recipe),
        "s",
    )
    assert_quantized(
        rmsnorm_nvfp4_quantize(x, weight, 1e-5, **options),
        two(fused_quantize.rmsnorm(x, weight, 1e-5), recipe),
        "rmsnorm",
    )
    values, total = fused_quantize.add_rmsnorm(x, residual, weight)
    got = add_rmsnorm_nvfp4_quantize(x, residual, weight, sfLayout=layout, fast_math=True)
    assert_quantized(got, two(values, Recipe()), "add_rmsnorm")
    assert_bitwise(residual.nan_to_num(), total.nan_to_num(), "the residual is updated in place")


X, W = producer_cases.matrix(6, 64), producer_cases.matrix(1, 64)[0]
INVALID = {
    "list": (lambda: rmsnorm_nvfp4_quantize([1], W), TypeError, "x is a list of 1; it must be a"),
    "fp32": (lambda: rmsnorm_nvfp4_quantize(X.float(), W), ValueError, "x is float32 .*it must be a"),
    "K 24": (
        lambda: silu_and_mul_nvfp4_quantize(X[:, :48]), ValueError,
        r"x is bfloat16 \[6, 48\]; it must be \[M, 2K\], K a positive multiple of 16",
    ),
    "weight": (
        lambda: rmsnorm_nvfp4_quantize(X, W[:32]), ValueError,
        r"weight is bfloat16 \[32\]; it must be .*\[64\]",
    ),
    "weight dtype": (lambda: rmsnorm_nvfp4_quantize(X, W.half()), ValueError, "weight is float16"),
    "residual": (
        lambda: add_rmsnorm_nvfp4_quantize(X, X[:3], W), ValueError, r"residual is .*\[3, 64\]; "
    ),
    "residual strides": (
        lambda: add_rmsnorm_nvfp4_quantize(X, torch.zeros(64, 6).bfloat16().T, W), ValueError,
        r"residual has strides \(1, 6\); it must be contiguous",
    ),
    "eps": (lambda: rmsnorm_nvfp4_quantize(X, W, torch.ones(1)), TypeError, "eps is float32"),
    "scale": (
        lambda: silu_and_mul_nvfp4_quantize(X, torch.ones(2)), ValueError, "a_global_sf is float32",
    ),
    "layout": (lambda: silu_and_mul_nvfp4_quantize(X, sfLayout=7), ValueError, "sfLayout is 7; "),
    "backend": (
        lambda: silu_and_mul_nvfp4_quantize(X, backend="cuda"), ValueError,
        "backend is 'cuda'; it must be one of auto, triton, reference",
    ),
    "triton": (
        lambda: silu_and_mul_nvfp4_quantize(X, backend="triton"), UnsupportedError,
        "backend triton cannot serve this call: x is on the cpu",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", INVALID)
def test_the_doors_reject(name):
    call, error, message = INVALID[name]
    with pytest.raises(error, match=message):
        call()


def test_subnormal_numbers_are_zeros_in_the_cuda_build():
    """FlashInfer's kernel gives NaN for 7e-40 times infinity, as golden arrays show."""
    x = torch.tensor([[7e-40, torch.inf, torch.inf, 7e-40]]).bfloat16()
    assert fused_quantize.silu_and_mul(x, "cuda").isnan().all()
    assert fused_quantize.silu_and_mul(x, "cute-dsl").isposinf().all()
