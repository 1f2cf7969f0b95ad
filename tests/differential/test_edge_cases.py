"""Inputs that show what ordinary numbers hide: they have what they are for, and claim something."""

# SPDX-License-Identifier: Apache-2.0
import pytest
import torch

from nvfp4_moe.cases import moe_edges
from nvfp4_moe.differential.verdict import Allowed, unequal
from nvfp4_moe.reference.activation import IMPLEMENTED
from nvfp4_moe.reference.moe.routing import route
from nvfp4_moe.reference.recipe import Recipe

CASES = {case.name: case for case in moe_edges.cases(Recipe())}


@pytest.mark.parametrize("name", CASES)
def test_the_reference_is_allowed_and_another_output_is_not(name):
    allowed = Allowed(CASES[name])
    assert not allowed.wrong(allowed.expected).any()
    wrong = allowed.wrong(torch.where(allowed.expected == 0, 1, allowed.expected * 1.5))
    assert wrong.double().mean() > 0.9, "intervals that hold anything"


def test_every_activation_is_alone_and_static():
    kinds = set(IMPLEMENTED)
    for part in (moe_edges.activations, moe_edges.static):
        assert {case.experts.activation for case in part(Recipe())} == kinds


def test_block_scales_are_subnormal_in_all_operands():
    for case in moe_edges.far_below(Recipe()):
        e = case.experts
        found = (case.activations.block_scales, e.gemm1_weights_scale, e.gemm2_weights_scale)
        written = case.run(keep_steps=True).steps["fc2_input_block_scales"]
        for scales in (*found, written):
            bytes_ = scales.view(torch.uint8)
            assert ((bytes_ > 0) & (bytes_ < 8)).any()


def test_routers_are_undecided_in_16_bits():
    for name, how, logits, bias in moe_edges.routers():
        right = route(logits, how, bias)
        if name == "logits near each other":
            for dtype in (torch.float16, torch.bfloat16):
                assert (route(logits.to(dtype).float(), how).ids != right.ids).any()
        if "negative" in name:
            assert (right.scores < 0).all()


def test_an_output_in_fp32_is_compared_to_the_bit():
    case = CASES["Relu2, float32 weights of any size, to fp32"]
    expected = case.reference()
    assert expected.dtype == torch.float32
    other = torch.nextafter(expected, torch.full_like(expected, torch.inf))
    assert unequal(other, expected).all() and Allowed(case).wrong(other).any()
