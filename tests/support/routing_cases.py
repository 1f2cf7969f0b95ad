"""Routings, logits, and a scalar formulation of the routing of one token."""

# SPDX-License-Identifier: Apache-2.0
import dataclasses
import math
import struct

import numpy as np
import pytest
import torch

from nvfp4_moe.reference.moe.routing import Routing, RoutingMethodType, route

M = RoutingMethodType
METHODS = [m for m in M if m != M.Unspecified]
RAW = [M.Renormalize, M.RenormalizeNaive, M.TopK, M.TopKSigmoid, M.Llama4]
SIGMOID = [M.Sigmoid, M.SigmoidRenorm, M.DeepSeekV3, M.MiniMax2]
BIASED = [M.DeepSeekV3, M.MiniMax2]
GROUPED = Routing(M.DeepSeekV3, 4, n_group=4, topk_group=2, routed_scaling_factor=2.5)
VARIANTS = [
    *(Routing(m, k) for m in METHODS for k in (1, 5)),
    *(Routing(m, 5, routed_scaling_factor=2.5) for m in BIASED),
    Routing(M.DeepSeekV3, 3, n_group=1, topk_group=1),
    Routing(M.SigmoidRenorm, 5, norm_topk_prob=False),
    GROUPED,
    dataclasses.replace(GROUPED, topk_group=1),
    dataclasses.replace(GROUPED, topk_group=4, top_k=8),
    dataclasses.replace(GROUPED, n_group=2, topk_group=1, top_k=7),
]
FLOAT32 = np.float32


def name(routing):
    scale = f"-scale={routing.scale}" if routing.scale != 1 else ""
    groups = f"-groups={routing.topk_group}of{routing.n_group}" if routing.grouped else ""
    norm = "" if routing.norm_topk_prob else "-unnormalized"
    return f"{routing.method.name}-K={routing.top_k}{groups}{scale}{norm}"


variants = pytest.mark.parametrize("routing", VARIANTS, ids=name)
each_method = pytest.mark.parametrize("method", METHODS, ids=lambda m: m.name)
each_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])


def logits_of(tokens, experts, seed=0, dtype=torch.float32, scale=2.0):
    generator = torch.Generator().manual_seed(seed)
    return (scale * torch.randn(tokens, experts, generator=generator)).to(dtype)


def bias_of(experts, dtype=torch.float32, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(experts, generator=generator).to(dtype)


def ids_of(*args):
    return route(*args).ids.tolist()


# The scalar formulation: one row, Python and numpy scalars, no torch.


def sigmoid(x):
    return FLOAT32(FLOAT32(0.5) * FLOAT32(math.tanh(0.5 * float(x))) + FLOAT32(0.5))


def softmax(row):
    exp = [math.exp(float(x) - float(max(row))) for x in row]
    return [FLOAT32(x / math.fsum(exp)) for x in exp]


def to_bf16(x):
    bits = struct.unpack("<I", struct.pack("<f", x))[0]
    bits += 0x7FFF + (bits >> 16 & 1)
    return FLOAT32(struct.unpack("<f", struct.pack("<I", bits & 0xFFFF0000))[0])


def best(scores, candidates, k):
    return sorted(candidates, key=lambda e: (-scores[e], np.signbit(scores[e]), e))[:k]


def scalar_route(row, routing, bias):
    """(ids, weights, scores) of one row of numpy fp32 logits; weights in fp64 sums."""
    experts = range(len(row))
    if routing.method == M.Default:
        scores = softmax(row)
        ids = best(scores, experts, routing.top_k)
        return ids, [scores[e] for e in ids], scores
    if routing.method in RAW:
        ids = best(row, experts, routing.top_k)
        chosen = [row[e] for e in ids]
        if routing.method in (M.Renormalize, M.RenormalizeNaive):
            return ids, softmax(chosen), row
        return ids, chosen if routing.method == M.TopK else [sigmoid(x) for x in chosen], row
    sigmoids = [sigmoid(x) for x in row]
    scores = sigmoids
    if bias is not None:
        added = [to_bf16(b) for b in bias] if routing.grouped else bias
        scores = [FLOAT32(s + b) for s, b in zip(sigmoids, added, strict=True)]
    candidates = experts
    if routing.grouped:
        size = len(row) // routing.n_group
        members = [range(g * size, (g + 1) * size) for g in range(routing.n_group)]
        sums = [FLOAT32(sum(scores[e] for e in best(scores, group, 2))) for group in members]
        chosen = best(sums, range(routing.n_group), routing.topk_group)
        candidates = [e for g in chosen for e in members[g]]
    ids = best(scores, candidates, routing.top_k)
    weights = [sigmoids[e] for e in ids]
    total = math.fsum(map(float, weights))
    if routing.method in BIASED:
        weights = [float(w) * routing.scale / (total + 1e-20) for w in weights]
    elif routing.method == M.SigmoidRenorm and routing.norm_topk_prob:
        weights = [float(w) / max(total, 1e-20) for w in weights]
    return ids, weights, scores


def assert_scalar(logits, routing, bias=None):
    result = route(logits, routing, bias)
    bias_row = None if bias is None else bias.float().numpy()
    assert result.ids.dtype == torch.int32 and result.ids.shape == (len(logits), routing.top_k)
    assert result.weights.dtype == torch.float32 and result.weights.shape == result.ids.shape
    assert result.scores.dtype == torch.float32 and result.scores.shape == logits.shape
    for t, row in enumerate(logits.float().numpy()):
        ids, weights, scores = scalar_route(row, routing, bias_row)
        assert result.ids[t].tolist() == ids, f"token {t}"
        # Up to 32 fp32 additions and two more roundings; Default's E at most 64.
        np.testing.assert_allclose(result.weights[t].numpy(), weights, rtol=1e-6, atol=0)
        exact = routing.method != M.Default
        np.testing.assert_allclose(result.scores[t], scores, rtol=0 if exact else 1e-6, atol=0)


def same(a, b):
    for x, y in zip(a, b, strict=True):
        assert torch.equal(x, y)
