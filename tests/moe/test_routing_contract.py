"""Inputs and outputs of routing: packed ids, shared experts, errors, limits, FlashInfer's traces."""

# SPDX-License-Identifier: Apache-2.0
import dataclasses
import math
import struct

import hypothesis
import hypothesis.strategies as st
import pytest
import torch
from routing_cases import BIASED, GROUPED, M, bias_of, each_dtype, logits_of, name, same

from nvfp4_moe.reference.moe.routing import (
    Routing,
    RoutingResult,
    append_shared_experts,
    pack_topk,
    refusal,
    route,
    unpack_topk,
)

# Packed ids


def test_packed_bits():
    ids = torch.tensor([[0, 0, 5, 32767, -1]], dtype=torch.int32)
    weights = torch.tensor([[-1.0, 1.0, -2.0, -0.0, 0.5]])
    packed = pack_topk(ids, weights)
    assert packed.dtype == torch.int32
    expected = [0x0000BF80, 0x00003F80, 0x0005C000, 0x7FFF8000, 0xFFFF3F00 - 2**32]
    assert packed.tolist() == [expected]
    # The struct of the kernels, little-endian: the score's two bytes, then the index's.
    assert struct.unpack("<Hh", struct.pack("<i", packed[0, 2])) == (0xC000, 5)


def test_packing_rounds_fp32_weights_to_nearest_even():
    weights = torch.tensor([[1.0 + 2.0**-8, 1.0 + 3 * 2.0**-8]])
    packed = pack_topk(torch.zeros(1, 2, dtype=torch.int64), weights)
    assert packed.tolist() == [[0x3F80, 0x3F82]]


@hypothesis.given(
    st.lists(st.tuples(st.integers(-1, 32767), st.integers(0, 0xFFFF)), min_size=1, max_size=8)
)
def test_packed_round_trip(pairs):
    ids = torch.tensor([[i for i, _ in pairs]], dtype=torch.int32)
    bits = torch.tensor([[b - (b >> 15 << 16) for _, b in pairs]], dtype=torch.int16)
    packed = pack_topk(ids, bits.view(torch.bfloat16))
    assert packed.tolist() == [[(i << 16) | b for i, b in pairs]]
    unpacked_ids, unpacked_weights = unpack_topk(packed)
    assert torch.equal(unpacked_ids, ids) and unpacked_ids.dtype == torch.int32
    assert torch.equal(unpacked_weights.view(torch.int16), bits)  # as bits: NaN among them


# Shared experts


def test_shared_experts_follow_with_weight_one():
    logits = logits_of(5, 16)
    result = route(logits, GROUPED, bias_of(16))
    ids, weights, scores = append_shared_experts(result, 2, 16)
    assert ids.dtype == torch.int32 and weights.dtype == torch.float32
    assert torch.equal(ids[:, :4], result.ids) and torch.equal(weights[:, :4], result.weights)
    assert ids[:, 4:].tolist() == [[16, 17]] * 5
    assert weights[:, 4:].tolist() == [[1.0, 1.0]] * 5  # not 2.5
    assert torch.equal(scores, result.scores)
    same(append_shared_experts(result, 0, 16), result)


# Errors and limits


@pytest.mark.parametrize(
    "fields,message",
    [
        ({"method": 10}, "method is 10; it must be one of Default, .*, TopKSigmoid$"),
        ({"method": "TopK"}, "method is 'TopK'"),
        ({"top_k": 0}, "top_k is 0"),
        ({"top_k": 2.0}, "top_k is 2.0"),
        ({"n_group": 2}, "n_group is 2; it must be None, 0 or 1 with Renormalize"),
        ({"method": 7, "n_group": 2, "topk_group": 1}, "n_group is 2; .*with MiniMax2"),
        ({"method": 2, "n_group": -1}, "n_group is -1; it must be an integer of at least 0"),
        ({"method": 2, "n_group": 4}, "topk_group is None; it must be from 1 to n_group, 4"),
        ({"method": 2, "n_group": 4, "topk_group": 5}, "topk_group is 5; it must be from 1 to"),
        ({"method": 2, "topk_group": 2}, "topk_group is 2; it must be None, 0 or 1 without groups"),
        ({"routed_scaling_factor": 2.5}, "factor is 2.5; it must be None or 1 with Renorm"),
        ({"method": 2, "routed_scaling_factor": math.inf}, "routed_scaling_factor is inf"),
    ],
)
def test_wrong_fields(fields, message):
    with pytest.raises((TypeError, ValueError), match=message):
        Routing(**{"method": M.Renormalize, "top_k": 2, **fields})


def test_fields_that_change_nothing_are_accepted():
    routing = Routing(1, 2, n_group=0, topk_group=0, routed_scaling_factor=1.0)
    assert routing.method is M.Renormalize and not routing.grouped
    assert hash(routing) == hash(Routing(M.Renormalize, 2, 0, 0, 1.0))


