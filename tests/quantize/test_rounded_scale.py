"""Blocks whose scale rounds to zero in e4m3, by hand: codes of 6 in FlashInfer 0.7.2, of 0 since 0.7.4.

Under the encode scale 1 a block of maximum V has the scale e4m3(V / 6). Halfway to its least number,
2^-9, it rounds to even, to zero.
"""

# SPDX-License-Identifier: Apache-2.0
import pytest
import torch

from nvfp4_moe.reference.quantize import quantize_global_scale, quantize_per_token
from nvfp4_moe.reference.recipe import NVFP44Over6Config, Recipe

TIE = 6 * 2.0**-10
"""The largest V whose scale rounds to zero."""
ABOVE = TIE * (1 + 2.0**-7)
"""The next bf16."""
BLOCK = [TIE, -TIE, TIE / 2, -TIE / 4, 0.0, -0.0, 2.0**-126, -(2.0**-100), *[TIE / 8, -TIE] * 4]


def of(values, dtype=torch.bfloat16):
    return torch.tensor([values], dtype=dtype)


def codes(q):
    low, high = q.codes & 15, q.codes >> 4
    return torch.stack((low, high), -1).flatten().tolist()


SIXES = [
    7,
    15,
    7,
    15,
    7,
    7,
    7,
    15,
    *[7, 15] * 4,
]  # 0 times infinity is NaN, whose code is that of 6
ZEROS = [0, 8, 0, 8, 0, 8, 0, 8, *[0, 8] * 4]


@pytest.mark.parametrize(
    ("recipe", "want"),
    [
        (Recipe(), SIXES),
        (Recipe(flashinfer="0.7.4"), ZEROS),
        (Recipe(build="cute-dsl"), ZEROS),
        (Recipe(build="cute-dsl", flashinfer="0.7.4"), ZEROS),
    ],
    ids=str,
)
def test_a_block_whose_scale_rounds_to_zero(recipe, want):
    q = quantize_global_scale(of(BLOCK), 1.0, recipe)
    assert q.block_scales.tolist() == [[0]] and codes(q) == want


@pytest.mark.parametrize("recipe", [Recipe(), Recipe(flashinfer="0.7.4")], ids=str)
def test_the_least_scale_and_a_block_of_zeros_are_the_same_in_both(recipe):
    above = quantize_global_scale(of([ABOVE, -ABOVE / 2, 0.0, -0.0] * 4), 1.0, recipe)
    # The scale is 2^-9: V / 2^-9 is 3.02, and half of that 1.51.
    assert above.block_scales.tolist() == [[1]] and codes(above) == [5, 11, 0, 8] * 4
    zero = quantize_global_scale(of([0.0, -0.0] * 8), 1.0, recipe)
    assert zero.block_scales.tolist() == [[0]] and codes(zero) == [0, 8] * 8


def test_the_row_of_a_token_may_hold_both():
    """A = 448, whose encode scale is 6: the second block's V * 6 / 6 is a tie as well."""
    x = of([448.0] * 16 + [2.0**-10, -(2.0**-10)] * 8)
    old, new = (quantize_per_token(x, 1 / 2688, Recipe(flashinfer=v)) for v in ("0.7.2", "0.7.4"))
    assert old.block_scales.tolist() == new.block_scales.tolist() == [[0x7E, 0]]
    assert codes(old) == [7] * 16 + [7, 15] * 8 and codes(new) == [7] * 16 + [0, 8] * 8
    assert torch.equal(old.per_token_scale, new.per_token_scale)


@pytest.mark.parametrize(
    "recipe",
    [Recipe("exact"), Recipe(four_over_six=NVFP44Over6Config()), Recipe("exact", None, "cute-dsl")],
    ids=str,
)
def test_other_recipes_are_those_of_both_versions(recipe):
    later = Recipe(recipe.math, recipe.four_over_six, recipe.build, "0.7.4")
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(64, 64, generator=generator)
    x *= torch.exp2(torch.randint(-30, 4, (64, 4), generator=generator)).repeat_interleave(16, 1)
    for a, b in zip(
        *(
            (q.codes, q.block_scales, q.per_token_scale)
            for q in (quantize_per_token(x.bfloat16(), 1 / 2688, r) for r in (recipe, later))
        ),
        strict=True,
    ):
        assert torch.equal(a, b)


def test_e4m3_and_fp32_input_are_those_of_both_versions():
    bits = torch.arange(256, dtype=torch.int32).to(torch.uint8).view(8, 32)
    old, new = (
        quantize_global_scale(bits.view(torch.float8_e4m3fn), 2.0**-12, Recipe(flashinfer=v))
        for v in ("0.7.2", "0.7.4")
    )
    # Its kernel tests the scale before it is rounded, in both.
    assert torch.equal(old.codes, new.codes) and torch.equal(old.block_scales, new.block_scales)
    x = torch.full((1, 32), 2.0**-20, dtype=torch.float32)
    x[0, 0] = 1.0
    old, new = (quantize_per_token(x, 1 / 2688, Recipe(flashinfer=v)) for v in ("0.7.2", "0.7.4"))
    assert torch.equal(old.codes, new.codes) and torch.equal(old.block_scales, new.block_scales)
