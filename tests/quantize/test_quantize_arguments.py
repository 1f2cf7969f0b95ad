"""Arguments of the reference quantizers besides the matrix: row indices, scales, layouts, dtypes."""

# SPDX-License-Identifier: Apache-2.0
from dataclasses import replace

import pytest
import torch
from assertions import assert_bitwise, assert_quantized

from nvfp4_moe.cases import inputs
from nvfp4_moe.reference.layouts import from_linear
from nvfp4_moe.reference.numerics import e2m1, e4m3
from nvfp4_moe.reference.quantize import (
    Quantized,
    dequantize,
    quantize_global_scale,
    quantize_per_token,
)
from nvfp4_moe.reference.recipe import NVFP44Over6Config, Recipe, SfLayout, all_recipes

by_recipe = pytest.mark.parametrize("recipe", all_recipes(), ids=str)


def per_token(x, recipe, **options) -> Quantized:
    return quantize_per_token(x, recipe.base_scale_inv, recipe, **options)


@pytest.mark.parametrize("layout", list(SfLayout), ids=lambda layout: layout.name)
@pytest.mark.parametrize("index", [[2, 0], [-1, 3, -7, 5, 3, 1], [], [0, 1, 2, 3, 4]], ids=str)
def test_row_index_quantizes_the_rows_it_names_in_place(index, layout):
    """Out of range: skipped. Named twice: once. Not named: zero. Entries beyond M: not read."""
    x = inputs.synthetic("heavy", 5, 48)
    index = [*index, *[-1] * (5 - len(index)), 0, 4]
    whole = per_token(x, Recipe(), keep_steps=True)
    got = per_token(
        x,
        Recipe(),
        layout=layout,
        row_index=torch.tensor(index, dtype=torch.int32),
        keep_steps=True,
    )
    named = torch.tensor([r in index[:5] for r in range(5)])
    scales = whole.block_scales * named[:, None]
    expected = Quantized(
        whole.codes * named[:, None], from_linear(scales, layout), whole.per_token_scale * named
    )
    assert_quantized(got, expected, str(index), layout)
    for name, step in whole.steps.items():
        assert_bitwise(got.steps[name][named], step[named], name)


@by_recipe
def test_out_scale_multiplies_the_returned_scale_alone(recipe):
    x = inputs.synthetic("edge", 40, 32)
    plain = per_token(x, recipe)
    got = per_token(x, recipe, out_scale=torch.tensor([0.37]))
    scaled = plain.per_token_scale * 0.37
    tiny = (scaled.abs() < 2.0**-126) & (recipe.build == "cuda")  # flushed there
    expected = replace(plain, per_token_scale=scaled.masked_fill(tiny, 0.0))
    assert_quantized(got, expected, str(recipe))


@by_recipe
def test_forms_of_a_scale_mean_the_same(recipe):
    x = inputs.synthetic("edge", 20, 32)
    g = recipe.base_scale_inv
    for form in (torch.tensor(g), torch.tensor([g]), torch.tensor([[g]])):
        assert_quantized(quantize_per_token(x, form, recipe), per_token(x, recipe), "base scale")
    one = quantize_global_scale(x, 7.5, recipe)
    for form in (torch.tensor(7.5), torch.tensor([7.5]), torch.full((len(x),), 7.5)):
        assert_quantized(quantize_global_scale(x, form, recipe), one, "global scale")
    none = quantize_global_scale(x, None, recipe)
    assert_quantized(quantize_global_scale(x, 1.0, recipe), none, "no scale")
    inverse = quantize_global_scale(x, 0.25, recipe, inverse=True)
    assert_quantized(quantize_global_scale(x, 4.0, recipe), inverse, "inverse")


def test_inverse_is_an_approximation_in_fast_math():
    """rcp.approx(33) is one ulp from 1/33 rounded."""
    x = inputs.synthetic("normal", 1, 64)
    nearest = 1 / torch.tensor([33.0])
    for recipe in (Recipe(), Recipe(build="cute-dsl"), Recipe("exact")):
        q = quantize_global_scale(x, 33.0, recipe, inverse=True, keep_steps=True)
        assert torch.equal(q.steps["encode_scale"], nearest) == (recipe.math == "exact")
        assert torch.allclose(q.steps["encode_scale"], nearest, rtol=2**-22, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@by_recipe
def test_no_rows(recipe, dtype):
    x = torch.zeros(0, 64, dtype=dtype)
    none = torch.zeros(0, dtype=torch.int32)
    for layout in SfLayout:
        for got in (
            per_token(x, recipe, layout=layout),
            per_token(x, recipe, layout=layout, row_index=none),
            quantize_global_scale(x, 1.0, recipe, layout),
            quantize_global_scale(x, torch.zeros(0), recipe, layout),
        ):
            assert got.codes.shape == (0, 32) and got.codes.dtype == torch.uint8
            assert got.block_scales.shape == (0, 4) and got.block_scales.dtype == torch.uint8
            if got.per_token_scale is not None:
                assert got.per_token_scale.shape == (0,)


@pytest.mark.parametrize(
    "recipe",
    [Recipe("exact"), Recipe(four_over_six=NVFP44Over6Config()), Recipe(build="cute-dsl")],
    ids=str,
)
def test_fp32_input_has_one_recipe(recipe):
    with pytest.raises(ValueError, match=rf"x is fp32; its recipe must be fast.*: {recipe}"):
        per_token(torch.ones(1, 16), recipe)


def test_e4m3_input_has_no_4over6():
    x = torch.ones(1, 16).to(torch.float8_e4m3fn)
    with pytest.raises(ValueError, match="x is float8_e4m3fn; 4over6 needs fp16 or bf16"):
        quantize_global_scale(x, 1.0, Recipe(four_over_six=NVFP44Over6Config()))


@pytest.mark.parametrize("layout", list(SfLayout), ids=lambda layout: layout.name)
def test_dequantize_multiplies_code_block_scale_and_scale(layout):
    """Every code with every scale; the product of the first two is exact."""
    codes = torch.arange(16, dtype=torch.uint8).repeat(127, 1)
    scales = torch.arange(127, dtype=torch.uint8)[:, None]
    row = torch.linspace(0.1, 3.0, 127)
    packed = e2m1.pack(codes)
    got = dequantize(packed, from_linear(scales, layout), row, layout)
    exact = e2m1.decode(codes).double() * e4m3.decode(scales).double()
    assert_bitwise(got, exact.float() * row[:, None], "values")
    assert torch.equal(exact, exact.float().double())
    assert torch.equal(exact, exact.bfloat16().double()) and torch.equal(
        exact, exact.half().double()
    )
    one = dequantize(packed, from_linear(scales, layout), 3.0, layout)
    assert_bitwise(one, exact.float() * 3.0, "one scale")


def test_dequantize_is_flashinfers(flashinfer):
    from flashinfer.quantization.fp4_quantization import _e2m1_and_ufp8sf_scale_to_float_cpu

    rng = torch.Generator().manual_seed(8)
    codes = torch.randint(0, 256, (9, 40), generator=rng).byte()
    scales = torch.randint(0, 127, (9, 5), generator=rng).byte()
    scale = torch.tensor([0.0123])
    expected = _e2m1_and_ufp8sf_scale_to_float_cpu(codes, scales, scale, 16, 1, False)
    assert torch.equal(dequantize(codes, scales, scale), expected)  # there -0 is 0
