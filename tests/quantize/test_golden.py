"""The reference against outputs of FlashInfer's own CUDA kernels: every array, every bit."""

# SPDX-License-Identifier: Apache-2.0
import pytest
from assertions import assert_bitwise
from golden_cases import OUTPUTS, RECIPES, SMALL_OUTPUTS, cases, small

from nvfp4_moe.reference import layouts, quantize


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


def test_tests_by_recipe_take_every_array():
    """As the Triton kernels' tests do, which are one for each recipe."""
    for edge in (False, True):
        found = [case for recipe in RECIPES for case in cases(edge) if case.recipe == recipe]
        assert sum(len(case.expected) for case in found) == OUTPUTS[edge]
    assert sum(len(case.expected) for case in cases(False) if small(case)) == SMALL_OUTPUTS
