"""fp32 as the kernels do it: rcp.approx.ftz over every significand, and what flushes."""

# SPDX-License-Identifier: Apache-2.0
import math

import pytest
import torch
from assertions import assert_bitwise

from nvfp4_moe.reference.numerics import fp32
from nvfp4_moe.reference.numerics.fp32 import FLT_MAX, Arithmetic, rcp_approx_ftz

MIN_NORMAL = 2.0**-126
SUBNORMAL = 2.0**-130


def bits(*patterns: int) -> torch.Tensor:
    return torch.tensor(patterns, dtype=torch.int64).to(torch.int32).view(torch.float32)


@pytest.fixture(scope="module")
def significands() -> torch.Tensor:
    """All 2^23 numbers in [1, 2)."""
    return (torch.arange(2**23, dtype=torch.int32) | 0x3F800000).view(torch.float32)


def test_rcp_is_within_one_ulp_of_the_reciprocal(significands):
    """The counts are those measured on an H100."""
    nearest = (1 / significands.double()).float()  # 53 bits suffice: no double rounding
    delta = rcp_approx_ftz(significands).view(torch.int32) - nearest.view(torch.int32)
    counts = {d: int((delta == d).sum()) for d in (-1, 0, 1)}
    assert counts == {-1: 374_723, 0: 7_280_086, 1: 733_799}


def test_rcp_depends_on_the_exponent_by_a_shift(significands):
    """Every exponent of the input, at a spread of significands; the last two results flush."""
    unit = significands[:: 2**9 + 1]
    of_unit = rcp_approx_ftz(unit).double()
    for exponent in range(-126, 128):
        got = rcp_approx_ftz(unit * 2.0**exponent)
        expected = of_unit * 2.0**-exponent
        expected = torch.where(expected < MIN_NORMAL, 0.0, expected).float()
        assert_bitwise(got, expected, f"rcp at 2^{exponent}")
        assert_bitwise(rcp_approx_ftz(-unit * 2.0**exponent), -expected, "rcp of negatives")


def test_rcp_of_special_values():
    inf, nan = math.inf, bits(0x7FFFFFFF).item()
    table = {
        0x00000000: inf,
        0x00000001: inf,  # subnormals count as zero
        0x007FFFFF: inf,
        0x00800000: 2.0**126,  # the smallest normal
        0x3F800000: 1.0,
        0x7E800000: 2.0**-126,  # of 2^126, the last result that is normal
        0x7E800001: 0.0,
        0x7F000000: 0.0,
        0x7F7FFFFF: 0.0,
        0x7F800000: 0.0,
        0x7F800001: nan,  # NaN has one result, whatever its sign
        0x7FC00000: nan,
        0x7FFFFFFF: nan,
    }
    for pattern, expected in table.items():
        for sign in (0, 0x80000000):
            x, result = bits(pattern | sign), torch.tensor([expected])
            if math.isnan(expected):
                result = bits(0x7FFFFFFF)
            elif sign:
                result = -result
            assert_bitwise(rcp_approx_ftz(x), result, f"rcp of 0x{pattern | sign:08x}")


def test_rcp_of_the_contracts_constants():
    assert_bitwise(rcp_approx_ftz(torch.tensor([6.0])), bits(0x3E2AAAAB), "rcp(6)")
    assert_bitwise(torch.tensor([1 / 6]), bits(0x3E2AAAAB), "1/6")
    for e4m3_max in (448, 256):
        g = torch.tensor([1 / (6 * e4m3_max)])
        assert rcp_approx_ftz(g).item() == 6 * e4m3_max
        assert (1 / g).item() == 6 * e4m3_max


def test_rcp_takes_any_shape_and_stride():
    x = torch.rand(4, 6, generator=torch.Generator().manual_seed(0)) + 0.1
    expected = rcp_approx_ftz(x.flatten()).reshape(4, 6)
    assert_bitwise(rcp_approx_ftz(x), expected, "matrix")
    assert_bitwise(rcp_approx_ftz(x.T), expected.T.contiguous(), "transposed")
    assert rcp_approx_ftz(x[:0]).shape == (0, 6)


def test_flush_zeroes_subnormals_and_keeps_all_else():
    kept = [0.0, -0.0, MIN_NORMAL, -MIN_NORMAL, 1.0, FLT_MAX, math.inf, -math.inf, math.nan]
    assert_bitwise(fp32.flush(torch.tensor(kept)), torch.tensor(kept), "kept")
    subnormal = bits(0x00000001, 0x007FFFFF, 0x80000001, 0x807FFFFF)
    zeros = torch.tensor([0.0, 0.0, -0.0, -0.0])
    assert_bitwise(fp32.flush(subnormal), zeros, "subnormals")


@pytest.mark.parametrize("ftz", [True, False], ids=["cuda", "cute-dsl"])
def test_operations_flush_their_results_in_one_build_only(ftz):
    ar = Arithmetic(ftz)
    a, b = torch.tensor([1.5 * MIN_NORMAL]), torch.tensor([MIN_NORMAL])
    half = torch.tensor([0.5])
    for got, exact in (
        (ar.flush(torch.tensor([-SUBNORMAL])), -SUBNORMAL),
        (ar.mul(a, half), 0.75 * MIN_NORMAL),
        (ar.mul(-a, 0.5), -0.75 * MIN_NORMAL),
        (ar.sub(a, b), 0.5 * MIN_NORMAL),
        (ar.add(-a, b), -0.5 * MIN_NORMAL),
        (ar.div(a, torch.tensor([2.0])), 0.75 * MIN_NORMAL),
        (ar.div(1.0, torch.tensor([FLT_MAX])), 2.0**-128),
    ):
        expected = math.copysign(0.0, exact) if ftz else exact
        assert_bitwise(got, torch.tensor([expected]), f"ftz {ftz}, {exact}")
    assert_bitwise(ar.mul(b, 2.0), torch.tensor([2 * MIN_NORMAL]), "normal")


def test_division_is_correctly_rounded():
    """In double, then once to fp32: 53 bits are enough for a quotient of two 24-bit numbers."""
    generator = torch.Generator().manual_seed(1)
    a, b = torch.randn(2, 2**16, generator=generator).exp()
    ar = Arithmetic(ftz=False)
    assert_bitwise(ar.div(a, b), (a.double() / b.double()).float(), "a / b")
    assert_bitwise(ar.div(1.0, b), (1 / b.double()).float(), "1 / b")
    assert_bitwise(ar.div(a, 2688.0), (a.double() / 2688).float(), "a / 2688")


def test_min_flt_max_lets_a_nan_lose():
    x = torch.tensor([math.nan, math.inf, -math.inf, FLT_MAX, 1.0, -0.0])
    expected = torch.tensor([FLT_MAX, FLT_MAX, -math.inf, FLT_MAX, 1.0, -0.0])
    assert_bitwise(Arithmetic(ftz=True).min_flt_max(x), expected, "min")
