"""Special cases of the contract, each by name, with the bytes that it must give.

Numbers are written out, not computed: bf16 rows of two blocks unless said otherwise. The CUDA build's
are measured (`golden_edge`), the CuTe-DSL build's are from its source.
"""

# SPDX-License-Identifier: Apache-2.0
import math

import pytest
import torch

from nvfp4_moe.reference.numerics import e2m1
from nvfp4_moe.reference.quantize import quantize_global_scale, quantize_per_token
from nvfp4_moe.reference.recipe import SfLayout, all_recipes

SUBNORMAL = 2.0**-130  # in bf16 and in fp32
TINY = 2.0**-120  # a normal number whose row scale is not: TINY / 2688 < 2^-126

EVERY = all_recipes()


def recipes(math=None, build=None, four=None):
    """Parametrize over the recipes of this math and build, with or without 4over6."""
    chosen = [
        r
        for r in EVERY
        if math in (None, r.math)
        and build in (None, r.build)
        and four in (None, r.four_over_six is not None)
    ]
    return pytest.mark.parametrize("recipe", chosen, ids=str)


def row(*blocks) -> torch.Tensor:
    """[1, K] bf16; each block is one number 16 times, or a list of its first ones and the rest 1."""
    x = torch.ones(len(blocks), 16, dtype=torch.bfloat16)
    for place, block in zip(x, blocks, strict=True):
        values = torch.as_tensor(block, dtype=torch.bfloat16)
        place[: values.numel() if values.dim() else 16] = values
    return x.reshape(1, -1)


def quantize(x: torch.Tensor, recipe):
    """(codes of each block, block scales, per-token scale) of one row."""
    q = quantize_per_token(x, recipe.base_scale_inv, recipe)
    codes = e2m1.unpack(q.codes).reshape(-1, 16).tolist()
    return codes, q.block_scales[0].tolist(), q.per_token_scale.item()


def is_positive_zero(x: float) -> bool:
    return x == 0 and math.copysign(1, x) > 0


# Zeros.


@recipes(four=False)
def test_zero_block_keeps_the_sign_of_its_zeros(recipe):
    codes, scales, _ = quantize(row([0.0, -0.0] * 8, 1.0), recipe)
    assert scales == [0, 0x7E]
    assert codes == [[0, 8] * 8, [7] * 16]


@recipes(four=True)
def test_zero_block_has_codes_0_with_4over6(recipe):
    codes, scales, _ = quantize(row([0.0, -0.0] * 8, 1.0), recipe)
    assert (codes[0], scales[0]) == ([0] * 16, 0)


@recipes()
def test_zero_row_has_scale_0(recipe):
    codes, scales, scale = quantize(row(0.0, -0.0), recipe)
    assert scales == [0, 0]
    assert is_positive_zero(scale)
    assert codes == [[0] * 16, [0 if recipe.four_over_six else 8] * 16]


# Subnormal elements (bf16; those of fp16 are normal in fp32).


@recipes(build="cuda")
def test_cuda_block_of_subnormals_is_a_zero_block(recipe):
    codes, scales, _ = quantize(row([SUBNORMAL, -SUBNORMAL] * 8, 1.0), recipe)
    assert scales[0] == 0
    assert codes[0] == ([0] * 16 if recipe.four_over_six else [0, 8] * 8)


@recipes(build="cuda")
def test_cuda_row_of_subnormals_is_a_zero_row(recipe):
    codes, scales, scale = quantize(row(SUBNORMAL, SUBNORMAL), recipe)
    assert (codes, scales) == ([[0] * 16] * 2, [0, 0])
    assert is_positive_zero(scale)


@recipes(build="cute-dsl", math="fast", four=False)
def test_cute_dsl_block_of_subnormals_fast(recipe):
    """Scale 0 gives output scale 0 there."""
    codes, scales, _ = quantize(row([SUBNORMAL, -SUBNORMAL] * 8, 1.0), recipe)
    assert (codes[0], scales[0]) == ([0, 8] * 8, 0)


@recipes(build="cute-dsl", math="exact")
def test_cute_dsl_block_of_subnormals_exact_is_scaled_by_flt_max(recipe):
    """2^-130 * FLT_MAX is just below .25; three times that just below .75, four times below 1."""
    block = [SUBNORMAL, -3 * SUBNORMAL, 4 * SUBNORMAL, 0.0] * 4
    codes, scales, _ = quantize(row(block, 1.0), recipe)
    assert (codes[0], scales[0]) == ([0, 9, 2, 0] * 4, 0)


