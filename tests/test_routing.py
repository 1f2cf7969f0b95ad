"""The routing methods against a scalar formulation, exact ties, and FlashInfer's trace references."""

# SPDX-License-Identifier: Apache-2.0
import dataclasses
import math
import struct

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from nvfp4_moe.reference.routing import (
    Routing,
    RoutingMethodType,
    RoutingResult,
    append_shared_experts,
    pack_topk,
    refusal,
    route,
    unpack_topk,
)
from torch._subclasses.fake_tensor import FakeTensorMode

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


@each_dtype
@variants
def test_against_the_scalar_formulation(routing, dtype):
    with_bias = [None]
    if routing.method in BIASED:
        with_bias += [bias_of(16), bias_of(16, torch.bfloat16)]
    for bias in with_bias:
        # bf16 logits of so few values tie often.
        assert_scalar(logits_of(40, 16, dtype=dtype), routing, bias)


@pytest.mark.parametrize("experts,k", [(5, 5), (33, 2), (64, 32), (60, 9)])
@each_method
def test_odd_sizes(method, experts, k):
    bias = bias_of(experts) if method in BIASED else None
    assert_scalar(logits_of(4, experts), Routing(method, k), bias)


@each_method
def test_the_largest_size(method):
    logits = logits_of(3, 2048)
    result = route(logits, Routing(method, 32))
    # Distinct scores: any correct top-k of the returned scores must agree.
    top = result.scores.topk(33, dim=1)
    distinct = (top.values.diff() != 0).all(1)
    assert distinct.any() and torch.equal(top.indices[distinct, :32].int(), result.ids[distinct])


# Ties


@each_dtype
@variants
def test_equal_logits_go_to_the_smallest_indices(routing, dtype):
    logits = torch.full((3, 64), 0.75, dtype=dtype)
    assert ids_of(logits, routing) == [list(range(routing.top_k))] * 3


@each_method
def test_ties_inside_the_list_and_at_its_end(method):
    logits = torch.zeros(1, 256)
    logits[0, [200, 100, 7]] = 2.0
    logits[0, [250, 50, 30]] = 1.0
    assert ids_of(logits, Routing(method, 8)) == [[7, 100, 200, 30, 50, 250, 0, 1]]


@pytest.mark.parametrize("method", RAW, ids=lambda m: m.name)
def test_raw_logits_tie_in_their_own_dtype(method):
    logits = torch.tensor([[0.0, 1.0, 1.0 + 2.0**-10, 1.0 + 2.0**-9]])
    assert len(logits.bfloat16().unique()) == 2
    assert ids_of(logits, Routing(method, 3)) == [[3, 2, 1]]
    assert ids_of(logits.bfloat16(), Routing(method, 3)) == [[1, 2, 3]]


@pytest.mark.parametrize("method", RAW, ids=lambda m: m.name)
def test_raw_zeros_are_ordered_by_sign(method):
    logits = torch.tensor([[-1.0, -0.0, 0.0, -0.0, 0.0]])
    assert ids_of(logits, Routing(method, 4)) == [[2, 4, 1, 3]]
    assert ids_of(logits.bfloat16(), Routing(method, 4)) == [[2, 4, 1, 3]]


@pytest.mark.parametrize("method", [M.Default, *SIGMOID], ids=lambda m: m.name)
def test_scores_of_both_zeros_tie(method):
    assert ids_of(torch.tensor([[-1.0, -0.0, 0.0]]), Routing(method, 2)) == [[1, 2]]


@pytest.mark.parametrize("method", SIGMOID, ids=lambda m: m.name)
def test_saturated_sigmoids_tie(method):
    logits = torch.tensor([[-50.0, -20.0, 30.0, 40.0]])
    result = route(logits, Routing(method, 4))
    assert result.ids.tolist() == [[2, 3, 0, 1]]
    assert result.scores.tolist() == [[0.0, 0.0, 1.0, 1.0]]


