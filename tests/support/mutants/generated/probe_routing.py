"""Probes of the routing."""

# SPDX-License-Identifier: Apache-2.0
import itertools

import torch

from nvfp4_moe import host
from nvfp4_moe.cases import moe_edges
from nvfp4_moe.reference.moe import routing
from nvfp4_moe.reference.moe.routing import Routing, RoutingMethodType

from ..edge_calls import every_method, saturated, undecided
from .answers import Answers, raised
from .numbers import seeded

_M = RoutingMethodType


def of_routing() -> Answers:
    for make in (every_method, undecided, saturated):
        for how, logits, bias in make().routers:
            yield f"route, {how.method.name}", routing.route(logits, how, bias)
    special = host.normal(seeded(3), 6, 16) * 12
    special[0, 3], special[0, 5], special[1, ::2], special[2, 1:3] = (
        torch.nan,
        torch.inf,
        -torch.inf,
        -0.0,
    )
    special[3], special[4, :8] = 0.0, 30.0
    special[5] = torch.nan
    for method, k in itertools.product(_M, (1, 3, 8)):
        if method == _M.Unspecified or (method == _M.Llama4 and k > 1):
            continue
        bias = host.normal(seeded(4), 16) if method.biased else None
        for logits in (special, special.bfloat16()):
            yield f"special, {method.name}", routing.route(logits, Routing(method, k), bias)
    for tokens, experts in itertools.product(
        (16, 17, 64, 65, 191, 192, 193, 256, 257, 1024, 1025), (8, 159, 160, 255, 256)
    ):
        logits = torch.empty(tokens, experts, dtype=torch.float32, device="meta")
        yield "blocks", [routing.one_block_a_token(logits, k) for k in (6, 7, 8, 9, 96)]
    for _, how, logits, bias in moe_edges.routers():
        yield f"router, {how.method.name}", routing.route(logits, how, bias)
    nine = special[:, :9].contiguous()
    for groups in (None, 0, 1):
        one = Routing(_M.DeepSeekV3, 3, groups, groups)
        yield "one group", (routing.route(nine, one), routing.refusal(one, 9), one.grouped)
    yield "weights", routing.route(special, Routing(_M.Default, 3)).weights_bf16
    yield (
        "small sums",
        routing.route(host.normal(seeded(9), 64, 16) - 15.5, Routing(_M.DeepSeekV3, 3)),
    )
    for e in (2, 3, 5, 6, 7, 12, 20):
        yield "softmax", routing.route(host.normal(seeded(e), 9, e) * 30, Routing(_M.Default, 2))
        yield "sigmoid", routing.route(host.normal(seeded(e), 64, e) * 9, Routing(_M.Sigmoid, 2))
    for method, tokens, e in (
        (_M.Default, 5, 16),
        (_M.Default, 200, 60),
        (_M.Default, 9, 129),
        (_M.Default, 9, 200),
        (_M.Default, 90, 200),
        (_M.Default, 300, 256),
        (_M.Renormalize, 9, 16),
        (_M.SigmoidRenorm, 9, 16),
        (_M.DeepSeekV3, 9, 16),
    ):
        how = Routing(method, 8, functions="hopper")
        yield f"hopper, {method.name}", routing.route(host.normal(seeded(e), tokens, e) * 6, how)
    yield "hopper, special", routing.route(special, Routing(_M.Sigmoid, 3, functions="hopper"))
    tiny_bias = host.full((16,), 1e-39)
    yield (
        "subnormal bias",
        routing.route(host.full((5, 16), -40.0), Routing(_M.MiniMax2, 3), tiny_bias),
    )
    grouped = Routing(_M.DeepSeekV3, 3, 4, 3, 0.5)
    found = routing.route(special, grouped, host.normal(seeded(4), 16))
    yield "groups", found
    yield "shared", routing.append_shared_experts(found, 2, 16)
    for bad in ((found, -1, 16), (found, 0, 16), (found, 2, 15)):
        yield "shared, refused", raised(lambda b=bad: routing.append_shared_experts(*b))
    ids, weights = found.ids - 1, host.normal(seeded(4), *found.ids.shape)
    packed = routing.pack_topk(ids, weights)
    yield "packed", (packed, routing.unpack_topk(packed))
    for bad in (
        (ids.float(), weights),
        (ids, weights.half()),
        (ids[:1], weights),
        (ids > 0, weights),
    ):
        yield "packed, refused", raised(lambda b=bad: routing.pack_topk(*b))
    for method, e, k in itertools.product(
        _M, (1, 16, 128, 129, 256, 257, 1024, 1025, 2048, 2049), (1, 2, 8, 9, 22, 23, 32, 33)
    ):
        if method != _M.Unspecified:
            for has_bias in (True, False):
                yield "refusal", routing.refusal(Routing(method, k), e, has_bias)
    for groups, chosen, e, k in itertools.product(
        (2, 4, 8, 9), (1, 2, 4, 5), (8, 18, 64, 256, 260, 512, 520), (1, 8, 22, 23)
    ):
        yield (
            "refusal, groups",
            raised(
                lambda g=groups, c=chosen, e=e, k=k: routing.refusal(
                    Routing(_M.DeepSeekV3, k, g, c), e
                )
            ),
        )
    for bad in (
        {"n_group": -1},
        {"n_group": 2},
        {"n_group": 2, "topk_group": 3},
        {"n_group": 1},
        {"topk_group": 2},
        {"n_group": 1, "topk_group": 2},
        {"n_group": 4, "topk_group": 4},
        {"n_group": 4, "topk_group": 0},
        {"routed_scaling_factor": torch.inf},
        {"routed_scaling_factor": 2.0},
        {"top_k": 0},
    ):
        for method in (_M.DeepSeekV3, _M.TopK):
            yield (
                "Routing",
                raised(lambda b=bad, m=method: repr(Routing(**{"method": m, "top_k": 2} | b))),
            )
    yield (
        "Routing",
        [raised(lambda m=m: repr(Routing(m, 1))) for m in (*range(12), "Default", None)],
    )
    logits, five = special[:, :5].contiguous(), host.zeros(5)
    for bad in (
        (logits.half(), Routing(_M.TopK, 2), None),
        (logits[0], Routing(_M.TopK, 2), None),
        (logits, Routing(_M.TopK, 6), None),
        (logits, Routing(_M.TopK, 5), None),
        (logits, Routing(_M.TopK, 2), five),
        (logits, Routing(_M.MiniMax2, 2), five[:4]),
        (logits, Routing(_M.MiniMax2, 2), five.half()),
        (logits, Routing(_M.DeepSeekV3, 2, 5, 1), None),
        (logits[:, :4], Routing(_M.DeepSeekV3, 2, 2, 1), None),
        (logits, Routing(_M.DeepSeekV3, 2, 2, 1), None),
        (logits[:, :4], Routing(_M.DeepSeekV3, 3, 2, 1), None),
    ):
        yield "route, refused", raised(lambda b=bad: routing.route(*b))
    for method, chosen in itertools.product((_M.TopK, _M.Default), (0, 4, -1, 5)):
        ids = host.full((len(five), 1), float(chosen)).int()
        given = host.normal(seeded(5), len(five), 5)
        yield (
            "route, chosen before",
            raised(lambda m=method, i=ids, g=given: routing.route(g, Routing(m, 1), ids=i)),
        )
