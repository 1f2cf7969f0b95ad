"""Products, quotients and fused sums next to 2^-126, where a GPU rounds before it flushes."""

# SPDX-License-Identifier: Apache-2.0
import pytest
import torch
from assertions import assert_bitwise
from mutants.generated.jit_calls import of_two_kernel

from nvfp4_moe.kernels.triton_target import arch
from nvfp4_moe.reference.numerics.accumulate import fma
from nvfp4_moe.reference.numerics.fp32 import Arithmetic

LEAST = 2.0**-126
# (a, b, a product that a GPU takes for zero). All but the last round to 2^-126 by IEEE 754.
PRODUCTS = [
    (LEAST, 1 - 2.0**-24, True),  # 24 bits of a smaller exponent
    (2.0**-60 * (1 + 3 * 2.0**-14), 2.0**-66 * (1 - 3 * 2.0**-14), True),  # rounds to those
    (2.0**-60 * (1 + 2.0**-13), 2.0**-66 * (1 - 2.0**-13), False),  # rounds to 2^-126
    (2.0**-60 * 31 / 32, 2.0**-86 * 1082401, False),  # 1 - 2^-25: a tie
    (LEAST, 1.0, False),
    (LEAST, 1 - 2.0**-23, True),
]
QUOTIENTS = [(1 - 2.0**-24, 2.0**126, True), (1.0, 2.0**126, False), (1.5, 2.0**127, True)]
SUMS = [  # (a, b, c): 2^-126 (1 - (64 - k) 2^-29), of numbers that are not subnormal
    (
        2.0**-59 * (1 + 2.0**-7),
        2.0**-66 * (1 + k * 2.0**-23),
        -(2.0**-126) * (1 + 2.0**-6 + k * 2.0**-22 + 2.0**-23),
        zero,
    )
    for k, zero in ((32, True), (40, True), (56, False), (64, False))
]


def columns(rows):
    """The operands of rows as tensors, both signs of the first; which results are zeros."""
    *operands, zero = zip(*rows, strict=True)
    first, *rest = (torch.tensor(o, dtype=torch.float32).repeat(2) for o in operands)
    first[len(rows) :] *= -1
    return [first, *rest], torch.tensor(zero).repeat(2)


def ran(name, given, ftz, device):
    a, b, c = (t.to(device) for t in (*given, *[given[-1]] * (3 - len(given))))
    y = torch.empty_like(a)
    of_two_kernel[(1,)](
        a, b, c, torch.zeros(1, dtype=torch.int8, device=device), y, len(a), NAME=name, FTZ=ftz,
        BLOCK=32, ARCH=arch(a.device), enable_fp_fusion=False,
    )  # fmt: skip
    return y.cpu()


@pytest.mark.parametrize("name", ["mul", "mul_magnitude", "div"])
def test_what_rounds_below_the_least_normal_number_is_zero(device, name):
    given, zero = columns(QUOTIENTS if name == "div" else PRODUCTS)
    a, b = given
    operation = torch.div if name == "div" else torch.mul
    rounded = operation(a.abs() if name == "mul_magnitude" else a, b)
    want = torch.where(zero, torch.copysign(torch.zeros(()), rounded), rounded)
    ar = Arithmetic(ftz=True)
    if name != "mul_magnitude":
        assert_bitwise(getattr(ar, name)(a, b), want, "reference")
    assert_bitwise(ran(name, given, True, device), want, "kernel")
    assert_bitwise(ran(name, given, False, device), rounded, "kernel, IEEE 754")


def test_a_fused_sum_is_flushed_by_its_one_rounding(device):
    given, zero = columns(SUMS)
    a, b, c = given
    c = torch.where(a > 0, c, -c)
    given = [a, b, c]
    rounded = torch.where(a > 0, LEAST, -LEAST)
    want = torch.where(zero, torch.copysign(torch.zeros(()), a), rounded)
    for ftz, expected in ((True, want), (False, rounded)):
        assert_bitwise(fma(a, b, c, ftz=ftz), expected, f"reference, {ftz}")
        assert_bitwise(ran("fma", given, ftz, device), expected, f"kernel, {ftz}")


def test_a_fused_sum_of_negative_zeros_is_negative(device):
    """A factor of -0, which an addition of +0 would make +0."""
    a, b, c = (torch.tensor([x]) for x in (1.0, -0.0, -0.0))
    for ftz in (True, False):
        assert_bitwise(fma(a, b, c, ftz=ftz), c, f"reference, {ftz}")
        assert_bitwise(ran("fma", [a, b, c], ftz, device), c, f"kernel, {ftz}")