def test_topk_sigmoid_ranks_what_sigmoid_saturates():
    result = route(torch.tensor([[-50.0, -20.0, 30.0, 40.0]]), Routing(M.TopKSigmoid, 4))
    assert result.ids.tolist() == [[3, 2, 1, 0]]
    assert result.weights.tolist() == [[1.0, 1.0, 0.0, 0.0]]


def test_equal_groups_go_to_the_smallest_indices():
    logits = torch.zeros(1, 32)
    logits[0, 24:26] = 1.0  # the last of four groups is the best; the others tie
    routing = dataclasses.replace(GROUPED, top_k=6)
    assert ids_of(logits, routing) == [[24, 25, 0, 1, 2, 3]]


# Special values


@each_dtype
def test_nan_is_ranked_by_its_sign(dtype):
    positive = torch.tensor([[1.0, math.nan, math.inf, 4.0, -math.inf]], dtype=dtype)
    negative = torch.where(positive.isnan(), torch.copysign(positive, -positive[:, :1]), positive)
    for method in (M.Renormalize, M.TopK, M.TopKSigmoid):
        assert ids_of(positive, Routing(method, 5)) == [[1, 2, 3, 0, 4]]
        assert ids_of(negative, Routing(method, 5)) == [[2, 3, 0, 4, 1]]
    for method in SIGMOID:  # the sign is lost: a GPU's arithmetic returns the positive NaN
        assert ids_of(positive, Routing(method, 5)) == [[1, 2, 3, 0, 4]]
        assert ids_of(negative, Routing(method, 5)) == [[1, 2, 3, 0, 4]]


def test_nan_spreads_as_far_as_the_sums():
    logits = torch.tensor([[1.0, math.nan, 3.0]])
    assert route(logits, Routing(M.Default, 2)).ids.tolist() == [[0, 1]]  # all NaN: a tie
    for method in (M.Default, M.Renormalize, M.DeepSeekV3, M.MiniMax2):
        assert route(logits, Routing(method, 2)).weights.isnan().all(), method.name
    for method in (M.TopK, M.TopKSigmoid, M.Sigmoid):
        assert route(logits, Routing(method, 2)).weights.isnan().tolist() == [[True, False]]
    # SigmoidRenorm's fmaxf turns a NaN sum into 1e-20.
    weights = route(logits, Routing(M.SigmoidRenorm, 2)).weights
    assert weights.isnan().tolist() == [[True, False]] and weights[0, 1] > 1e19


def test_llama4_skips_nan():
    logits = torch.tensor([[math.nan, 1.0, 2.0], [math.nan] * 3, [-math.inf] * 3])
    result = route(logits, Routing(M.Llama4, 1))
    assert result.ids.tolist() == [[2], [0], [0]]
    assert result.weights[1:].tolist() == [[0.0], [0.0]]


def test_nan_in_a_group_makes_it_the_first():
    logits = logits_of(1, 32)
    logits[0, 29] = math.nan
    result = route(logits, GROUPED, bias_of(32))
    assert result.ids[0, 0] == 29 and result.weights.isnan().all()


def test_infinite_logits():
    logits = torch.tensor([[-math.inf, math.inf, 0.0]])
    assert route(logits, Routing(M.Sigmoid, 3)).weights.tolist() == [[1.0, 0.5, 0.0]]
    assert route(logits, Routing(M.Renormalize, 2)).weights.isnan().all()
    assert route(logits[:, ::2], Routing(M.Renormalize, 2)).weights.tolist() == [[1.0, 0.0]]


@pytest.mark.parametrize("method", BIASED, ids=lambda m: m.name)
def test_all_sigmoids_zero(method):
    result = route(torch.full((1, 4), -200.0), Routing(method, 2))
    assert result.weights.tolist() == [[0.0, 0.0]]  # 1e-20 keeps it from 0 / 0


# Bias, groups, scale, norm


