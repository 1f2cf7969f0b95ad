"""Slots whose expert is not local add nothing, whatever their weight: reference and bounds."""

# SPDX-License-Identifier: Apache-2.0
from dataclasses import replace

import moe_cases
import pytest
import torch
from assertions import assert_bitwise, assert_inside
from moe_cases import Shape

import nvfp4_moe
from nvfp4_moe.reference.bounds.moe import fused_moe_bounds
from nvfp4_moe.reference.bounds.parallel import expert_parallel_bounds
from nvfp4_moe.reference.moe import layer as moe
from nvfp4_moe.reference.moe.finalize import finalize
from nvfp4_moe.reference.moe.permute import local_slots

SHAPE = Shape(6, 128, 64, 6, 5, 2, 3)
ORDERS = ("flashinfer", "slot")


@pytest.fixture
def pair():
    """(a case with NaN and infinite weights in slots of no expert, the same with zeros there)."""
    strange = moe_cases.with_strange_weights(moe_cases.make(SHAPE), SHAPE)
    is_local = local_slots(strange.ids, SHAPE.num_local, SHAPE.offset)
    return strange, replace(strange, weights=torch.where(is_local, strange.weights, 0))


@pytest.mark.parametrize("order", ORDERS)
def test_reference(pair, order):
    got, want = (
        moe.fused_moe(
            c.activations, c.experts, c.ids, c.weights, local_expert_offset=2, finalize_order=order
        ).output
        for c in pair
    )
    assert_bitwise(got, want, order)


@pytest.mark.parametrize("order", ORDERS)
def test_bounds(pair, order):
    got, want = (
        fused_moe_bounds(
            c.activations, c.experts, c.ids, c.weights, local_expert_offset=2, finalize_order=order
        ).output
        for c in pair
    )
    assert_bitwise(got.low, want.low, order)
    assert_bitwise(got.high, want.high, order)


def test_bounds_of_ranks():
    """A weight is finite on the rank that holds its expert; an id of -1 is on none."""
    case = moe_cases.make(Shape(6, 128, 64, 6, 5))
    ids, weights = case.ids.clone(), case.weights.clone()
    ids[:, 2], weights[:, 2] = -1, torch.nan
    out = moe.fused_moe(case.activations, case.experts, ids, weights).output
    found = expert_parallel_bounds(case.activations, case.experts, ids, weights, (6,))
    assert_inside(out, found)


@pytest.mark.parametrize("weight", [torch.nan, torch.inf])
def test_a_weight_of_an_expert_still_shows(weight):
    case = moe_cases.make(SHAPE)
    is_local = local_slots(case.ids, SHAPE.num_local, SHAPE.offset)
    token = int(is_local.any(1).nonzero()[0])
    weights = case.weights.masked_fill(is_local & (torch.arange(6) == token)[:, None], weight)
    out = moe.fused_moe(case.activations, case.experts, case.ids, weights, local_expert_offset=2)
    assert not out.output[token].isfinite().any()


def test_minus_zero_is_kept():
    """A skipped slot is no addition of 0, which would turn a sum of -0 into +0."""
    rows, weights = torch.full((1, 2, 1), -1e-30), torch.tensor([[1e-30, torch.nan]])
    is_local = torch.tensor([[True, False]])
    assert finalize(rows, weights, "slot", is_local).signbit().item()


def test_gradients():
    """The weights of slots of no expert have no gradient, and disturb no other."""
    g = torch.Generator().manual_seed(5)
    x, w13, w2 = (torch.randn(*size, generator=g) for size in ((3, 32), (2, 32, 32), (2, 32, 16)))
    ids = torch.tensor([[0, -1], [-1, 1], [1, 0]], dtype=torch.int32)
    ones = torch.ones(3, 2)
    grads = []
    for strange in (0.0, torch.nan):
        weights = ones.masked_fill((ids < 0) | (ids > 1), strange).requires_grad_()
        leaves = [x.bfloat16().requires_grad_(), w13.clone().requires_grad_(), weights]
        out = nvfp4_moe.fake_quantized_moe(leaves[0], leaves[1], w2, (ids, weights))
        grads.append((out, *torch.autograd.grad(out.float().sum(), leaves)))
    for name, a, b in zip(("output", "x", "w13", "weights"), *grads, strict=True):
        assert a.isfinite().all()
        assert_bitwise(b, a, name)
