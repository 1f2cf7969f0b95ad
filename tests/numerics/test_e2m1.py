"""e2m1: every 16-bit input, and every rounding boundary with its fp32 neighbours."""

# SPDX-License-Identifier: Apache-2.0
import math
from fractions import Fraction
from itertools import pairwise

import pytest
import torch
from assertions import assert_bitwise

from nvfp4_moe.reference.numerics import e2m1


def value_of(code: int) -> Fraction:
    """A sign bit, two exponent bits of bias 1, one significand bit; exponent 0 is subnormal."""
    exponent, significand = code >> 1 & 3, code & 1
    magnitude = Fraction(2 + significand) / 2 * 2 ** (exponent - 1)
    if exponent == 0:
        magnitude = Fraction(significand) / 2
    return -magnitude if code & 8 else magnitude


def nearest_code(x: float) -> int:
    """The rule in exact arithmetic: nearest value, ties to the even code, the sign of zero kept."""
    if math.isnan(x):
        return 7
    sign = 8 if math.copysign(1, x) < 0 else 0
    if math.isinf(x):
        return sign | 7
    exact = abs(Fraction(x))
    return sign | min(range(8), key=lambda code: (abs(exact - value_of(code)), code & 1))


def assert_nearest(x: torch.Tensor) -> None:
    expected = torch.tensor([nearest_code(v) for v in x.tolist()], dtype=torch.uint8)
    got = e2m1.encode(x)
    wrong = (got != expected).nonzero()
    assert not len(wrong), f"{x[wrong[0]].item()!r}: {got[wrong[0]]}, expected {expected[wrong[0]]}"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_encode_rounds_every_16_bit_pattern_to_nearest(dtype):
    assert_nearest(torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype).float())


def test_encode_decides_at_the_midpoints_and_nowhere_else():
    values = [float(value_of(code)) for code in range(8)]
    midpoints = torch.tensor([(a + b) / 2 for a, b in pairwise(values)])
    up = midpoints.nextafter(torch.tensor(torch.inf))
    down = midpoints.nextafter(torch.tensor(-torch.inf))
    for sign in (1, -1):
        assert_nearest(sign * torch.cat((midpoints, up, down)))
    assert e2m1.encode(midpoints).tolist() == [0, 2, 2, 4, 4, 6, 6]
    assert e2m1.encode(up).tolist() == [1, 2, 3, 4, 5, 6, 7]
    assert e2m1.encode(down).tolist() == [0, 1, 2, 3, 4, 5, 6]


def test_encode_special_values():
    smallest, nan, negative_nan = torch.tensor([1, 2**31 - 1, -1]).int().view(torch.float32)
    for x, code in (
        (0.0, 0),
        (-0.0, 8),
        (smallest, 0),
        (-smallest, 8),
        (-0.1, 8),
        (6.5, 7),
        (-1e38, 15),
        (math.inf, 7),
        (-math.inf, 15),
        (nan, 7),
        (negative_nan, 7),
    ):
        assert e2m1.encode(torch.tensor([float(x)])).item() == code, float(x)
    assert e2m1.encode(negative_nan).item() == 7  # as a float, its sign may be lost


def test_decode_every_code_and_back():
    codes = torch.arange(16, dtype=torch.uint8)
    expected = torch.tensor([float(value_of(code)) for code in range(16)])
    expected[8] = -0.0
    assert_bitwise(e2m1.decode(codes), expected, "values")
    assert_bitwise(e2m1.encode(e2m1.decode(codes)), codes, "codes")
    assert (*expected[:8].tolist(),) == e2m1.VALUES
    assert e2m1.MAX == 6


def test_pack_puts_the_even_column_in_the_low_nibble():
    codes = torch.arange(16, dtype=torch.uint8).reshape(2, 2, 4)
    packed = e2m1.pack(codes)
    assert packed.tolist() == [[[0x10, 0x32], [0x54, 0x76]], [[0x98, 0xBA], [0xDC, 0xFE]]]
    assert_bitwise(e2m1.unpack(packed), codes, "codes")


def test_unpack_is_the_inverse_of_pack_on_every_byte():
    packed = torch.arange(256, dtype=torch.uint8).reshape(8, 32)
    codes = e2m1.unpack(packed)
    assert codes.shape == (8, 64) and codes.max() == 15
    assert_bitwise(e2m1.pack(codes), packed, "bytes")