@pytest.mark.parametrize("method", BIASED, ids=lambda m: m.name)
def test_bias_selects_and_stays_out_of_the_weights(method):
    logits = torch.tensor([[0.0, 3.0, -8.0, 1.0]])
    bias = torch.tensor([0.0, 0.0, 1e8, 0.0])  # in which the sigmoid is lost altogether
    result = route(logits, Routing(method, 2), bias)
    assert result.ids.tolist() == [[2, 1]]
    small, large = 1 / (1 + math.exp(8)), 1 / (1 + math.exp(-3))
    expected = [small / (small + large), large / (small + large)]
    # tanh(-4) is near -1, so that the small sigmoid has an absolute error of 2^-25.
    np.testing.assert_allclose(result.weights[0].numpy(), expected, rtol=1e-4)
    assert result.scores[0, 2] == 1e8


def test_bias_is_bf16_with_groups_only():
    logits = torch.zeros(1, 8)
    bias = torch.full((8,), 1.0)
    bias[6] = 1 + 2.0**-10
    grouped = Routing(M.DeepSeekV3, 2, n_group=2, topk_group=1)
    assert ids_of(logits, grouped, bias) == [[0, 1]]  # 1 + 2^-10 is 1 in bf16
    assert ids_of(logits, Routing(M.DeepSeekV3, 2), bias) == [[6, 0]]
    assert ids_of(logits, Routing(M.MiniMax2, 2), bias) == [[6, 0]]
    bias[6] = 1 + 2.0**-7
    assert ids_of(logits, grouped, bias) == [[6, 4]]


def test_groups_are_chosen_by_their_two_best():
    # Groups of 4: the best expert is in group 0, the best two in 2, the best three in 1.
    rows = [[9.0, -9, -9, -9], [0.5, 0.5, 0.5, 0.5], [1.0, 1.0, -9, -9], [0.0, 0.0, 0.0, 0.0]]
    logits = torch.tensor(rows).reshape(1, 16)
    routing = Routing(M.DeepSeekV3, 4, n_group=4, topk_group=1)
    assert ids_of(logits, routing) == [[8, 9, 10, 11]]
    routing = dataclasses.replace(routing, topk_group=2)
    assert ids_of(logits, routing) == [[8, 9, 4, 5]]
    routing = dataclasses.replace(routing, topk_group=4)
    assert ids_of(logits, routing) == [[0, 8, 9, 4]]


def test_the_last_group_and_its_border():
    logits = torch.full((1, 12), -1.0)
    logits[0, 8:] = 1.0
    routing = Routing(M.DeepSeekV3, 4, n_group=3, topk_group=1)
    assert ids_of(logits, routing) == [[8, 9, 10, 11]]
    logits[0, 7] = 5.0  # in the group before
    assert ids_of(logits, routing) == [[8, 9, 10, 11]]


def test_a_chosen_group_precedes_others_even_at_minus_infinity():
    bias = torch.zeros(8)
    bias[6:] = -math.inf
    logits = torch.tensor([[0.0, 0.0, 0.0, 0.0, 2.0, 2.0, 2.0, 2.0]])
    routing = Routing(M.DeepSeekV3, 3, n_group=2, topk_group=1)
    assert ids_of(logits, routing, bias) == [[4, 5, 6]]


def test_no_groups_however_it_is_said():
    logits, bias = logits_of(9, 16), bias_of(16)
    results = [
        route(logits, Routing(M.DeepSeekV3, 4, n, k), bias)
        for n, k in ((None, None), (0, 0), (1, 1), (None, 1))
    ] + [route(logits, Routing(M.MiniMax2, 4), bias)]
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(result, results[0], strict=True))


@pytest.mark.parametrize("method", BIASED, ids=lambda m: m.name)
def test_scale_multiplies_the_weights(method):
    logits, bias = logits_of(9, 16), bias_of(16)
    one = route(logits, Routing(method, 4), bias)
    four = route(logits, Routing(method, 4, routed_scaling_factor=4.0), bias)
    assert torch.equal(four.weights, 4 * one.weights) and torch.equal(four.ids, one.ids)
    torch.testing.assert_close(one.weights.sum(1), torch.ones(9))