@recipes(build="cute-dsl", math="fast", four=True)
def test_cute_dsl_block_of_subnormals_runs_4over6(recipe):
    """Not a zero block there: output scale inf, so infinities and, of zeros, NaN."""
    codes, scales, _ = quantize(row([SUBNORMAL, -SUBNORMAL, 0.0, -0.0] * 4, 1.0), recipe)
    assert (codes[0], scales[0]) == ([7, 15, 7, 7] * 4, 0)


# Rows below 2^-126 / g.


@recipes(build="cuda", math="fast")
def test_cuda_tiny_row_fast(recipe):
    """Encode scale 0, output scale NaN."""
    codes, scales, scale = quantize(row([TINY, -TINY, 0.0, TINY / 64] * 4, 0.0), recipe)
    assert is_positive_zero(scale)
    assert scales == [0, 0]
    assert codes == [[7] * 16, [0] * 16]


@recipes(build="cuda", math="exact")
def test_cuda_tiny_row_exact(recipe):
    """Encode and output scale FLT_MAX; 2^-126 * FLT_MAX is just below 4."""
    codes, scales, scale = quantize(row([TINY, -TINY, 0.0, TINY / 64] * 4, 0.0), recipe)
    assert is_positive_zero(scale)
    assert scales[0] > 0 and scales[1] == 0
    assert codes == [[7, 15, 0, 6] * 4, [0] * 16]


@recipes(build="cute-dsl", math="fast")
def test_cute_dsl_tiny_row_fast(recipe):
    """A subnormal scale, encode scale inf; a zero block is inf * 0, unless 4over6 skips it."""
    codes, scales, scale = quantize(row([TINY, -TINY] * 8, 0.0), recipe)
    g = torch.tensor(recipe.base_scale_inv)
    assert scale == (torch.tensor(TINY) * g).item() and 0 < scale < 2.0**-126
    assert scales == [0x7E, 0 if recipe.four_over_six else 0x7F]
    # rcp(448 * rcp(inf)) = rcp(0) = inf
    assert codes[0] == [7, 15] * 8
    assert codes[1] == ([0] * 16 if recipe.four_over_six else [7] * 16)


@recipes(build="cute-dsl", math="exact")
def test_cute_dsl_tiny_row_exact_has_the_smallest_scale(recipe):
    """1 / FLT_MAX, which is 2^-128 after rounding."""
    _, scales, scale = quantize(row([TINY, -TINY] * 8, 0.0), recipe)
    assert scale == 2.0**-128
    assert scales[0] > 0 and scales[1] == 0


# Blocks whose scale rounds to 0 though they are not zero.

SMALL_BLOCK = row([2.0**-20, -(2.0**-20), 0.0, -0.0] * 4, 1.0)


@recipes(build="cuda", math="fast")
def test_cuda_scale_rounds_to_0_fast(recipe):
    """Output scale inf; 0 * inf is NaN."""
    codes, scales, _ = quantize(SMALL_BLOCK, recipe)
    assert (codes[0], scales[0]) == ([7, 15, 7, 7] * 4, 0)


@recipes(build="cute-dsl", math="fast", four=False)
def test_cute_dsl_scale_rounds_to_0_fast(recipe):
    """Output scale 0."""
    codes, scales, _ = quantize(SMALL_BLOCK, recipe)
    assert (codes[0], scales[0]) == ([0, 8, 0, 8] * 4, 0)


@recipes(build="cute-dsl", math="fast", four=True)
def test_cute_dsl_scale_rounds_to_0_with_4over6(recipe):
    """4over6 has no such exception."""
    codes, scales, _ = quantize(SMALL_BLOCK, recipe)
    assert (codes[0], scales[0]) == ([7, 15, 7, 7] * 4, 0)


@recipes(math="exact")
def test_scale_rounds_to_0_exact(recipe):
    """Output scale FLT_MAX."""
    codes, scales, _ = quantize(SMALL_BLOCK, recipe)
    assert (codes[0], scales[0]) == ([7, 15, 0, 8] * 4, 0)


# NaN.


@recipes()
def test_nan_is_ignored_by_the_maxima_and_gets_code_7(recipe):
    clean = quantize(row([3.0, -3.0], 0.5), recipe)
    for nan in (math.nan, -math.nan):
        codes, scales, scale = quantize(row([3.0, -3.0, 1.0, nan], 0.5), recipe)
        assert scale == clean[2]
        if recipe.four_over_six is None:  # with it, a NaN among the errors keeps the scale of 6
            assert scales == clean[1]
            assert codes == [[*clean[0][0][:3], 7, *clean[0][0][4:]], clean[0][1]]
        assert codes[0][3] == 7
        assert (codes[1], scales[1]) == (clean[0][1], clean[1][1])


