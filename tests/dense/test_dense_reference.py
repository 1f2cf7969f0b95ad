"""The reference's dense product, spelled out element by element, and the interval around it."""

# SPDX-License-Identifier: Apache-2.0
from dataclasses import replace

import dense_cases
import pytest
import torch
from assertions import assert_bitwise, assert_inside
from hypothesis import given, settings
from hypothesis import strategies as st

from nvfp4_moe.reference import dense
from nvfp4_moe.reference.bounds.accumulation import FP32
from nvfp4_moe.reference.bounds.dense import mm_fp4_bounds
from nvfp4_moe.reference.numerics import e2m1, e4m3
from nvfp4_moe.reference.recipe import SfLayout


def swizzled(row: int, block: int, blocks: int, tile: int) -> int:
    """Return the offset of a block scale, from the formulas of `reference/layouts.py`."""
    start = (row // tile) * (-(-blocks // 4)) + block // 4
    if tile == 8:
        return start * 32 + row % 8 * 4 + block % 4
    return start * 512 + row % 32 * 16 + row % 128 // 32 * 4 + block % 4


def element(codes, scales, row, k, tile):
    blocks = codes.shape[1] // 8
    byte = int(codes[row, k // 2])
    code = byte >> 4 if k % 2 else byte & 15
    scale = scales.flatten()[swizzled(row, k // 16, blocks, tile)]
    value = e2m1.VALUES[code & 7] * (-1) ** (code >> 3)
    return value * float(e4m3.decode(scale.reshape(1)))


def spelled_out(case, m, n):
    """alpha times the sum, from Python floats, which hold it exactly here."""
    total = sum(
        element(case.a, case.a_scales, m, k, 8 if case.use_8x4 else 128)
        * element(case.b_rows, case.b_scales, n, k, 128)
        for k in range(case.a.shape[1] * 2)
    )
    if case.alpha is None:
        return torch.tensor(total).to(case.out_dtype)
    alpha = case.alpha.flatten()[m if case.alpha.numel() > 1 else 0]
    return (torch.tensor(total, dtype=torch.float32) * alpha).to(case.out_dtype)


@pytest.mark.parametrize("alpha", dense_cases.ALPHAS)
@pytest.mark.parametrize("use_8x4", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_element_is_the_formula(alpha, use_8x4, dtype):
    case = dense_cases.coarse(133, 131, 80, alpha=alpha, use_8x4=use_8x4, dtype=dtype)
    got = dense.mm_fp4(**case.arguments)
    for m in (0, 1, 8, 31, 33, 127, 128, 132):
        for n in (0, 7, 32, 97, 128, 130):
            assert_bitwise(got[m, n, None], spelled_out(case, m, n)[None], f"{m}, {n}")


@settings(max_examples=25)
@given(
    m=st.integers(0, 40),
    n=st.integers(1, 40),
    blocks=st.integers(1, 12),
    seed=st.integers(0, 99),
    alpha=st.sampled_from(dense_cases.ALPHAS),
    use_8x4=st.booleans(),
)
def test_exact_sums_have_intervals_of_one_value(m, n, blocks, seed, alpha, use_8x4):
    """No sum rounds: before alpha, and with an alpha that is a power of two."""
    case = dense_cases.coarse(m, n, 16 * blocks, alpha="none", use_8x4=use_8x4, seed=seed)
    case = replace(case, alpha=dense_cases.alpha_of(alpha, max(m, 1), exact=True))
    if m == 0 and alpha == "rows":
        case = replace(case, alpha=torch.ones(0))
    bounds = mm_fp4_bounds(**case.arguments)
    got = dense.mm_fp4(**case.arguments)
    assert got.shape == (m, n)
    assert torch.equal(bounds.low, bounds.high) and torch.equal(bounds.low, got.double())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_any_order_of_fp32_additions_is_inside(dtype):
    case = dense_cases.real(33, 40, 512, dtype=dtype)
    bounds = mm_fp4_bounds(**case.arguments, accumulation=FP32)
    for accumulate in ("fp64", "fp32"):
        got = dense.mm_fp4(**case.arguments, accumulate=accumulate)
        assert_inside(got, bounds, accumulate)
    x, w = dense.operands(case.a, case.b_rows.T, case.a_scales, case.b_scales.T)
    for seed in range(5):
        order = torch.randperm(512, generator=torch.Generator().manual_seed(seed))
        total = (x[:, None, order] * w[None, :, order]).cumsum(-1)[..., -1]
        assert_inside((total * case.alpha[:, None]).to(dtype), bounds, f"order {seed}")


def test_the_interval_is_tight():
    """Seven of eight elements are known to the bit where 512 products of wide range are added."""
    case = dense_cases.real(33, 40, 512)
    bounds = mm_fp4_bounds(**case.arguments, accumulation=FP32)
    open_ones = (bounds.low != bounds.high).double().mean()
    assert 0 < open_ones < 1 / 8


MISTAKES = {
    "nibbles exchanged": lambda c: replace(c, a=(c.a << 4) | (c.a >> 4)),
    "scales of b linear, read as 128x4": lambda c: replace(
        c, b_scales=dense.to_linear(c.b_scales, *c.b_scales.shape, SfLayout.layout_128x4)
    ),
    "8x4 read as 128x4": lambda c: replace(
        c,
        a_scales=dense.to_linear(
            dense_cases.from_linear(c.a_scales, SfLayout.layout_8x4),
            *c.a_scales.shape,
            SfLayout.layout_128x4,
        ),
    ),
    "alpha of the next row": lambda c: replace(c, alpha=c.alpha.roll(1)),
    "alpha of the first row": lambda c: replace(c, alpha=c.alpha[:1]),
    "alpha forgotten": lambda c: replace(c, alpha=None),
    "alpha twice": lambda c: replace(c, alpha=c.alpha**2),
    "alpha in bf16": lambda c: replace(c, alpha=c.alpha.bfloat16().float()),
    "one block scale of b larger": lambda c: replace(
        c, b_scales=c.b_scales + (torch.arange(c.b_scales.numel()) == 5).view(c.b_scales.shape)
    ),
    "the last block left out": lambda c: replace(
        c, a=c.a * (torch.arange(c.a.shape[1]) < c.a.shape[1] - 8)
    ),
    "b's rows shuffled": lambda c: replace(c, b_rows=c.b_rows.roll(1, 0)),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_the_interval_sees(mistake):
    case = dense_cases.real(40, 48, 256)
    bounds = mm_fp4_bounds(**case.arguments)
    got = dense.mm_fp4(**MISTAKES[mistake](case).arguments)
    with pytest.raises(AssertionError, match="outside"):
        assert_inside(got, bounds)


def test_the_interval_sees_a_second_rounding_and_truncation():
    case = dense_cases.real(130, 48, 256)
    bounds = mm_fp4_bounds(**case.arguments)
    total = dense.mm_fp4(**case.arguments | {"alpha": None, "out_dtype": torch.float32})
    assert_inside((total * case.alpha[:, None]).bfloat16(), bounds, "one rounding")
    twice = (total.bfloat16() * case.alpha[:, None]).bfloat16()
    exact = total * case.alpha[:, None]
    cut = (exact.view(torch.int32) & -65536).view(torch.float32).bfloat16()
    for wrong in (twice, cut):
        with pytest.raises(AssertionError, match="outside"):
            assert_inside(wrong, bounds)


def test_rows_of_nan_and_of_tiny_and_infinite_alphas():
    case = dense_cases.real(6, 8, 64)
    scales, alpha = case.a_scales.clone(), case.alpha.clone()
    scales.view(-1)[16] = dense_cases.NAN  # row 1
    alpha[2], alpha[3], alpha[4] = torch.nan, 1e-38, torch.inf
    case = replace(case, a_scales=scales, alpha=alpha)
    bounds = mm_fp4_bounds(**case.arguments)
    assert bounds.nan.all(1).tolist() == [False, True, True, False, False, False]
    assert bounds.low[4].isinf().all() and not bounds.unknown.any()
    got = dense.mm_fp4(**case.arguments)
    flushed = got.masked_fill(got.abs() < 2.0**-126, 0.0)
    assert bounds.contains(got).all() and bounds.contains(flushed).all()
    finite = torch.where(got.isfinite(), torch.nan, 1.0).bfloat16()
    assert not bounds.contains(finite).any()