def test_norm_topk_prob():
    logits = logits_of(9, 16)
    plain = route(logits, Routing(M.Sigmoid, 4)).weights
    off = route(logits, Routing(M.SigmoidRenorm, 4, norm_topk_prob=False)).weights
    on = route(logits, Routing(M.SigmoidRenorm, 4)).weights
    assert torch.equal(off, plain)
    torch.testing.assert_close(on, plain / plain.sum(1, keepdim=True))
    assert not torch.equal(on, off)


def test_softmax_before_and_after_top_k():
    logits = torch.tensor([[0.0, math.log(2.0), math.log(5.0)]])
    torch.testing.assert_close(
        route(logits, Routing(M.Default, 2)).weights, torch.tensor([[5 / 8, 2 / 8]])
    )
    torch.testing.assert_close(
        route(logits, Routing(M.Renormalize, 2)).weights, torch.tensor([[5 / 7, 2 / 7]])
    )


def test_renormalize_naive_is_renormalize():
    logits = logits_of(9, 64, scale=20.0)
    a, b = (route(logits, Routing(m, 8)) for m in (M.Renormalize, M.RenormalizeNaive))
    assert torch.equal(a.ids, b.ids) and torch.equal(a.weights, b.weights)


def test_weights_bf16():
    weights = torch.tensor([[1.0 + 2.0**-8, 1.0 + 3 * 2.0**-8, -0.1]])
    result = RoutingResult(torch.zeros(1, 3, dtype=torch.int32), weights, weights)
    expected = [[float(to_bf16(w)) for w in weights[0].tolist()]]
    assert result.weights_bf16.dtype == torch.bfloat16
    assert result.weights_bf16.tolist() == expected


# Whole batches


@variants
def test_no_tokens(routing):
    result = route(torch.empty(0, 16), routing)
    assert result.ids.shape == result.weights.shape == (0, routing.top_k)
    assert result.scores.shape == (0, 16)
    assert result.ids.dtype == torch.int32 and result.weights_bf16.dtype == torch.bfloat16
    assert append_shared_experts(result, 2, 16).ids.shape == (0, routing.top_k + 2)
    assert pack_topk(result.ids, result.weights).shape == (0, routing.top_k)


@variants
def test_no_values_are_read_on_the_host(routing):
    """A fake tensor has no values, so that .item() or a shape made from data would raise."""
    with FakeTensorMode():
        result = route(torch.empty(7, 16), routing)
        ids, weights, _ = append_shared_experts(result, 1, 16)
        assert unpack_topk(pack_topk(ids, weights))[0].shape == (7, routing.top_k + 1)


@each_dtype
@variants
def test_strides_do_not_matter(routing, dtype):
    logits = logits_of(9, 16, dtype=dtype)
    wide = torch.full((9, 40), math.nan, dtype=dtype)
    wide[:, 3:35:2] = logits
    for strided in (wide[:, 3:35:2], logits.T.contiguous().T):
        before = strided.clone()
        same(route(strided, routing), route(logits, routing))
        assert torch.equal(strided, before)


def same(a, b):
    for x, y in zip(a, b, strict=True):
        assert torch.equal(x, y)


dyadic = st.integers(-256, 256).map(lambda n: n / 64)  # few enough values for many ties
rows = st.integers(1, 6).flatmap(
    lambda t: st.lists(
        st.lists(dyadic, min_size=16, max_size=16), min_size=t, max_size=t
    )
)  # fmt: skip
a_routing = st.sampled_from(VARIANTS)


@hypothesis.settings(max_examples=60)
@hypothesis.given(rows, a_routing)
def test_rows_are_independent(rows, routing):
    logits = torch.tensor(rows)
    result = route(logits, routing)
    for t in range(len(rows)):
        same([x[t : t + 1] for x in result], route(logits[t : t + 1], routing))


@hypothesis.settings(max_examples=60)
@hypothesis.given(rows, a_routing, st.randoms(use_true_random=False))
def test_permuted_tokens_permute_the_result(rows, routing, random):
    order = random.sample(range(len(rows)), len(rows))
    logits = torch.tensor(rows)
    same([x[order] for x in route(logits, routing)], route(logits[order], routing))


