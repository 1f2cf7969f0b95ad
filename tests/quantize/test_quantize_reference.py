"""Properties of the reference quantizers, over seeds, kinds of input, shapes and recipes."""

# SPDX-License-Identifier: Apache-2.0
from dataclasses import replace

import pytest
import torch
from assertions import (
    assert_bitwise,
    assert_block_scales_bitwise,
    assert_codes_bitwise,
    assert_per_token_scales_bitwise,
    assert_quantized,
)
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from nvfp4_moe.cases import inputs
from nvfp4_moe.reference.layouts import from_linear
from nvfp4_moe.reference.numerics import e2m1, e4m3
from nvfp4_moe.reference.quantize import (
    Quantized,
    dequantize,
    quantize_global_scale,
    quantize_per_token,
)
from nvfp4_moe.reference.recipe import SfLayout, all_recipes

RECIPES = st.sampled_from(all_recipes())
SEEDS = st.integers(0, 2**32 - 1)
DTYPES = st.sampled_from([torch.bfloat16, torch.float16])
by_recipe = pytest.mark.parametrize("recipe", all_recipes(), ids=str)


def matrices(*kinds: str, dtypes=DTYPES):
    """Inputs of these kinds, of 1 to 6 rows and 1 to 6 blocks, shown by kind, shape and seed."""
    shape = (st.integers(1, 6), st.integers(1, 6).map(lambda blocks: 16 * blocks))
    return st.builds(inputs.synthetic, st.sampled_from(kinds), *shape, dtypes, SEEDS)


def per_token(x, recipe, **options) -> Quantized:
    return quantize_per_token(x, recipe.base_scale_inv, recipe, **options)


@given(matrices("normal", "heavy", "grid", "sparse"), RECIPES, st.integers(-20, 20))
def test_a_power_of_two_moves_into_the_per_token_scale(x, recipe, k):
    if x.dtype == torch.float16:
        k = abs(k) % 8 if x.abs().max() < 256 else 0  # upwards all of fp16 is exact
    scaled = x * 2.0**k
    assume(scaled.isfinite().all() and torch.equal(scaled * 2.0**-k, x))
    before, after = per_token(x, recipe), per_token(scaled, recipe)
    expected = replace(before, per_token_scale=before.per_token_scale * 2.0**k)
    assert_quantized(after, expected, f"2^{k} {recipe}")


@given(matrices("normal", "heavy", "grid", "sparse"), RECIPES, st.integers(-20, 20))
def test_a_power_of_two_moves_into_the_global_scale(x, recipe, k):
    x = x.bfloat16()
    before = quantize_global_scale(x, 700.0, recipe)
    after = quantize_global_scale(x * 2.0**k, 700.0 * 2.0**-k, recipe)
    assert_quantized(after, before, f"2^{k} {recipe}")


@given(matrices(*inputs.KINDS), RECIPES)
def test_scales_do_not_depend_on_signs(x, recipe):
    plus, minus = per_token(x, recipe), per_token(-x, recipe)
    assert_block_scales_bitwise(minus.block_scales, plus.block_scales)
    assert_per_token_scales_bitwise(minus.per_token_scale, plus.per_token_scale)


@given(matrices("normal", "heavy", "grid", "sparse"), RECIPES)
def test_codes_carry_the_sign_of_their_elements(x, recipe):
    """All but 4over6's zero blocks, whose codes are 0 (and the NaN codes of blocks of scale 0)."""
    plus, minus = per_token(x, recipe), per_token(-x, recipe)
    zero = x.unflatten(-1, (-1, 16)).abs().amax(-1) == 0
    assume(torch.equal(plus.block_scales == 0, zero))
    flips = ~zero if recipe.four_over_six else torch.ones_like(zero)
    flips = flips.repeat_interleave(16, -1)
    codes = e2m1.unpack(plus.codes)
    assert_codes_bitwise(minus.codes, e2m1.pack(codes ^ (flips * 8).byte()))
    assert torch.equal((codes >= 8)[flips], torch.signbit(x)[flips])


@st.composite
def on_the_grid(draw):
    """(recipe, exponents [M], codes, block scales): a 6 in every block, the largest scale per row."""
    recipe, dtype = draw(RECIPES), draw(DTYPES)
    m, blocks = draw(st.integers(1, 5)), draw(st.integers(1, 5))
    low, high = (-14, 4) if dtype == torch.float16 else (-40, 40)
    rng = torch.Generator().manual_seed(draw(SEEDS))
    codes = torch.randint(0, 16, (m, blocks, 16), generator=rng).byte()
    six = torch.randint(0, 16, (m, blocks, 1), generator=rng)
    codes.scatter_(-1, six, torch.where(codes.gather(-1, six) < 8, 7, 15).byte())
    largest = e4m3.encode(torch.tensor(float(recipe.e4m3_max))).item()
    scales = torch.randint(1, largest + 1, (m, blocks), generator=rng).byte()
    scales.scatter_(-1, torch.randint(0, blocks, (m, 1), generator=rng), largest)
    exponents = torch.randint(low, high + 1, (m,), generator=rng)
    return recipe, dtype, exponents, e2m1.pack(codes.flatten(-2)), scales


