"""e4m3: every byte, and every rounding boundary with its fp32 neighbours."""

# SPDX-License-Identifier: Apache-2.0
import math

import pytest
import torch
from assertions import assert_bitwise
from torch.overrides import TorchFunctionMode

from nvfp4_moe.reference.numerics import e4m3

INF = torch.tensor(torch.inf)


def value_of(byte: int) -> float:
    """A sign bit, four exponent bits of bias 7, three significand bits; no infinity, NaN at 0x7f."""
    sign = -1.0 if byte & 0x80 else 1.0
    exponent, significand = byte >> 3 & 15, byte & 7
    if byte & 0x7F == 0x7F:
        return math.nan
    if exponent == 0:
        return sign * significand * 2.0**-9
    return sign * (8 + significand) * 2.0 ** (exponent - 10)


MAGNITUDES = torch.tensor([value_of(byte) for byte in range(0x7F)])
BYTES = torch.arange(0x7F, dtype=torch.uint8)


def encode(*values: float) -> list[int]:
    return e4m3.encode(torch.tensor(values)).tolist()


def test_decode_every_byte():
    expected = torch.tensor([value_of(byte) for byte in range(256)])
    got = e4m3.decode(torch.arange(256, dtype=torch.uint8))
    numbers = ~expected.isnan()
    assert_bitwise(got[numbers], expected[numbers], "values")
    assert got.isnan().nonzero().flatten().tolist() == [0x7F, 0xFF]


def test_encode_is_the_inverse_of_decode():
    for sign in (0, 0x80):
        assert_bitwise(e4m3.encode(e4m3.decode(BYTES | sign)), BYTES | sign, "bytes")


@pytest.mark.parametrize("sign", [0, 0x80], ids=["plus", "minus"])
def test_encode_rounds_to_nearest_between_every_two_neighbours(sign):
    """Subnormals and the first step above 0 included; a tie takes the even byte."""
    factor = -1.0 if sign else 1.0
    low, high = BYTES[:-1], BYTES[1:]
    ties = (MAGNITUDES[:-1] + MAGNITUDES[1:]) / 2  # exact: at most 5 bits
    even = torch.where(low % 2 == 0, low, high)
    for x, expected in (
        (ties, even),
        (ties.nextafter(INF), high),
        (ties.nextafter(-INF), low),
        (MAGNITUDES[1:].nextafter(-INF), high),
        (MAGNITUDES[:-1].nextafter(INF), low),
    ):
        assert_bitwise(e4m3.encode(factor * x), expected | sign, "bytes")


def test_encode_saturates():
    """464 is where the next value, 480, would begin; it and all beyond give 448."""
    below, above = (torch.tensor(464.0).nextafter(side).item() for side in (-INF, INF))
    beyond = (448.0, below, 464.0, above, 480.0, 1e30, math.inf)
    assert encode(*beyond) == [0x7E] * len(beyond)
    assert encode(*(-x for x in beyond)) == [0xFE] * len(beyond)


def test_encode_small_values():
    assert encode(0.0, -0.0, 2.0**-10, -(2.0**-10), 1e-45) == [0, 0x80, 0, 0x80, 0]
    assert encode(1.5 * 2**-10, 3 * 2.0**-10) == [1, 2]


def test_encode_nan():
    assert encode(math.nan) == [0x7F]
    negative = torch.tensor([-1], dtype=torch.int32).view(torch.float32)
    assert e4m3.encode(negative).tolist() == [0x7F]


class _CastOfTorchBefore212(TorchFunctionMode):
    """torch's e4m3 cast as it was: NaN, not 448, beyond 464."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if func is torch.Tensor.to and torch.float8_e4m3fn in args:
            overflow = args[0].abs() > 464
            return torch.where(overflow, 0x7F, result.view(torch.uint8)).view(result.dtype)
        return result


def test_encode_does_not_depend_on_the_version_of_torchs_cast():
    x = torch.tensor([1.0, 448.0, 464.0, 465.0, 1e30, torch.inf, -1e30, -torch.inf])
    expected = e4m3.encode(x)
    with _CastOfTorchBefore212():
        assert torch.tensor([465.0]).to(torch.float8_e4m3fn).isnan().all()
        assert_bitwise(e4m3.encode(x), expected, "bytes")
