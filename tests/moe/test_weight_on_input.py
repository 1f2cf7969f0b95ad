"""Llama 4's router weights multiply the rows before the experts, at every door, or are refused."""

# SPDX-License-Identifier: Apache-2.0
from dataclasses import fields, replace

import pytest
import torch
from assertions import assert_bitwise

from nvfp4_moe import Routing, RoutingMethodType, explain_fused_moe, fused_moe, prepare_experts
from nvfp4_moe.kernels.backends import UnsupportedError
from nvfp4_moe.reference.moe.routing import pack_topk, route
from nvfp4_moe.reference.weights.layout import gemm1_values, gemm2_values
from nvfp4_moe.serving.fused import fused_experts_fp4

EXPERTS, HIDDEN, INTERMEDIATE, TOKENS = 8, 128, 64, 6
LLAMA4 = Routing(RoutingMethodType.Llama4, 1)


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def experts():
    w13, w2 = (
        random(EXPERTS, 2 * INTERMEDIATE, HIDDEN),
        random(EXPERTS, HIDDEN, INTERMEDIATE, seed=1),
    )
    made = prepare_experts((0.1 * w13).bfloat16(), (0.1 * w2).bfloat16())
    return replace(made, router_weight_on_input=True)


@pytest.fixture(scope="module")
def x():
    return random(TOKENS, HIDDEN, seed=2).bfloat16()


@pytest.fixture(scope="module")
def logits():
    return random(TOKENS, EXPERTS, seed=3) - 1.5  # weights far from 1


def layer(experts, x, logits, on_input):
    """In fp64: the weight on the rows, or on the results."""
    rows = []
    for row, scores in zip(x.double(), logits, strict=True):
        e = int(scores.argmax())
        weight = float(torch.sigmoid(scores[e].double()))
        row = row * weight if on_input else row
        y = gemm1_values(experts, e).double() @ row * float(experts.output1_scale_gate_scalar[e])
        up, gate = y.chunk(2)
        down = gemm2_values(experts, e).double() * float(experts.output2_scale_scalar[e])
        rows.append(down @ (torch.nn.functional.silu(gate) * up) * (1 if on_input else weight))
    return torch.stack(rows)


def assert_is_the_layer(got, experts, x, logits):
    want, other = (layer(experts, x, logits, on_input) for on_input in (True, False))
    assert (got.double() - want).norm() < 0.2 * want.norm()
    assert (got.double() - other).norm() > 0.4 * other.norm()


def routed(logits):
    scores, ids = torch.sigmoid(logits).max(1)
    return ids[:, None].int(), scores[:, None]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_fused_moe_scales_the_rows(dtype, experts, x, logits):
    got = fused_moe(x, experts, (logits, LLAMA4), backend="reference")
    assert_is_the_layer(got, experts, x, logits)
    ids, weights = routed(logits)
    given = fused_moe(x, experts, (ids, weights.to(dtype)), backend="reference")
    plain = replace(experts, router_weight_on_input=False)
    by_hand = fused_moe(
        x * weights.bfloat16(), plain, (ids, torch.ones(TOKENS, 1)), backend="reference"
    )
    assert_bitwise(given, by_hand, "scaled by hand")
    assert explain_fused_moe(x, experts, (logits, LLAMA4)).backend is not None


def test_two_experts_a_token_are_refused(experts, x, logits):
    ids = torch.zeros(TOKENS, 2, dtype=torch.int32)
    for routing in (
        (logits, Routing(RoutingMethodType.TopKSigmoid, 2)),
        (ids, torch.ones(TOKENS, 2)),
    ):
        with pytest.raises(ValueError, match="top_k is 2; the router's weights multiply the input"):
            fused_moe(x, experts, routing)


def tensors(e):
    return {
        "w13_weight": e.gemm1_weights,
        "w2_weight": e.gemm2_weights,
        "w13_weight_scale": e.gemm1_weights_scale,
        "w2_weight_scale": e.gemm2_weights_scale,
        "g1_scale_c": e.output1_scale_scalar,
        "g1_alphas": e.output1_scale_gate_scalar,
        "g2_alphas": e.output2_scale_scalar,
        "w13_input_scale_quant": torch.ones(1),
        "use_per_token_activation": True,
        "num_experts": EXPERTS,
        "local_expert_offset": 0,
        "local_num_experts": EXPERTS,
        "intermediate_size": INTERMEDIATE,
        "activation_type": 3,
        "router_weight_on_input": True,
    }


@pytest.mark.parametrize("form", ["logits", "pair", "packed"])
def test_a_servers_tensors(form, experts, x, logits):
    ids, weights = routed(logits)
    routing = {
        "logits": {"router_logits": logits, "top_k": 1, "routing_method_type": 3},
        "pair": {"topk": (ids, weights)},
        "packed": {"topk": pack_topk(ids, weights)},
    }[form]
    got = fused_experts_fp4(x, **tensors(experts), **routing)
    assert_is_the_layer(got[0], experts, x, logits)


def test_codes_cannot_be_weighed(experts, x, logits):
    ids, weights = routed(logits)
    codes = torch.zeros(TOKENS, HIDDEN // 2, dtype=torch.uint8)
    with pytest.raises(UnsupportedError, match="needs hidden states in bf16"):
        fused_experts_fp4(codes, **tensors(experts), topk=(ids, weights))
    with pytest.raises(UnsupportedError, match="top_k is 2"):
        fused_experts_fp4(x, **tensors(experts), router_logits=logits, top_k=2)


@pytest.mark.gpu
def test_on_a_gpu_and_captured(experts, x, logits):
    """Rows are scaled as by hand, and a graph follows other logits."""
    scalars = {
        f.name: v.cuda()
        for f in fields(experts)
        if isinstance(v := getattr(experts, f.name), torch.Tensor)
    }
    experts, x, logits = replace(experts, **scalars), x.cuda(), logits.cuda()
    plain = replace(experts, router_weight_on_input=False)

    def by_hand(logits):
        result = route(logits.cpu(), LLAMA4)
        weights = result.weights_bf16.cuda()
        return fused_moe(x * weights, plain, (result.ids.cuda(), torch.ones_like(weights)))

    def call():
        return fused_moe(x, experts, (logits, LLAMA4))

    assert_bitwise(call(), by_hand(logits), "scaled by hand")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = call()
    other = logits.flip(0)
    logits.copy_(other)
    graph.replay()
    assert_bitwise(output, by_hand(other), "replayed")