@hypothesis.settings(max_examples=60)
@hypothesis.given(rows, st.integers(-1000, 1000), st.integers(1, 16))
def test_a_constant_leaves_renormalize_as_it_was(rows, constant, k):
    # Multiples of 1/64 below 2^11: the sum is exact in fp32.
    logits = torch.tensor(rows)
    a, b = (route(x, Routing(M.Renormalize, k)) for x in (logits, logits + constant))
    assert torch.equal(a.ids, b.ids) and torch.equal(a.weights, b.weights)


@hypothesis.settings(max_examples=60)
@hypothesis.given(rows, a_routing)
def test_ids_are_distinct_and_best_first(rows, routing):
    result = route(torch.tensor(rows), routing)
    for ids, scores in zip(result.ids.tolist(), result.scores.tolist(), strict=True):
        assert len(set(ids)) == len(ids)
        ranked = [(-scores[e], e) for e in ids]
        assert ranked == sorted(ranked)


@hypothesis.settings(max_examples=60)
@hypothesis.given(rows, a_routing)
def test_random_ties_against_the_scalar_formulation(rows, routing):
    if routing.method == M.Default:
        hypothesis.assume(routing.top_k == 1)  # its fp32 scores may tie where the fp64 ones do not
    assert_scalar(torch.tensor(rows) + 0.0, routing)


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
        ({"n_group": 2}, "n_group is 2; with Renormalize it must be None, 0 or 1"),
        ({"method": 7, "n_group": 2, "topk_group": 1}, "n_group is 2; with MiniMax2"),
        ({"method": 2, "n_group": -1}, "n_group is -1; with DeepSeekV3 it must be at least 0"),
        ({"method": 2, "n_group": 4}, "topk_group is None; it must be from 1 to 4"),
        ({"method": 2, "n_group": 4, "topk_group": 5}, "topk_group is 5; it must be from 1 to 4"),
        ({"method": 2, "topk_group": 2}, "topk_group is 2; without groups"),
        ({"routed_scaling_factor": 2.5}, "routed_scaling_factor is 2.5; Renormalize has none"),
        ({"method": 2, "routed_scaling_factor": math.inf}, "routed_scaling_factor is inf"),
    ],
)
def test_wrong_fields(fields, message):
    with pytest.raises(ValueError, match=message):
        Routing(**{"method": M.Renormalize, "top_k": 2, **fields})


def test_fields_that_change_nothing_are_accepted():
    routing = Routing(1, 2, n_group=0, topk_group=0, routed_scaling_factor=1.0)
    assert routing.method is M.Renormalize and not routing.grouped
    assert hash(routing) == hash(Routing(M.Renormalize, 2, 0, 0, 1.0))


@pytest.mark.parametrize(
    "logits,routing,bias,message",
    [
        (torch.zeros(4), Routing(0, 1), None, r"logits is torch.float32 of shape \(4,\)"),
        (torch.zeros(1, 4).half(), Routing(0, 1), None, "logits is torch.float16"),
        (torch.zeros(1, 4), Routing(0, 5), None, "top_k is 5; logits has only 4 experts"),
        (torch.zeros(1, 4), Routing(1, 1), torch.zeros(4), "bias is given; Renormalize has none"),
        (torch.zeros(1, 4), Routing(2, 1), torch.zeros(5), r"bias is .* of shape \(5,\)"),
        (torch.zeros(1, 4), Routing(2, 1), torch.zeros(1, 4), r"bias is .* of shape \(1, 4\)"),
        (torch.zeros(1, 4), Routing(2, 1), torch.zeros(4).half(), "bias is torch.float16"),
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
    M.Default: "default", M.Renormalize: "renormalize", M.DeepSeekV3: "ds", M.Llama4: "llama4",
    M.RenormalizeNaive: "renormalize_naive", M.TopK: "topk",
}  # fmt: skip


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
        ("hidden_states", "hidden_states_scale", "gemm1_weights", "gemm1_weights_scale",
         "gemm1_bias", "gemm2_weights", "gemm2_weights_scale", "gemm2_bias")
    )  # fmt: skip
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
