"""Assertions on outputs: the same bytes, or a place in an interval. They are independent of pytest.

Tensors may be on any device. Each message counts what differs and says where the first difference
is, in the terms of its output (row, block, column), with both values in hexadecimal.
"""

# SPDX-License-Identifier: Apache-2.0
from collections.abc import Callable
from typing import Any

import torch

from nvfp4_moe.cases.quantize import Case
from nvfp4_moe.differential.compare import compare
from nvfp4_moe.reference.bounds.interval import Interval
from nvfp4_moe.reference.layouts import to_linear
from nvfp4_moe.reference.numerics import e2m1
from nvfp4_moe.reference.quantize import Quantized
from nvfp4_moe.reference.recipe import BLOCK_SIZE, SfLayout

_LINEAR = SfLayout.layout_linear


def _bytes(t: torch.Tensor) -> torch.Tensor:
    return t.contiguous().reshape(-1).view(torch.uint8)


def _same(actual: torch.Tensor, expected: torch.Tensor) -> bool:
    """Return True for one shape and the same bytes on one device: nothing has to be copied or named."""
    if actual.shape != expected.shape or actual.device != expected.device:
        return False
    return torch.equal(_bytes(actual), _bytes(expected))


def assert_bitwise(
    actual: torch.Tensor,
    expected: torch.Tensor,
    what: str,
    place: Callable[[tuple[int, ...]], str] = str,
) -> None:
    """Same dtype, shape and bits: NaN equals NaN of the same bits, 0 does not equal -0.

    Args:
        place: words for the index of an element.
    """
    got, want = actual.detach(), expected.detach()
    assert got.dtype == want.dtype, f"{what}: dtype {got.dtype}, expected {want.dtype}"
    assert got.shape == want.shape, (
        f"{what}: shape {tuple(got.shape)}, expected {tuple(want.shape)}"
    )
    if got.numel() == 0 or _same(got, want):
        return
    a, b = (_bytes(t).cpu().reshape(-1, t.element_size()) for t in (got, want))
    wrong = (a != b).any(-1)
    if not wrong.any():
        return
    first = int(wrong.nonzero()[0])
    index = tuple(int(i) for i in torch.unravel_index(torch.tensor(first), got.shape))
    values = (f"0x{bytes(t[first].tolist())[::-1].hex()}" for t in (a, b))
    raise AssertionError(
        f"{what}: {int(wrong.sum())} of {wrong.numel()} differ, first at {place(index)}: "
        f"{', expected '.join(values)}"
    )


def assert_codes_bitwise(actual: torch.Tensor, expected: torch.Tensor, what: str = "codes") -> None:
    """Packed codes [M, K/2]: the same, element by element; the difference named is an element."""
    assert_bitwise(actual[:0], expected[:0], what)  # dtype and columns, before unpacking

    def place(index: tuple[int, ...]) -> str:
        row, column = index
        return f"row {row}, block {column // BLOCK_SIZE}, column {column}"

    if _same(actual, expected):
        return
    assert_bitwise(e2m1.unpack(actual), e2m1.unpack(expected), what, place)


def assert_block_scales_bitwise(
    actual: torch.Tensor,
    expected: torch.Tensor,
    layout: SfLayout = _LINEAR,
    what: str = "block scales",
) -> None:
    """Block scales [padded M, padded K/16] in `layout`: the same, padding included."""
    assert_bitwise(actual[:0], expected[:0], what)
    rows, columns = expected.shape
    if _same(actual, expected):
        return
    if layout != _LINEAR and actual.shape == expected.shape:
        actual = to_linear(actual, rows, columns, layout)
        expected = to_linear(expected, rows, columns, layout)
    assert_bitwise(actual, expected, what, lambda index: f"row {index[0]}, block {index[1]}")


def assert_per_token_scales_bitwise(
    actual: torch.Tensor, expected: torch.Tensor, what: str = "per-token scales"
) -> None:
    """Per-token scales [M]: the same bits."""
    assert_bitwise(actual, expected, what, lambda index: f"row {index[0]}")


def assert_quantized(
    actual: tuple[torch.Tensor, ...] | Any,
    expected: Any,
    what: str,
    layout: SfLayout = _LINEAR,
    of: tuple[torch.Tensor, Case] | None = None,
) -> None:
    """(codes, block scales[, per-token scales]), or a `Quantized`, bitwise a reference `Quantized`.

    Args:
        layout: that of both; it decides only how a difference in a block scale is named.
        of: the tensor and the case that were quantized: a difference is told as `nvfp4-moe diff` does.
    """
    if not isinstance(actual, tuple):
        actual = (actual.codes, actual.block_scales, actual.per_token_scale)
    try:
        _assert_quantized(actual, expected, what, layout)
    except AssertionError as error:
        if of is None or actual[0].shape != expected.codes.shape:
            raise
        found = compare(*of, expected, Quantized(*actual[:3]))
        told = f"{found}; {found.where()}" if found else "no bits differ"
        raise AssertionError(f"{error}\n{told}") from None


def _assert_quantized(
    actual: tuple[torch.Tensor, ...], expected: Any, what: str, layout: SfLayout
) -> None:
    assert_codes_bitwise(actual[0], expected.codes, f"{what}: codes")
    assert_block_scales_bitwise(actual[1], expected.block_scales, layout, f"{what}: block scales")
    if expected.per_token_scale is not None:
        scales = f"{what}: per-token scales"
        assert_per_token_scales_bitwise(actual[2], expected.per_token_scale, scales)


def assert_inside(got: torch.Tensor, interval: Interval, what: str = "") -> None:
    """Every element in its interval, and most intervals finite; the first that is not, spelled out."""
    inside = interval.contains(got)
    assert interval.low.isfinite().double().mean() > 0.99, f"{what}: hardly anything is known"
    if inside.all():
        return
    at = tuple((~inside).nonzero()[0].tolist())
    raise AssertionError(
        f"{what}: {int((~inside).sum())} of {got.numel()} outside; first at {at}: {got[at].item():.9g}, "
        f"allowed {interval.low[at].item():.9g} to {interval.high[at].item():.9g}"
    )
