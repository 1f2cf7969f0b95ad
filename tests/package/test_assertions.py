"""The assertions themselves: each sees one changed bit, and says where it is."""

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

from nvfp4_moe.cases import inputs
from nvfp4_moe.cases.quantize import Case
from nvfp4_moe.differential.compare import run_reference
from nvfp4_moe.reference.layouts import from_linear
from nvfp4_moe.reference.quantize import Quantized
from nvfp4_moe.reference.recipe import Recipe, SfLayout

CODES = torch.arange(3 * 16, dtype=torch.uint8).reshape(3, 16)  # 3 rows of 32 elements
SCALES = torch.arange(3 * 2, dtype=torch.uint8).reshape(3, 2)


def changed(t, *index, to):
    copy = t.clone()
    copy[index] = to
    return copy


def test_bits_not_values_are_compared():
    zero, nan = torch.tensor([0.0]), torch.tensor([torch.nan])
    assert_bitwise(nan, nan.clone(), "nan")
    with pytest.raises(AssertionError, match=r"zero: 1 of 1 differ.*0x80000000, expected 0x0000"):
        assert_bitwise(-zero, zero, "zero")
    other_nan = torch.tensor([0x7FFFFFFF], dtype=torch.int32).view(torch.float32)
    with pytest.raises(AssertionError, match="0x7fffffff, expected 0x7fc00000"):
        assert_bitwise(other_nan, nan, "nan")


def test_dtype_and_shape_are_compared():
    for check in (assert_bitwise, assert_codes_bitwise):
        with pytest.raises(AssertionError, match=r"x: dtype torch.int8, expected torch.uint8"):
            check(CODES.to(torch.int8), CODES, "x")
        with pytest.raises(AssertionError, match=r"x: shape"):
            check(CODES[:, :8], CODES, "x")
    with pytest.raises(AssertionError, match=r"codes: shape \(2, 32\), expected \(3, 32\)"):
        assert_codes_bitwise(CODES[:2], CODES)
    with pytest.raises(AssertionError, match=r"scales: shape"):
        assert_block_scales_bitwise(SCALES[:2], SCALES, SfLayout.layout_128x4)
    assert_bitwise(CODES[:0], CODES[:0], "empty")


def test_a_code_is_named_by_its_element():
    wrong = changed(CODES, 2, 10, to=CODES[2, 10] ^ 0x10)  # the odd element of the pair
    with pytest.raises(AssertionError, match=r"1 of 96 differ, first at row 2, block 1, column 21"):
        assert_codes_bitwise(wrong, CODES)
    wrong = changed(CODES, 1, 0, to=CODES[1, 0] ^ 0x01)
    with pytest.raises(AssertionError, match=r"row 1, block 0, column 0: 0x01, expected 0x00"):
        assert_codes_bitwise(wrong, CODES)


@pytest.mark.parametrize("layout", list(SfLayout), ids=lambda layout: layout.name)
def test_a_block_scale_is_named_by_its_block(layout):
    wrong = from_linear(changed(SCALES, 2, 1, to=9), layout)
    with pytest.raises(AssertionError, match=r"first at row 2, block 1: 0x09, expected 0x05"):
        assert_block_scales_bitwise(wrong, from_linear(SCALES, layout), layout)


def test_padding_is_compared():
    scales = from_linear(SCALES, SfLayout.layout_8x4)
    with pytest.raises(AssertionError, match=r"1 of 32 differ, first at row 7, block 3"):
        wrong = changed(scales, -1, -1, to=1)
        assert_block_scales_bitwise(wrong, scales, SfLayout.layout_8x4)


def test_a_per_token_scale_is_named_by_its_row():
    scales = torch.ones(4)
    with pytest.raises(AssertionError, match=r"row 3: 0x40000000, expected 0x3f800000"):
        assert_per_token_scales_bitwise(changed(scales, 3, to=2.0), scales)


def test_each_output_of_a_quantizer_counts():
    right = Quantized(CODES, SCALES, torch.ones(3))
    parts = (right.codes, right.block_scales, right.per_token_scale)
    assert_quantized(right, right, "x")
    assert_quantized(parts, right, "x")
    for i, name in enumerate(("codes", "block scales", "per-token scales")):
        wrong = list(parts)
        wrong[i] = changed(wrong[i], 0, to=7)
        with pytest.raises(AssertionError, match=f"x: {name}: "):
            assert_quantized(tuple(wrong), right, "x")


def test_a_difference_is_told_as_diff_tells_it():
    x = inputs.synthetic("normal", 5, 48)
    case = Case("per-token", Recipe(), SfLayout.layout_linear)
    right = run_reference(x, case)
    wrong = replace(right, codes=changed(right.codes, 2, 11, to=right.codes[2, 11] ^ 1))
    with pytest.raises(AssertionError) as told:
        assert_quantized(wrong, right, "x", of=(x, case))
    assert "first at row 2, block 1, in the step: e2m1 code" in str(told.value)
    assert f"inputs {x[2, 16].view(torch.int16).item() & 0xFFFF:04x}" in str(told.value)
    with pytest.raises(AssertionError, match="x: codes: shape"):
        assert_quantized(replace(right, codes=right.codes[:3]), right, "x", of=(x, case))
