"""Routing against a formulation for one token in plain Python, and against FlashInfer's references."""

# SPDX-License-Identifier: Apache-2.0
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from nvfp4_moe.reference.routing import (
    Routing,
    RoutingMethodType,
    pack_topk,
    refusal,
    route,
    unpack_topk,
)

M = RoutingMethodType
BIASED = (M.DeepSeekV3, M.MiniMax2)


def one_token(logits, r, bias):
    """(ids, weights) of one row, in double precision."""
    sig = [1 / (1 + math.exp(-x)) for x in logits]
    e = range(len(logits))
    if r.method in BIASED:
        score = [s + b for s, b in zip(sig, bias, strict=True)]
        allowed = set(e)
        if r.grouped:
            size = len(logits) // r.n_group
            sums = [sum(sorted(score[g * size :][:size])[-2:]) for g in range(r.n_group)]
            best = sorted(range(r.n_group), key=lambda g: (-sums[g], g))[: r.topk_group]
            allowed = {i for g in best for i in range(g * size, g * size + size)}
    elif r.method == M.Default:
        top = max(logits)
        exp = [math.exp(x - top) for x in logits]
        score, allowed = [x / sum(exp) for x in exp], set(e)
    elif r.method in (M.Sigmoid, M.SigmoidRenorm):
        score, allowed = sig, set(e)
    else:
        score, allowed = list(logits), set(e)
    ids = sorted(allowed, key=lambda i: (-score[i], i))[: r.top_k]
    if r.method in BIASED:
        total = sum(sig[i] for i in ids) + 1e-20
        return ids, [sig[i] * (r.routed_scaling_factor or 1.0) / total for i in ids]
    if r.method in (M.Renormalize, M.RenormalizeNaive):
        exp = [math.exp(logits[i] - logits[ids[0]]) for i in ids]
        return ids, [x / sum(exp) for x in exp]
    if r.method in (M.Llama4, M.TopKSigmoid):
        return ids, [sig[i] for i in ids]
    if r.method == M.SigmoidRenorm and r.norm_topk_prob:
        return ids, [sig[i] / sum(sig[j] for j in ids) for i in ids]
    return ids, [score[i] for i in ids]


