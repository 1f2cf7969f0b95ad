"""The intervals of FlashInfer's cutlass layer: they hold its roundings in any order of the sums."""

# SPDX-License-Identifier: Apache-2.0
from dataclasses import replace

import moe_cases
import pytest
import torch
from assertions import assert_bitwise, assert_inside
from moe_cases import GATED, PLAIN, Shape

from nvfp4_moe.differential.conforming import CONFORMING
from nvfp4_moe.reference.activation import ActivationType, activate
from nvfp4_moe.reference.bounds.moe import fused_moe_bounds
from nvfp4_moe.reference.moe import layer as moe
from nvfp4_moe.reference.moe.layer import Stages
from nvfp4_moe.reference.recipe import NVFP44Over6Config, Recipe
from nvfp4_moe.reference.weights.cutlass import with_cutlass

SHAPE = Shape(8, 272, 176, 4, 2)
SUMS = [name for name in CONFORMING if "approximate" not in name]  # the activation is no stage here


def case_of(kind=ActivationType.Swiglu, seed=0, shape=SHAPE):
    case = moe_cases.make(shape, kind, "static", seed)
    return replace(case, experts=with_cutlass(case.experts))


def bounds_of(case, **options):
    return fused_moe_bounds(
        case.activations,
        case.experts,
        case.ids,
        case.weights,
        variant="cutlass",
        finalize_order="slot",
        **options,
    )


def output_of(case, stages=None, *, variant="cutlass", recipe=None):
    return moe.fused_moe(
        case.activations,
        case.experts,
        case.ids,
        case.weights,
        stages=stages,
        variant=variant,
        recipe=recipe,
        finalize_order="slot",
    ).output


@pytest.mark.parametrize("kind", GATED + PLAIN, ids=lambda k: k.name)
def test_sums_in_any_order_are_inside(kind):
    case = case_of(kind)
    bounds = bounds_of(case)
    for name in SUMS:
        assert_inside(output_of(case, CONFORMING[name]), bounds.output, name)
    assert_bitwise(
        bounds.intermediate.low, bounds.intermediate.low.bfloat16().double(), "intermediate"
    )


@pytest.mark.parametrize("config", [None, NVFP44Over6Config()], ids=["plain", "4over6"])
def test_fast_and_exact_math_are_inside(config):
    case = case_of(shape=Shape(6, 1024, 176, 4, 2))
    bounds = bounds_of(case, recipe=Recipe(four_over_six=config))
    for math in ("fast", "exact"):
        assert_inside(output_of(case, recipe=Recipe(math, config)), bounds.output, math)


def test_an_approximate_activation_is_inside():
    case = case_of()

    def approximate(raw, experts, e):
        rounded = (raw * experts.output1_scale_gate_scalar[e]).bfloat16().float()
        y = activate(rounded, experts.activation)
        return y * (1 + (torch.rand(y.shape) * 2 - 1) * 2.0**-22)

    stages = as_cutlass(case, activate=approximate)
    assert_inside(output_of(case, stages, variant="cuda"), bounds_of(case).output)


def as_cutlass(case, **changes):
    """The stages of the other layer with static scales that make it this one, with changes."""

    def activated(raw, experts, e):
        rounded = (raw * experts.output1_scale_gate_scalar[e]).bfloat16().float()
        return activate(rounded, experts.activation)

    def requantize(y, _, recipe, steps):
        return moe.requantize(y.bfloat16(), case.experts.intermediate_scale, recipe, steps)

    return Stages(**{"activate": activated, "requantize": requantize} | changes)


def accumulator_in_fp32(case):
    return as_cutlass(
        case,
        activate=lambda raw, experts, e: activate(
            raw * experts.output1_scale_gate_scalar[e], experts.activation
        ),
    )


def activation_in_fp32(case):
    encode = case.experts.intermediate_scale
    return as_cutlass(case, requantize=lambda y, _, *rest: moe.requantize(y * encode, None, *rest))


def decode_scale(case):
    decode = 1 / case.experts.intermediate_scale
    return as_cutlass(
        case, requantize=lambda y, _, *rest: moe.requantize(y.bfloat16(), decode, *rest)
    )


MISTAKES = [accumulator_in_fp32, activation_in_fp32, decode_scale]


@pytest.mark.parametrize("mistake", MISTAKES, ids=lambda m: m.__name__)
def test_a_mistake_is_outside(mistake):
    case = case_of(shape=Shape(16, 256, 128, 4, 2))
    right = output_of(case)
    assert_bitwise(output_of(case, as_cutlass(case), variant="cuda"), right, "no mistake")
    bounds = bounds_of(case).output
    assert bounds.contains(right).all()
    assert not bounds.contains(output_of(case, mistake(case), variant="cuda")).all()


def test_the_other_layer_with_static_scales_is_outside():
    case = case_of(shape=Shape(16, 256, 128, 4, 2))
    other = output_of(case, variant="cuda")
    assert not bounds_of(case).output.contains(other).all()
