"""Reasons why generated mutants are harmless that are not short enough to be read: they are computed."""

# SPDX-License-Identifier: Apache-2.0
import pytest
import torch
from assertions import assert_bitwise

from nvfp4_moe.reference.numerics.accumulate import fma


@pytest.mark.parametrize("divisor", [1536.0, 2688.0])
def test_a_constant_divides_by_either_reciprocal(divisor):
    """Every significand, by `quantize.block._divide_by_constant`, and by the next larger reciprocal."""
    p = torch.arange(0x3F800000, 0x40000000, dtype=torch.int32, device="cpu").view(torch.float32)
    inverse = torch.tensor(1 / divisor, dtype=torch.float32, device="cpu")
    larger = torch.nextafter(inverse, torch.ones_like(inverse))
    for factor in (inverse, larger):
        q = p * factor
        got = fma(fma(q, torch.full_like(p, -divisor), p), factor.expand_as(p), q)
        assert_bitwise(got, p / divisor, f"by {factor.item()}")


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
