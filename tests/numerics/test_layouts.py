"""The block-scale layouts against their offset formulas, an index at a time."""

# SPDX-License-Identifier: Apache-2.0
import pytest
import torch
from assertions import assert_bitwise
from hypothesis import given, settings
from hypothesis import strategies as st

from nvfp4_moe.reference.layouts import convert, from_linear, padded_shape, to_linear
from nvfp4_moe.reference.recipe import SfLayout

LAYOUTS = st.sampled_from(list(SfLayout))
SHAPES = st.tuples(st.integers(0, 300), st.integers(0, 20))
by_layout = pytest.mark.parametrize("layout", list(SfLayout), ids=lambda layout: layout.name)


def offset(r: int, c: int, columns: int, layout: SfLayout) -> int:
    """Return the place of scale (r, c) of [R, columns] in the flat buffer."""
    c4 = -(-columns // 4) * 4
    if layout == SfLayout.layout_128x4:
        tile = (r // 128) * (c4 // 4) + c // 4
        return tile * 512 + (r % 32) * 16 + ((r % 128) // 32) * 4 + c % 4
    if layout == SfLayout.layout_8x4:
        tile = (r // 8) * (c4 // 4) + c // 4
        return tile * 32 + (r % 8) * 4 + c % 4
    return r * columns + c


def distinct(*shape: int) -> torch.Tensor:
    """A tensor of numbers that are all different, none 0."""
    return torch.arange(1, torch.Size(shape).numel() + 1).reshape(shape)


@by_layout
@pytest.mark.parametrize(
    ("rows", "columns"), [(1, 1), (8, 4), (9, 3), (129, 17), (128, 4), (256, 9), (300, 1)]
)
def test_every_scale_lies_where_the_formula_says_and_the_rest_is_zero(rows, columns, layout):
    scales = distinct(rows, columns)
    got = from_linear(scales, layout)
    expected = torch.zeros(padded_shape(rows, columns, layout), dtype=scales.dtype)
    for r in range(rows):
        for c in range(columns):
            expected.view(-1)[offset(r, c, columns, layout)] = scales[r, c]
    assert_bitwise(got, expected, layout.name)


@given(SHAPES, LAYOUTS)
def test_padded_shape_is_the_least_multiple(shape, layout):
    tiles = {"layout_128x4": (128, 4), "layout_8x4": (8, 4), "layout_linear": (1, 1)}[layout.name]
    padded = padded_shape(*shape, layout)
    for size, tile, whole in zip(shape, tiles, padded, strict=True):
        assert whole % tile == 0
        assert size <= whole < size + tile


@settings(max_examples=150)
@given(SHAPES, LAYOUTS, LAYOUTS)
def test_round_trips(shape, source, target):
    scales = distinct(*shape)
    there = from_linear(scales, source)
    assert_bitwise(to_linear(there, *shape, source), scales, "to_linear")
    converted = convert(there, *shape, source, target)
    assert_bitwise(converted, from_linear(scales, target), "convert")
    assert_bitwise(convert(converted, *shape, target, source), there, "and back")


@by_layout
def test_what_lies_in_the_padding_is_ignored_and_not_passed_on(layout):
    shape = (9, 5)
    scales = distinct(*shape)
    buffer = from_linear(scales, layout)
    poisoned = torch.where(buffer == 0, -1, buffer)
    assert_bitwise(to_linear(poisoned, *shape, layout), scales, "to_linear")
    for target in SfLayout:
        got = convert(poisoned, *shape, layout, target)
        assert_bitwise(got, from_linear(scales, target), "convert")


@by_layout
@pytest.mark.parametrize("batch", [(3,), (2, 3), (0,)], ids=str)
def test_leading_dimensions_are_matrices_apart(batch, layout):
    rows, columns = 10, 6
    scales = distinct(*batch, rows, columns)
    got = from_linear(scales, layout)
    assert got.shape == (*batch, *padded_shape(rows, columns, layout))
    flat = scales.reshape(-1, rows, columns)
    for matrix, part in zip(flat, got.reshape(len(flat), *got.shape[-2:]), strict=True):
        assert_bitwise(part, from_linear(matrix, layout), "matrix")
    assert_bitwise(to_linear(got, rows, columns, layout), scales, "back")


@by_layout
def test_any_dtype_and_a_flat_buffer(layout):
    scales = distinct(9, 5)
    for dtype in (torch.uint8, torch.float8_e4m3fn, torch.float32, torch.int32):
        typed = scales.to(dtype)
        buffer = from_linear(typed, layout)
        assert_bitwise(to_linear(buffer, 9, 5, layout), typed, str(dtype))
        assert_bitwise(to_linear(buffer.flatten(), 9, 5, layout), typed, f"flat {dtype}")


@by_layout
def test_strided_input(layout):
    scales = distinct(6, 20).T[::2]  # [10, 6], neither dimension contiguous
    assert_bitwise(from_linear(scales, layout), from_linear(scales.contiguous(), layout), "from")
    wide = from_linear(scales, layout).T.contiguous().T
    assert_bitwise(to_linear(wide, 10, 6, layout), scales.contiguous(), "to")


@by_layout
def test_a_buffer_of_the_wrong_size_is_refused(layout):
    rows, columns = padded_shape(9, 5, layout)
    for shape in ((rows + 1, columns), (rows - 1, columns), (rows * columns - 1,)):
        with pytest.raises(ValueError, match=rf"do not hold \[9, 5\] in {layout.name}, which"):
            to_linear(torch.zeros(shape), 9, 5, layout)
