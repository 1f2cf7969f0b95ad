"""Reasons why generated mutants are harmless that are not short enough to be read: they are computed."""

# SPDX-License-Identifier: Apache-2.0
import pytest
import torch
from assertions import assert_bitwise

from nvfp4_moe.reference.numerics import e2m1


@pytest.mark.parametrize("divisor", [1536.0, 2688.0])
def test_a_code_times_a_row_is_divided_by_either_reciprocal(divisor):
    """Every significand of `quantize.block._quotients`, and the next larger reciprocal in it."""
    float32, double = torch.float32, torch.float64
    rows = 1 + torch.arange(1024, dtype=double, device="cpu") / 1024  # of fp16, and so of bf16
    scales = torch.arange(8, 16, dtype=double, device="cpu") / 8
    codes = torch.tensor(e2m1.VALUES, dtype=double, device="cpu")
    p = (rows[:, None] * scales).flatten()
    inverse = torch.tensor(1 / divisor, dtype=float32, device="cpu")
    for factor in (inverse, torch.nextafter(inverse, torch.ones_like(inverse))):
        q = (p * factor).to(float32).double()
        high = ((p - q * divisor).to(float32).double() * factor + q).to(float32).double()
        low = ((p - high * divisor).to(float32) * factor)[:, None]
        got = (codes * high[:, None] + (codes * low).to(float32).double()).to(float32)
        assert_bitwise(got, (codes * p[:, None] / divisor).to(float32), f"by {factor.item()}")


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