ROUTINGS = [
    *(Routing(m, 1 if m == M.Llama4 else 4) for m in M if m != M.Unspecified),
    Routing(M.DeepSeekV3, 4, 4, 2, 2.5),
    Routing(M.DeepSeekV3, 6, 2, 1, 1.5),
    Routing(M.MiniMax2, 3, routed_scaling_factor=0.5),
    Routing(M.SigmoidRenorm, 4, norm_topk_prob=False),
    Routing(M.Renormalize, 16),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("routing", ROUTINGS, ids=str)
def test_one_token_at_a_time(routing, dtype):
    g = torch.Generator().manual_seed(1)
    logits = (torch.randn(40, 16, generator=g) * 2).to(dtype)
    bias = (torch.randn(16, generator=g) / 3).bfloat16() if routing.method in BIASED else None
    r = route(logits, routing, bias)
    assert r.ids.dtype == torch.int32
    for t in range(40):
        given_bias = [0.0] * 16 if bias is None else bias.tolist()
        ids, weights = one_token(logits[t].tolist(), routing, given_bias)
        assert r.ids[t].tolist() == ids
        torch.testing.assert_close(r.weights[t], torch.tensor(weights), rtol=2e-6, atol=1e-7)


@pytest.mark.parametrize("routing", ROUTINGS, ids=str)
def test_ties_go_to_the_smaller_index(routing):
    logits = torch.zeros(3, 16)
    logits[1, 5] = logits[1, 11] = 1.0
    r = route(logits, routing)
    k = routing.top_k
    assert r.ids[0].tolist() == list(range(k))
    if not routing.grouped:
        assert r.ids[1].tolist() == ([5, 11] + [i for i in range(16) if i not in (5, 11)])[:k]


def test_tied_sigmoids_of_different_logits():
    logits = torch.tensor([[30.0, 40.0, 35.0, 0.0]])  # their fp32 sigmoids are all 1
    assert route(logits, Routing(M.Sigmoid, 2)).ids.tolist() == [[0, 1]]
    assert route(logits, Routing(M.TopKSigmoid, 2)).ids.tolist() == [[1, 2]]


def test_bias_chooses_and_does_not_weigh():
    logits, bias = torch.tensor([[1.0, 0.0, -1.0, 0.5]]), torch.tensor([0.0, 0.0, 5.0, 0.0])
    r = route(logits, Routing(M.DeepSeekV3, 2), bias)
    assert r.ids.tolist() == [[2, 0]]
    s = torch.sigmoid(logits[0, [2, 0]])
    torch.testing.assert_close(r.weights[0], s / s.sum())


def test_the_grouped_kernel_reads_its_bias_in_bf16():
    logits = torch.zeros(1, 8)
    bias = torch.tensor([0.0, 1.001, 1.0, 0, 0, 0, 0, 0])  # one bf16 value
    assert route(logits, Routing(M.DeepSeekV3, 1, 2, 1), bias).ids.tolist() == [[1]]
    bias = torch.tensor([0.0, 1.0, 1.001, 0, 0, 0, 0, 0])
    assert route(logits, Routing(M.DeepSeekV3, 1, 2, 1), bias).ids.tolist() == [[1]]
    assert route(logits, Routing(M.DeepSeekV3, 1), bias).ids.tolist() == [[2]]


@given(st.integers(0, 2**32 - 1))
@settings(max_examples=25, deadline=None)
def test_tokens_are_independent(seed):
    g = torch.Generator().manual_seed(seed)
    logits = torch.randn(6, 16, generator=g)
    for routing in ROUTINGS:
        whole, order = route(logits, routing), torch.randperm(6, generator=g)
        part = route(logits[order], routing)
        assert torch.equal(whole.ids[order], part.ids)
        assert torch.equal(whole.weights[order], part.weights)


def test_packed():
    ids = torch.tensor([[0, 1], [255, 32767]], dtype=torch.int32)
    weights = torch.tensor([[0.5, -1.25], [0.0, -0.0]]).bfloat16()
    packed = pack_topk(ids, weights)
    assert packed[0, 1].item() == (1 << 16) | 0xBFA0
    back = unpack_topk(packed)
    assert torch.equal(back[0], ids)
    assert torch.equal(back[1].view(torch.int16), weights.view(torch.int16))


def test_no_tokens():
    for routing in ROUTINGS:
        r = route(torch.zeros(0, 16), routing)
        assert r.ids.shape == r.weights.shape == (0, routing.top_k)


def test_limits_of_flashinfer():
    assert refusal(Routing(M.Default, 8), 256) is None
    assert "top_k up to 8, not 9" in refusal(Routing(M.Default, 9), 256)
    assert "up to 2048 experts" in refusal(Routing(M.Renormalize, 8), 2049)
    assert refusal(Routing(M.DeepSeekV3, 8, 8, 4), 256) is None
    assert "topk_group is 5" in refusal(Routing(M.DeepSeekV3, 8, 8, 5), 256)
    assert "up to 128 experts" in refusal(Routing(M.Llama4, 1), 129)
    assert "top_k up to 1" in refusal(Routing(M.Llama4, 2), 128)
    assert "reads a bias" in refusal(Routing(M.MiniMax2, 2), 128, has_bias=False)


@pytest.mark.parametrize(
    "make,message",
    [
        (lambda: Routing(M.Unspecified, 1), "method is .*Unspecified"),
        (lambda: Routing(M.Default, 0), "top_k is 0"),
        (lambda: Routing(M.Default, 2, 4, 2), "n_group is 4"),
        (lambda: Routing(M.DeepSeekV3, 2, 4, 5), "topk_group is 5"),
        (lambda: route(torch.zeros(1, 4), Routing(M.Default, 5)), "top_k is 5"),
        (lambda: route(torch.zeros(1, 6), Routing(M.DeepSeekV3, 2, 4, 2)), "n_group is 4"),
        (
            lambda: route(torch.zeros(1, 8), Routing(M.DeepSeekV3, 5, 4, 2)),
            "top_k is 5; the 2 chosen groups",
        ),
        (
            lambda: route(torch.zeros(1, 4), Routing(M.Default, 1), torch.zeros(4)),
            "bias is given; Default",
        ),
    ],
)
def test_errors(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_the_enum_is_flashinfers():
    enums = pytest.importorskip("flashinfer.tllm_enums", reason="needs flashinfer-python")
    theirs = {name: int(v) for name, v in enums.RoutingMethodType.__members__.items()}
    assert {m.name: int(m) for m in M} == theirs


TRACED = {
    M.Default: "default",
    M.Renormalize: "renormalize",
    M.DeepSeekV3: "ds",
    M.Llama4: "llama4",
    M.RenormalizeNaive: "renormalize_naive",
}


@pytest.mark.parametrize("method", TRACED, ids=lambda m: m.name)
def test_same_ids_and_weights_as_flashinfers_trace_references(method, monkeypatch):
    """Their routing, caught on its way to the experts; logits without ties, where they agree."""
    moe = pytest.importorskip("flashinfer.trace.templates.moe", reason="needs flashinfer-python")
    caught = {}

    def catch(*args, **kwargs):
        caught["weights"], caught["ids"] = args[8], args[9]

    monkeypatch.setattr(moe, "_fp4_moe_run_experts", catch)
    g = torch.Generator().manual_seed(4)
    logits = torch.randperm(20 * 32, generator=g).reshape(20, 32).float() / 100 - 3
    k = 1 if method == M.Llama4 else 4
    routing, extra, bias = Routing(method, k), {}, None
    if method == M.DeepSeekV3:
        routing = Routing(method, k, 8, 4, 2.5)
        extra, bias = {"n_group": 8, "topk_group": 4}, torch.zeros(32)
    function = getattr(moe, f"_trtllm_fp4_block_scale_moe_{TRACED[method]}_routing_reference")
    given = {
        "routing_logits": logits, "routing_bias": bias, "top_k": k, "local_expert_offset": 0,
        "routed_scaling_factor": routing.routed_scaling_factor, **extra,
    }  # fmt: skip
    for name in (
        "hidden_states", "hidden_states_scale", "gemm1_weights", "gemm1_weights_scale", "gemm1_bias",
        "gemm2_weights", "gemm2_weights_scale", "gemm2_bias",
    ):  # fmt: skip
        given.setdefault(name, torch.zeros(20, 1))
    function(**given)
    mine = route(logits, routing, bias)
    order, theirs = mine.ids.long().argsort(1), caught["ids"].long().argsort(1)
    assert torch.equal(mine.ids.long().gather(1, order), caught["ids"].long().gather(1, theirs))
    torch.testing.assert_close(
        mine.weights.gather(1, order), caught["weights"].float().gather(1, theirs)
    )
