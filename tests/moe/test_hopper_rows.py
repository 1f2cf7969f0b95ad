"""Rows for sm_90's grouped GEMM: the other kernels' values, in another order and at given places."""

# SPDX-License-Identifier: Apache-2.0
import dense_cases
import pytest
import torch

from nvfp4_moe.kernels.decode import decode, decode_to_fragments
from nvfp4_moe.kernels.moe.hopper.rows import in_fragments
from nvfp4_moe.kernels.quantize.launch import (
    quantize_per_token,
    quantize_to_fragments,
    quantize_to_values,
)
from nvfp4_moe.reference.layouts import from_linear, to_linear
from nvfp4_moe.reference.recipe import NVFP44Over6Config, Recipe, SfLayout

pytestmark = pytest.mark.interpreter

BITS = {"i0": 0, "i1": 1, "b": 2, "j0": 3, "j1": 4, "c0": 5, "c1": 6}
"""The bits of a column's number within 128."""
PLACES = ("b", "c0", "c1", "i0", "i1", "j0", "j1")
"""The column's bit that each bit of its place is, from the lowest."""


def ordered(x: torch.Tensor) -> torch.Tensor:
    """[M, K rounded up to 128] with each column at its place, bit by bit, zeros beyond K."""
    x = torch.nn.functional.pad(x, (0, -x.shape[1] % 128))
    column = torch.arange(x.shape[1])
    place = column // 128 * 128
    for i, name in enumerate(PLACES):
        place = place + ((column >> BITS[name] & 1) << i)
    out = torch.empty_like(x)
    out[:, place] = x
    return out


def natural(fourths: torch.Tensor) -> torch.Tensor:
    """[M, 4, K/4], columns 0, 4, 8 ... first, to [M, K]."""
    return fourths.transpose(1, 2).reshape(fourths.shape[0], -1)


PLACED = torch.tensor([[2, 5], [-1, 0], [3, -1]], dtype=torch.int32)
"""Rows 1 and 4 are nobody's."""


def assert_placed(got: torch.Tensor, want: torch.Tensor, place: torch.Tensor | None) -> None:
    if place is None:
        assert torch.equal(got, want)
        return
    assert got.shape == (place.numel(), want.shape[1])
    for row, slots in enumerate(place.tolist()):
        for slot in slots:
            assert slot < 0 or torch.equal(got[slot], want[row])


def states(columns: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.randn(3, columns, generator=torch.Generator().manual_seed(1)).to(dtype)


@pytest.mark.parametrize("place", [None, PLACED], ids=["own", "placed"])
@pytest.mark.parametrize("columns", [64, 128, 320, 4224])
@pytest.mark.parametrize(
    "recipe", [Recipe(), Recipe("exact", NVFP44Over6Config(256, "MSE"))], ids=str
)
def test_quantized(recipe, columns, place):
    x = states(columns)
    want, scale = quantize_to_values(x, recipe, per_token=True)
    got, token_scale = quantize_to_fragments(x, recipe, per_token=True, place=place)
    assert_placed(token_scale[:, None], scale[:, None], place)
    assert_placed(got, ordered(natural(want)), place)


def test_quantized_with_static_scales():
    x = states(192, torch.float32)
    want, _ = quantize_to_values(x, Recipe(), per_token=False)
    got, token_scale = quantize_to_fragments(x, Recipe(), per_token=False)
    assert token_scale is None
    assert_placed(got, ordered(natural(want)), None)


@pytest.mark.parametrize("place", [None, PLACED], ids=["own", "placed"])
@pytest.mark.parametrize("columns", [128, 1216])
def test_decoded(columns, place):
    codes, scales, token = quantize_per_token(states(columns), 1 / 2688, Recipe())
    want = decode(codes, scales, SfLayout.layout_linear)
    got, token_scale = decode_to_fragments(codes, scales, token, place=place)
    assert_placed(token_scale[:, None], token[:, None], place)
    assert_placed(got, ordered(natural(want)), place)


@pytest.mark.parametrize("rows", [1, 9, 150])
@pytest.mark.parametrize("layout", list(SfLayout), ids=lambda layout: layout.name)
def test_decoded_from_every_layout(layout, rows):
    """With NaN as what pads the scales."""
    case = dense_cases.coarse(rows, 1, 320)
    case = dense_cases.with_poisoned_padding(case)
    linear = to_linear(case.a_scales, rows, 20, SfLayout.layout_128x4)
    scales = (
        linear
        if layout == SfLayout.layout_linear
        else dense_cases.poisoned(from_linear(linear, layout), rows, 20, layout)
    )
    want = decode(case.a, linear, SfLayout.layout_linear)
    got, token_scale = decode_to_fragments(case.a, scales, None, layout)
    assert token_scale is None and torch.equal(got, ordered(natural(want)))


@pytest.mark.parametrize("place", [None, PLACED], ids=["own", "placed"])
@pytest.mark.parametrize("columns", [128, 1344])
def test_as_they_are(columns, place):
    x = states(columns)
    assert_placed(in_fragments(x, place), ordered(x), place)


def test_rows_that_are_not_there_are_neither_read_nor_written():
    """By an index, as of masked input: three functions, the second of three rows left out."""
    index = torch.tensor([0, -1, 2], dtype=torch.int32)
    x = states(256)
    x[1] = torch.nan
    codes, scales, token = quantize_per_token(x, 1 / 2688, Recipe(), row_index=index)
    decoded, _ = decode_to_fragments(codes, scales, token, row_index=index)
    quantized, scale = quantize_to_fragments(x, Recipe(), per_token=True, row_index=index)
    for live in (0, 2):
        assert torch.equal(decoded[live], quantized[live]) and scale[live] == token[live]
        assert torch.equal(in_fragments(x, None, index)[live], ordered(x)[live])