@pytest.mark.parametrize(
    "logits,routing,bias,message",
    [
        (torch.zeros(4), Routing(0, 1), None, r"logits is float32 \[4\]"),
        (torch.zeros(1, 4).half(), Routing(0, 1), None, "logits is float16"),
        (torch.zeros(1, 4), Routing(0, 5), None, "top_k is 5; it must be at most 4"),
        (torch.zeros(1, 4), Routing(1, 1), torch.zeros(4), "bias is .*None with Renormalize"),
        (torch.zeros(1, 4), Routing(2, 1), torch.zeros(5), r"bias is float32 \[5\]"),
        (torch.zeros(1, 4), Routing(2, 1), torch.zeros(1, 4), r"bias is float32 \[1, 4\]"),
        (torch.zeros(1, 4), Routing(2, 1), torch.zeros(4).half(), "bias is float16"),
        (torch.zeros(1, 10), GROUPED, None, "n_group is 4; 10 experts must divide"),
        (torch.zeros(1, 4), Routing(2, 1, 4, 1), None, "n_group is 4; 4 experts must divide"),
        (torch.zeros(1, 8), Routing(2, 5, 2, 1), None, "the 1 chosen groups have only 4 experts"),
    ],
)
def test_wrong_tensors(logits, routing, bias, message):
    with pytest.raises(ValueError, match=message):
        route(logits, routing, bias)


@pytest.mark.parametrize(
    "call,message",
    [
        (lambda i, w: pack_topk(i.float(), w), "ids is torch.float32"),
        (lambda i, w: pack_topk(i, w.half()), "weights is torch.float16"),
        (lambda i, w: pack_topk(i, w[:, :1]), r"weights has shape \(2, 1\)"),
        (lambda i, w: unpack_topk(i.long()), "packed is torch.int64"),
        (lambda i, w: append_shared_experts(RoutingResult(i, w, w), -1, 3), "num_shared is -1"),
        (lambda i, w: append_shared_experts(RoutingResult(i, w, w), 1, 4), "num_experts is 4"),
    ],
)
def test_wrong_pairs(call, message):
    with pytest.raises(ValueError, match=message):
        call(torch.zeros(2, 3, dtype=torch.int32), torch.zeros(2, 3))


GROUPS = Routing(M.DeepSeekV3, 8, n_group=8, topk_group=4)


@pytest.mark.parametrize(
    "methods,experts,top_k",
    [
        ((M.Default, M.TopK, M.SigmoidRenorm, M.Sigmoid, M.TopKSigmoid), 256, 8),
        ((M.Renormalize, M.RenormalizeNaive), 2048, 32),
        ((M.DeepSeekV3, M.MiniMax2), 1024, 32),
        ((M.Llama4,), 128, 1),
    ],
)
def test_limits_without_groups(methods, experts, top_k):
    for method in methods:
        assert refusal(Routing(method, top_k), experts) is None
        assert refusal(Routing(method, 1), 1) is None
        beyond = f"up to {experts} experts, not {experts + 1}"
        assert beyond in refusal(Routing(method, 1), experts + 1)
        assert f"up to {top_k}, not" in refusal(Routing(method, top_k + 1), experts)
        assert refusal(Routing(method, 2), 1) == "top_k is 2, more than the 1 experts"


@pytest.mark.parametrize("change,experts", [({}, 256), ({}, 32), ({"top_k": 22}, 48)])
def test_groups_within_the_limits(change, experts):
    assert refusal(dataclasses.replace(GROUPS, **change), experts) is None


@pytest.mark.parametrize(
    "change,experts,message",
    [
        ({"top_k": 4}, 2, "top_k is 4, more than"),
        ({"top_k": 23}, 256, "top_k is 23"),
        ({"topk_group": 5}, 256, "topk_group is 5"),
        ({"n_group": 16}, 512, "n_group is 16"),
        ({}, 512, "experts in a group is 64"),
        ({"n_group": 7}, 7 * 6, "multiple of 4"),
        ({}, 250, "n_group is 8; 250 experts must divide"),
        ({"topk_group": 1, "top_k": 9}, 64, "top_k is 9; the 1 chosen groups have only 8"),
    ],
)
def test_limits_of_groups(change, experts, message):
    reason = refusal(dataclasses.replace(GROUPS, **change), experts)
    assert reason is not None and message in reason


@pytest.mark.parametrize("method", BIASED, ids=lambda m: m.name)
def test_a_missing_bias_is_refused_without_groups(method):
    assert "bias" in refusal(Routing(method, 8), 256, has_bias=False)
    assert refusal(GROUPS, 256, has_bias=False) is None
    assert refusal(Routing(M.TopK, 8), 256, has_bias=False) is None


