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