@settings(max_examples=300)
@given(on_the_grid())
def test_quantizing_what_is_on_the_grid_changes_nothing(case):
    """Codes, the code of -0, scales down to the subnormal ones, and the value, all come back."""
    recipe, dtype, exponents, codes, scales = case
    row_scale = torch.exp2(exponents.float())
    x = dequantize(codes, scales, row_scale).to(dtype)
    expected = Quantized(codes, scales, row_scale)
    got = per_token(x, recipe)
    assert_quantized(got, expected, str(recipe))
    by_row = quantize_global_scale(x, 1 / row_scale, recipe)
    assert_quantized(by_row, replace(expected, per_token_scale=None), f"by row, {recipe}")
    again = dequantize(got.codes, got.block_scales, got.per_token_scale)
    assert_bitwise(again.to(dtype), x, "values")


@given(matrices(*inputs.KINDS), RECIPES, SEEDS)
def test_rows_are_independent(x, recipe, seed):
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))
    whole, permuted = per_token(x, recipe), per_token(x[order], recipe)
    expected = Quantized(
        whole.codes[order], whole.block_scales[order], whole.per_token_scale[order]
    )
    assert_quantized(permuted, expected, f"permuted, {recipe}")
    last = Quantized(whole.codes[-1:], whole.block_scales[-1:], whole.per_token_scale[-1:])
    assert_quantized(per_token(x[-1:], recipe), last, f"alone, {recipe}")


@given(matrices(*inputs.KINDS), RECIPES)
def test_per_token_is_global_scale_row_by_row(x, recipe):
    """Not with 4over6 and exact errors: per token these divide by the row's maximum."""
    four = recipe.four_over_six
    assume(four is None or four.err_use_fast_math)
    whole = per_token(x, recipe, keep_steps=True)
    encode = whole.steps["encode_scale"]
    expected = replace(whole, per_token_scale=None)
    assert_quantized(quantize_global_scale(x, encode, recipe), expected, f"rows {recipe}")
    for r, scale in enumerate(encode):
        row = Quantized(whole.codes[r : r + 1], whole.block_scales[r : r + 1])
        got = quantize_global_scale(x[r : r + 1], scale, recipe)
        assert_quantized(got, row, f"row {r}, {recipe}")


@given(matrices(*inputs.KINDS), RECIPES)
def test_steps_are_those_of_the_outputs(x, recipe):
    q = per_token(x, recipe, keep_steps=True)
    m, blocks = q.block_scales.shape
    four = recipe.four_over_six
    last = ("error_of_4", "error_of_6") if four else ("output_scale",)
    assert list(q.steps) == ["row_amax", "encode_scale", "block_amax", "block_scale", *last]
    assert [tuple(s.shape) for s in q.steps.values()] == [(m,)] * 2 + [(m, blocks)] * (
        len(last) + 2
    )
    assert all(s.dtype == torch.float32 for s in q.steps.values())
    unrounded = q.steps["block_scale"]
    if not four:
        assert_block_scales_bitwise(q.block_scales, e4m3.encode(unrounded))
        product = x.float().unflatten(-1, (-1, 16)) * q.steps["output_scale"][..., None]
        normal = (product.abs() >= 2.0**-126).flatten(-2) & (x.float().abs() >= 2.0**-126)
        codes = e2m1.encode(product.flatten(-2))
        assert torch.equal(codes[normal], e2m1.unpack(q.codes)[normal])
    else:
        take4 = q.steps["error_of_4"] < q.steps["error_of_6"]
        chosen = e4m3.encode(torch.where(take4, unrounded * 1.5, unrounded))
        chosen[q.steps["block_amax"] == 0] = 0
        assert_block_scales_bitwise(q.block_scales, chosen)
    assert per_token(x, recipe).steps == {}


@by_recipe
def test_layouts_and_strides_do_not_change_the_values(recipe):
    x = inputs.synthetic("heavy", 9, 80)
    linear, glob = per_token(x, recipe), quantize_global_scale(x, 9.0, recipe)
    strided = x.T.contiguous().T
    assert not strided.is_contiguous()
    for layout in SfLayout:
        for whole, got in (
            (linear, per_token(strided, recipe, layout=layout)),
            (glob, quantize_global_scale(strided, 9.0, recipe, layout)),
        ):
            expected = replace(whole, block_scales=from_linear(whole.block_scales, layout))
            assert_quantized(got, expected, f"{recipe} {layout.name}", layout)
