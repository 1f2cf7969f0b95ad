"""Few tokens take one launch on a GPU, to the bits of the launches that it replaces."""

# SPDX-License-Identifier: Apache-2.0
import functools
from dataclasses import replace

import prologue_cases
import pytest
import torch
from assertions import assert_bitwise

import nvfp4_moe
from nvfp4_moe import Routing, RoutingMethodType
from nvfp4_moe.bench.moe import SHAPES, random_experts
from nvfp4_moe.kernels.moe.hopper import prologue
from nvfp4_moe.kernels.moe.routing import refusal, route

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here"),
]


@pytest.mark.parametrize("columns", (*prologue_cases.WIDTHS, 7168))
@pytest.mark.parametrize("form", prologue_cases.FORMS, ids=str)
def test_equal(form, columns):
    for tokens in (1, 2, 3, 8, 16):
        for placed in (True, False):
            prologue_cases.equal("cuda", form, columns, tokens, placed=placed)


@pytest.mark.parametrize(
    "experts,top_k,offset", [(128, 8, 0), (32, 8, 32), (512, 16, 0), (1, 1, 0)]
)
def test_equal_for_every_count_of_tokens(experts, top_k, offset):
    for tokens in range(1, 17):
        prologue_cases.equal(
            "cuda", prologue_cases.RECIPES[0], 1024, tokens, top_k, experts, offset
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("routing", prologue_cases.ROUTINGS, ids=str)
def test_it_routes(routing, dtype):
    if routing.functions != "exact" and (reason := refusal(routing, torch.device("cuda"))):
        pytest.skip(reason)
    for tokens in range(1, 17):
        prologue_cases.routed_equal("cuda", routing, tokens, dtype=dtype)


@pytest.mark.parametrize(
    "experts,local,offset", [(128, 128, 0), (128, 16, 112), (112, 50, 3), (16, 16, 0)]
)
@pytest.mark.parametrize("form", [prologue_cases.RECIPES[0], "plain"], ids=str)
def test_it_routes_other_experts(experts, local, offset, form):
    for tokens in (t for t in (1, 2, 3, 4, 8, 16) if t * experts <= 512):
        prologue_cases.routed_equal(
            "cuda", prologue_cases.ROUTINGS[0], tokens, experts, local, offset, form=form
        )


def test_it_routes_again_in_a_graph():
    """A replay with other logits gives what separate launches give for them."""
    routing = Routing(RoutingMethodType.Renormalize, 8)
    experts = random_experts(replace(SHAPES[0], intermediate=256), torch.device("cuda"))
    g = torch.Generator("cuda").manual_seed(0)
    x = torch.randn(4, 2048, device="cuda", generator=g).bfloat16()
    logits = torch.randn(4, 128, device="cuda", generator=g)
    call = functools.partial(nvfp4_moe.fused_moe, x, experts, backend="triton")
    assert prologue.routes(logits, routing)
    for _ in range(3):
        call((logits, routing))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = [call((logits, routing)) for _ in range(3)]
    for seed in range(5):
        logits.copy_(torch.randn(4, 128, device="cuda", generator=g.manual_seed(seed)))
        graph.replay()
        want = call(route(logits, routing))
        for one in got:
            assert_bitwise(one, want, f"seed {seed}")
