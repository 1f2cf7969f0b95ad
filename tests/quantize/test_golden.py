"""The reference against outputs of FlashInfer's own CUDA kernels: every array, every bit."""

# SPDX-License-Identifier: Apache-2.0
import pytest
from assertions import assert_bitwise
from golden_cases import OUTPUTS, RECIPES, SMALL_OUTPUTS, cases, small

from nvfp4_moe.reference import layouts, quantize
from nvfp4_moe.reference.recipe import Recipe

DIFFERENT_IN_0_7_4 = (23, 3639)
"""Arrays that hold such blocks, and those blocks."""


@pytest.mark.parametrize("edge", [False, True], ids=["golden", "golden-edge"])
def test_reference_equals_every_golden_array(edge):
    compared = 0
    for case in cases(edge):
        if case.global_scale is None:
            q = quantize.quantize_per_token(case.x, case.recipe.base_scale_inv, case.recipe)
        else:
            q = quantize.quantize_global_scale(case.x, case.global_scale, case.recipe)
        actual = {"q": q.codes, "scale": q.per_token_scale}
        for name, layout in case.layouts:
            actual[name] = layouts.from_linear(q.block_scales, layout)
        for name, expected in case.expected.items():
            assert_bitwise(actual[name], expected, f"{case.name}/{name}")
            compared += 1
    assert compared == OUTPUTS[edge]


def test_golden_arrays_are_of_0_7_2():
    """As 0.7.4 quantizes, codes differ in some blocks whose scale is zero, and nothing else does."""
    different = blocks = 0
    for case in (*cases(False), *cases(True)):
        if case.recipe != Recipe():
            assert case.recipe.earliest == case.recipe
            continue
        later = Recipe(flashinfer="0.7.4")
        if case.global_scale is None:
            q = quantize.quantize_per_token(case.x, later.base_scale_inv, later)
            assert_bitwise(q.per_token_scale, case.expected["scale"], case.name)
        else:
            q = quantize.quantize_global_scale(case.x, case.global_scale, later)
        wrong = (q.codes != case.expected["q"]).unflatten(1, (-1, 8)).any(-1)
        assert (q.block_scales[wrong] == 0).all(), case.name
        different, blocks = different + bool(wrong.any()), blocks + int(wrong.sum())
    assert (different, blocks) == DIFFERENT_IN_0_7_4


def test_tests_by_recipe_take_every_array():
    """As the Triton kernels' tests do, which are one for each recipe."""
    for edge in (False, True):
        found = [case for recipe in RECIPES for case in cases(edge) if case.recipe == recipe]
        assert sum(len(case.expected) for case in found) == OUTPUTS[edge]
    assert sum(len(case.expected) for case in cases(False) if small(case)) == SMALL_OUTPUTS
