"""The order of the sum over a token's experts, by hand: what slot 0 does, and what a zero's sign is."""

# SPDX-License-Identifier: Apache-2.0
import pytest
import torch
from assertions import assert_bitwise

from nvfp4_moe.kernels.moe.finalize import finalize as finalize_triton
from nvfp4_moe.reference.moe.finalize import finalize

TINY = 2.0**-140
"""Subnormal."""


def summed(rows, weights, order, held=None):
    """One token, one column."""
    r = torch.tensor(rows, dtype=torch.float32)[None, :, None]
    w = torch.tensor(weights, dtype=torch.float32)[None]
    is_local = None if held is None else torch.tensor(held)[None]
    return finalize(r, w, order, is_local)


@pytest.mark.parametrize(
    ("rows", "weights", "held", "by_slot", "multiplied"),
    [
        # -0 onto +0 is +0; a product of -0 keeps its sign, and -0 onto -0 as well.
        ([-0.0], [0.5], None, 0.0, -0.0),
        ([-0.0, -0.0], [0.5, 0.25], None, 0.0, -0.0),
        ([-0.0, 0.0], [0.5, 0.25], None, 0.0, 0.0),
        ([0.0, -0.0], [0.5, 0.25], None, 0.0, 0.0),
        # Slot 0 alone is multiplied: without it, later ones add to +0.
        ([-0.0, -0.0], [0.5, 0.25], [False, True], 0.0, 0.0),
        ([-0.0, -0.0], [0.5, 0.25], [True, False], 0.0, -0.0),
        ([-1.0, -1.0], [torch.nan, torch.inf], [False, False], 0.0, 0.0),
        # A product that is lost below the least number keeps its sign in either.
        ([-(2.0**-100)], [2.0**-100], None, -0.0, -0.0),
        ([1.5, -1.5], [2.0, 2.0], None, 0.0, 0.0),
    ],
)  # fmt: skip
def test_zeros(rows, weights, held, by_slot, multiplied):
    for order, want in (("slot", by_slot), ("slot-multiply", multiplied)):
        assert_bitwise(summed(rows, weights, order, held), torch.full((1, 1), want), order)


def test_subnormal_numbers_are_flushed_until_0_7_4():
    """A weight; a sum of normal numbers."""
    for rows, weights, kept in (
        ([1.0, 1.0], [TINY, TINY], 2 * TINY),
        ([1.0, -1.0], [2.0**-126 * 1.5, 2.0**-126], 2.0**-127),
    ):
        assert_bitwise(summed(rows, weights, "slot"), torch.zeros(1, 1), "flushed")
        assert_bitwise(summed(rows, weights, "slot-multiply"), torch.full((1, 1), kept), "kept")


def test_each_slot_rounds_once():
    """1 + 2^-23 times itself is 1 + 2^-22 + 2^-46: fused with -1 it keeps the last part."""
    odd = 1 + 2.0**-7  # of bf16
    for order in ("slot", "slot-multiply"):
        fused = summed([-1.0, odd], [odd * odd, odd], order)
        assert fused.item() == 0.0, order
        kept = summed([-1.0, odd], [1 + 2.0**-6, 1 + 2.0**-23], order)
        assert kept.item() == odd * (1 + 2.0**-23) - (1 + 2.0**-6), order


def test_the_kernel_rounds_once_and_keeps_subnormal_rows(device):
    """A product on a tie of fp32, which 2^-80 decides, behind the last bit of fp64; rows of 2^-130."""
    rows = torch.tensor([[2.0**-80], [1 + 2.0**-7], [2.0**-130], [2.0**-130]]).bfloat16()
    weights = torch.tensor([[1.0, 1 + 2.0**-17], [1.0, 1.0]])
    decided = 1 + 2.0**-7 + 2.0**-17 + 2.0**-23
    for order, kept in (("slot", 0.0), ("slot-multiply", 2.0**-129)):
        want = torch.tensor([[decided], [kept]])
        assert_bitwise(finalize(rows.float().view(2, 2, 1), weights, order), want, order)
        output = torch.empty(2, 1, device=device)
        slots = torch.arange(4, dtype=torch.int32, device=device)
        finalize_triton(rows.to(device), slots, weights.to(device), output, order)
        assert_bitwise(output.cpu(), want, f"{order}, the kernel")