# FlashInfer's own CPU references. Where they and the kernels' source disagree, and we follow the
# source, the comparison stays away:
# - Default, Renormalize, RenormalizeNaive, Llama4 and TopK add routing_bias to the logits and
#   multiply the weights by routed_scaling_factor; the kernels read neither. None is passed here.
# - TopK has uniform weights 1 / K; the kernels return the logits. Only ids are compared.
# - DeepSeekV3 adds an fp32 bias; the kernel rounds it to bf16. The bias here is exact in bf16.
# - Logits become fp32 before they are compared, which for bf16 changes nothing; torch.topk breaks
#   ties in any way, so that there are none here; the K experts come in any order.
# - sigmoid is 1 / (1 + exp(-x)); the difference is in the last bits.
# There is none for SigmoidRenorm, MiniMax2, Sigmoid and TopKSigmoid.
TRACES = {
    M.Default: "default",
    M.Renormalize: "renormalize",
    M.DeepSeekV3: "ds",
    M.Llama4: "llama4",
    M.RenormalizeNaive: "renormalize_naive",
    M.TopK: "topk",
}


def trace_route(monkeypatch, logits, routing, bias, num_shared=0):
    """(ids, weights) that the trace reference hands to its experts, sorted by id."""
    trace = pytest.importorskip("flashinfer.trace.templates.moe", reason="needs flashinfer-python")
    reference = getattr(
        trace, f"_trtllm_fp4_block_scale_moe_{TRACES[routing.method]}_routing_reference"
    )
    monkeypatch.setattr(trace, "_fp4_moe_run_experts", lambda *args, **kwargs: args[8:10])
    arguments = {"top_k": routing.top_k, "local_expert_offset": 0}
    if routing.method == M.DeepSeekV3:
        arguments |= {"n_group": routing.n_group or 1, "topk_group": routing.topk_group or 1}
        arguments |= {"num_fused_shared_experts": num_shared}
    tensors = dict.fromkeys(
        (
            "hidden_states",
            "hidden_states_scale",
            "gemm1_weights",
            "gemm1_weights_scale",
            "gemm1_bias",
            "gemm2_weights",
            "gemm2_weights_scale",
            "gemm2_bias",
        )
    )
    weights, ids = reference(
        logits, bias, routed_scaling_factor=routing.routed_scaling_factor, **tensors, **arguments
    )
    return by_id(ids.int(), weights)


def by_id(ids, weights):
    order = ids.argsort(dim=1)
    return ids.gather(1, order), weights.gather(1, order)


@each_dtype
@pytest.mark.parametrize(
    "routing",
    [
        *(Routing(m, 1 if m == M.Llama4 else 6) for m in TRACES),
        Routing(M.DeepSeekV3, 8, n_group=8, topk_group=4, routed_scaling_factor=2.5),
        Routing(M.DeepSeekV3, 3, n_group=4, topk_group=1),
    ],
    ids=name,
)
def test_against_the_trace_references(monkeypatch, routing, dtype):
    # 64 distinct logits a row, the same in both types.
    generator = torch.Generator().manual_seed(0)
    logits = torch.stack([torch.randperm(64, generator=generator) for _ in range(50)])
    logits = (logits.float() / 8 - 4).to(dtype)
    bias = bias_of(64).bfloat16().float() if routing.method == M.DeepSeekV3 else None
    ids, weights = trace_route(monkeypatch, logits, routing, bias)
    result = route(logits, routing, bias)
    our_ids, our_weights = by_id(result.ids, result.weights)
    assert torch.equal(our_ids, ids)
    if routing.method != M.TopK:
        # Two formulations of fp32 sigmoid: 2^-24 absolute on scores of 0.018 and more.
        torch.testing.assert_close(our_weights, weights, rtol=1e-5, atol=0)


def test_shared_experts_against_the_trace_reference(monkeypatch):
    logits, bias = logits_of(20, 64), bias_of(64).bfloat16().float()
    routing = Routing(M.DeepSeekV3, 8, n_group=8, topk_group=4, routed_scaling_factor=2.5)
    ids, weights = trace_route(monkeypatch, logits, routing, bias, num_shared=2)
    shared = append_shared_experts(route(logits, routing, bias), 2, 64)
    our_ids, our_weights = by_id(shared.ids, shared.weights)
    assert torch.equal(our_ids, ids)
    torch.testing.assert_close(our_weights, weights, rtol=1e-4, atol=0)
    assert shared.ids[:, -2:].tolist() == [[64, 65]] * 20


def test_the_names_and_values_are_flashinfers():
    enums = pytest.importorskip("flashinfer.tllm_enums", reason="needs flashinfer-python")
    theirs = {m.name: int(m) for m in enums.RoutingMethodType}
    assert {m.name: int(m) for m in M} == theirs
    assert Routing(enums.RoutingMethodType.TopK, 1).method is M.TopK