@recipes()
def test_block_of_nan_has_a_nan_scale(recipe):
    codes, scales, scale = quantize(row(math.nan, 1.0), recipe)
    assert scales == [0x7F, 0x7E if recipe.e4m3_max == 448 else 0x78]
    assert codes == [[7] * 16, [7] * 16]
    assert scale == torch.tensor(recipe.base_scale_inv).item()


@recipes()
def test_row_of_nan_has_scale_0(recipe):
    codes, scales, scale = quantize(row(math.nan, math.nan), recipe)
    assert is_positive_zero(scale)
    assert codes == [[7] * 16] * 2
    assert scales == [0x7F, 0x7F]


# Infinity.

WITH_INF = row([math.inf, -1.0], [1.0, -1.0, 0.0, -0.0] * 4, [0.0, -0.0] * 8)


@recipes(math="fast", build="cuda")
def test_cuda_inf_fast(recipe):
    """Encode scale 0: 0 * inf in the block of the inf; a NaN output scale in all but zero blocks."""
    codes, scales, scale = quantize(WITH_INF, recipe)
    assert scale == math.inf
    assert scales == [0x7F, 0, 0]
    zeros = [0] * 16 if recipe.four_over_six else [0, 8] * 8
    assert codes == [[7] * 16, [7] * 16, zeros]


@recipes(math="fast", build="cute-dsl")
def test_cute_dsl_inf_fast(recipe):
    """Output scale 0 where the scale is 0, but for 4over6."""
    codes, scales, scale = quantize(WITH_INF, recipe)
    assert scale == math.inf
    assert scales == [0x7F, 0, 0]
    if recipe.four_over_six:
        assert codes == [[7] * 16, [7] * 16, [0] * 16]
    else:
        assert codes == [[7] * 16, [0, 8] * 8, [0, 8] * 8]


@recipes(math="exact")
def test_inf_exact(recipe):
    """Encode and per-token scale 1, the block of the inf saturates."""
    codes, scales, scale = quantize(WITH_INF, recipe)
    assert scale == 1.0
    assert scales[0] == 0x7E and scales[2] == 0
    assert codes[0] == [7] + [8] + [0] * 14
    assert codes[1][2:4] == [0, 8]


# Global scale, padding, out_scale.


@recipes(four=False)
def test_a_global_scale_of_0_is_not_caught(recipe):
    """Scales 0, then whatever the build does with them."""
    q = quantize_global_scale(row([1.0, -1.0, 0.0, -0.0] * 4), 0.0, recipe)
    assert q.block_scales.tolist() == [[0]]
    expected = {
        ("fast", "cuda"): [7, 7, 7, 7],  # NaN: rcp(0 * inf)
        ("fast", "cute-dsl"): [0, 8, 0, 8],
        ("exact", "cuda"): [7, 15, 0, 8],  # NaN loses against FLT_MAX
        ("exact", "cute-dsl"): [7, 15, 0, 8],
    }[recipe.math, recipe.build]
    assert e2m1.unpack(q.codes).tolist() == [expected * 4]


@recipes(four=False)
def test_a_negative_global_scale_gives_negative_block_scales(recipe):
    q = quantize_global_scale(row([6.0, -3.0]), -1.0, recipe)
    assert q.block_scales.tolist() == [[0xB8]]
    assert e2m1.unpack(q.codes)[0, :3].tolist() == [7, 13, 2]


@recipes()
def test_padding_is_zero_in_both_builds(recipe):
    x = torch.full(
        (1, 16), math.nan, dtype=torch.bfloat16
    )  # every scale that is not padding is NaN
    for layout, size in ((SfLayout.layout_128x4, 512), (SfLayout.layout_8x4, 32)):
        q = quantize_per_token(x, recipe.base_scale_inv, recipe, layout)
        assert q.block_scales.flatten().tolist() == [0x7F] + [0] * (size - 1)


@recipes(build="cuda", math="fast")
def test_a_row_at_the_edge_of_the_normal_scales(recipe):
    """The least maximum with a normal scale: from there on rows decode to what they were."""
    least = 2.0**-126 * 6 * recipe.e4m3_max
    _, _, below = quantize(row(least / 2, 0.0), recipe)
    codes, scales, scale = quantize(row(least, 0.0), recipe)
    assert is_positive_zero(below)
    assert scale == 2.0**-126
    assert codes[0] == [7] * 16
    assert scales[0] == (0x7E if recipe.e4m3_max == 448 else 0x78)
