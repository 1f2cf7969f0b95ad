"""Failing cases of both kinds, with an injected fault, and what they must be after a round trip."""

# SPDX-License-Identifier: Apache-2.0
from dataclasses import fields, is_dataclass, replace

import moe_cases
import torch
from assertions import assert_bitwise
from moe_cases import Shape

from nvfp4_moe.cases import inputs
from nvfp4_moe.cases.moe_case import MoECase
from nvfp4_moe.cases.quantize import Case
from nvfp4_moe.differential.compare import run_reference
from nvfp4_moe.failures.replay_file import MoEFailure, Origin, QuantizerFailure
from nvfp4_moe.reference.activation import ActivationType
from nvfp4_moe.reference.bounds.accumulation import CONTIGUOUS
from nvfp4_moe.reference.moe.routing import Routing, RoutingMethodType
from nvfp4_moe.reference.recipe import NVFP44Over6Config, Recipe, SfLayout

CASE = Case("per-token", Recipe(), SfLayout.layout_128x4)
FOUR = Recipe("exact", NVFP44Over6Config(256, "MSE", True))
ORIGIN = Origin("nvfp4-moe diff --rows 3", {"versions": {"torch": "2"}, "gpus": ["B200"]}, "note")


def assert_same(a, b, what="failure"):
    """Equal, to the bit in every tensor that they hold."""
    assert type(a) is type(b), what
    if isinstance(a, torch.Tensor):
        assert a.stride() == b.stride() and a.shape == b.shape, what
        assert_bitwise(a.reshape(-1), b.reshape(-1), what)
    elif is_dataclass(a):
        for f in fields(a):
            assert_same(getattr(a, f.name), getattr(b, f.name), f"{what}.{f.name}")
    elif isinstance(a, tuple | list):
        assert len(a) == len(b), what
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_same(x, y, f"{what}[{i}]")
    elif isinstance(a, dict):
        assert list(a) == list(b), what
        for key in a:
            assert_same(a[key], b[key], f"{what}[{key}]")
    else:
        assert a == b, what


def wrong(q):
    """The odd element of the second block's second byte, of the last row, off by one."""
    codes = q.codes.clone()
    codes[-1, 9:10] ^= 0x10
    return replace(q, codes=codes)


def quantizer_failure(case=CASE, dtype=torch.bfloat16, sides=("reference", "triton")):
    x = inputs.synthetic("edge", 20, 48, dtype)
    right = run_reference(x, case)
    return QuantizerFailure(x, case, dict(zip(sides, (right, wrong(right)), strict=True)), ORIGIN)


def moe_failure(mode="per-token", activation=ActivationType.Swiglu, **options):
    shape = Shape(3, 208, 80, 6, 2, 1, 4)
    made = moe_cases.make(shape, activation, mode, **options)
    case = MoECase(
        "a layer",
        made.activations,
        made.experts,
        Routing(RoutingMethodType.Renormalize, 2),
        6,
        ids=made.ids,
        weights=made.weights,
        local_expert_offset=1,
        recipe=FOUR,
    )
    output = case.reference()
    output[1, 7] = 1000.0
    return MoEFailure(case, "triton", output, "BLOCK_M=16 warps=4", CONTIGUOUS, ORIGIN)
