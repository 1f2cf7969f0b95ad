"""A variant of the fused layer is one object: its quantizers, its order, its layout, its roundings."""

# SPDX-License-Identifier: Apache-2.0
from dataclasses import fields, replace
from typing import get_args

import moe_cases
import pytest
import torch
from moe_cases import Shape

from nvfp4_moe.kernels.flashinfer import functions
from nvfp4_moe.reference.moe import layer
from nvfp4_moe.reference.moe.variants import VARIANTS
from nvfp4_moe.reference.recipe import Build, LayerBuild
from nvfp4_moe.reference.weights.checksum import checksum
from nvfp4_moe.reference.weights.copies import (
    LAYOUTS,
    in_layouts_of,
    refresh_layouts,
    without_layouts,
)
from nvfp4_moe.reference.weights.experts import Experts

SHAPE = Shape(3, 128, 64, 4, 2)
COPIED = [v for v in VARIANTS.values() if v.layout is not None]


def case_of(variant):
    return moe_cases.make(SHAPE, mode="static" if variant.static_only else "per-token")


def same(a, b):
    return all(
        torch.equal(getattr(a, f.name).view(torch.uint8), getattr(b, f.name).view(torch.uint8))
        if getattr(a, f.name).element_size() == 1
        else torch.equal(getattr(a, f.name), getattr(b, f.name))
        for f in fields(a)
    )


def test_every_build_of_a_layer_is_a_variant():
    assert set(VARIANTS) == set(get_args(LayerBuild))
    assert all(name == v.name and v.quantizers in get_args(Build) for name, v in VARIANTS.items())
    names = {f.name for f in fields(Experts)}
    assert {layout.field for layout in LAYOUTS} <= names and len(LAYOUTS) == 2


def test_every_layer_of_flashinfer_has_its_own_variant():
    assert sorted(each.BUILD for each in functions.LAYERS) == sorted(VARIANTS)
    assert len({each.NAME for each in functions.LAYERS}) == len(functions.LAYERS)


@pytest.mark.parametrize("variant", COPIED, ids=lambda v: v.name)
def test_a_layout_is_added_taken_off_and_made_again(variant):
    case = case_of(variant)
    prepared = variant.prepared(case.experts)
    assert variant.layout.is_in(prepared) and not variant.layout.is_in(case.experts)
    bare = without_layouts(prepared, first_expert=3)
    assert not any(layout.is_in(bare) for layout in LAYOUTS) and bare.first_expert == 3
    again = getattr(in_layouts_of(bare, prepared), variant.layout.field)
    assert same(again, getattr(prepared, variant.layout.field))
    assert checksum(prepared) == checksum(case.experts)


@pytest.mark.parametrize("variant", COPIED, ids=lambda v: v.name)
def test_a_copy_is_brought_up_to_date(variant):
    prepared = variant.prepared(case_of(variant).experts)
    other = variant.prepared(
        moe_cases.make(SHAPE, mode="static" if variant.static_only else "per-token", seed=5).experts
    )
    stale = replace(other, **{variant.layout.field: getattr(prepared, variant.layout.field)})
    copy, wanted = getattr(stale, variant.layout.field), getattr(other, variant.layout.field)
    assert not same(copy, wanted)
    refresh_layouts(stale, slice(0, SHAPE.experts))
    assert same(copy, wanted)


def test_the_layout_of_prepare_experts_needs_no_copy():
    experts = moe_cases.make(SHAPE).experts
    assert VARIANTS["cuda"].prepared(experts) is experts


def test_only_the_roundings_of_a_variant_change_the_reference():
    case = moe_cases.make(SHAPE, mode="static")
    given = case.activations, case.experts, case.ids, case.weights
    outputs = {name: layer.fused_moe(*given, variant=name, keep_steps=True) for name in VARIANTS}
    assert torch.equal(outputs["cuda"].output, outputs["cute-dsl"].output)
    first = outputs["cutlass"].steps["activated"]
    assert torch.equal(first, first.bfloat16().float())
    assert not torch.equal(first, outputs["cuda"].steps["activated"])
