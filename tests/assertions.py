"""What the tests may ask of quantizers' outputs: the same bytes. Independent of pytest."""

# SPDX-License-Identifier: Apache-2.0
import torch


def assert_bitwise(actual: torch.Tensor, expected: torch.Tensor, what: str) -> None:
    """Same dtype, shape and bits, NaN's included; the message has the first difference."""
    got, want = actual.detach().cpu(), expected.detach().cpu()
    assert got.dtype == want.dtype, f"{what}: dtype {got.dtype}, expected {want.dtype}"
    assert got.shape == want.shape, (
        f"{what}: shape {tuple(got.shape)}, expected {tuple(want.shape)}"
    )
    if got.numel() == 0:
        return
    size = got.element_size()
    a = got.contiguous().view(torch.uint8).reshape(-1, size)
    b = want.contiguous().view(torch.uint8).reshape(-1, size)
    wrong = (a != b).any(-1)
    if not wrong.any():
        return
    first = int(wrong.nonzero()[0])
    index = torch.unravel_index(torch.tensor(first), got.shape)
    place = tuple(int(i) for i in index)
    raise AssertionError(
        f"{what}: {int(wrong.sum())} of {wrong.numel()} differ, first at {place}: "
        f"0x{bytes(a[first].tolist())[::-1].hex()}, expected 0x{bytes(b[first].tolist())[::-1].hex()}"
    )


def assert_quantized(actual: tuple[torch.Tensor, ...], expected, what: str) -> None:
    """(codes, block scales[, per-token scales]) bitwise those of a reference `Quantized`."""
    assert_bitwise(actual[0], expected.codes, f"{what}: codes")
    assert_bitwise(actual[1], expected.block_scales, f"{what}: block scales")
    if expected.per_token_scale is not None:
        assert_bitwise(actual[2], expected.per_token_scale, f"{what}: per-token scales")
