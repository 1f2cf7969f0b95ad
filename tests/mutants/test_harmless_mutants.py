"""Reasons why generated mutants are harmless that are not short enough to be read: they are computed."""

# SPDX-License-Identifier: Apache-2.0
import pytest
import torch
from assertions import assert_bitwise

from nvfp4_moe.reference.numerics import e2m1

SHIFT = 2.0**-26
"""The factor of dividends and divisors in `quantize.block._candidate`."""


@pytest.mark.parametrize("divisor", [1536.0, 2688.0])
@pytest.mark.parametrize("shift", [SHIFT, 2.0**26, 2.0**-27, 2.0 * -26])
def test_a_code_times_a_row_is_divided_by_either_reciprocal(divisor, shift):
    """Every significand of `quantize.block._quotients`, and the next larger reciprocal in it."""
    p, codes = _dividends()
    inverse = torch.tensor(1 / (divisor * shift), dtype=torch.float32, device="cpu")
    for factor in (inverse, torch.nextafter(inverse, 2 * inverse)):
        q = (p * shift * factor).to(torch.float32).double()
        got = _quotients(codes, p * shift, divisor * shift, factor, q)
        want = (codes * p[:, None] / divisor).to(torch.float32)
        assert_bitwise(got, want, f"by {factor.item()}")


@pytest.mark.parametrize("divisor", [1536.0, 2688.0])
def test_a_code_times_a_row_is_divided_from_a_first_quotient_near_0(divisor):
    """The first quotient times the divisor, in place of the reciprocal, is 2^-29 of it and less."""
    p, codes = _dividends()
    factor = torch.tensor(1 / (divisor * SHIFT), dtype=torch.float32, device="cpu")
    q = (p * SHIFT / factor).to(torch.float32).double()
    got = _quotients(codes, p * SHIFT, divisor * SHIFT, factor, q)
    assert_bitwise(got, (codes * p[:, None] / divisor).to(torch.float32), "quotients")


def _dividends():
    """Return every significand of a block scale times a row's maximum, and the values of codes."""
    double = torch.float64
    rows = 1 + torch.arange(1024, dtype=double, device="cpu") / 1024  # of fp16, and so of bf16
    scales = torch.arange(8, 16, dtype=double, device="cpu") / 8
    return (rows[:, None] * scales).flatten(), torch.tensor(e2m1.VALUES, dtype=double, device="cpu")


def _quotients(codes, p, divisor, factor, q):
    """Divide as the kernel does, each operation rounded to fp32, from a first quotient q."""
    float32 = torch.float32
    high = ((p - q * divisor).to(float32).double() * factor + q).to(float32).double()
    low = ((p - high * divisor).to(float32) * factor)[:, None]
    return (codes * high[:, None] + (codes * low).to(float32).double()).to(float32)


@pytest.mark.slow
def test_a_polynomial_of_exp_has_one_value_with_either_coefficient():
    """Every r of `fused_quantize.kernel._exp`, up to half of log 2; below 2^-25 the value is 1."""
    one = torch.tensor(1.0, dtype=torch.float32, device="cpu")
    larger = torch.nextafter(one, one + 1).item() / 5040
    ends = torch.tensor([2.0**-25, 0.35], dtype=torch.float32, device="cpu").view(torch.int32)
    for first in range(*ends.tolist(), 2**22):
        bits = torch.arange(first, first + 2**22, dtype=torch.int32, device="cpu")
        r = bits.view(torch.float32)
        for signed in (r, -r):
            assert torch.equal(_polynomial(signed, 1 / 5040), _polynomial(signed, larger))


def _polynomial(r: torch.Tensor, seventh: float) -> torch.Tensor:
    """Evaluate it as the kernel does, each operation rounded to fp32."""
    p = r * seventh + 1 / 720
    for coefficient in (1 / 120, 1 / 24, 1 / 6, 0.5, 1.0, 1.0):
        p = p * r + coefficient
    return p
