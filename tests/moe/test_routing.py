"""The routing methods against a scalar formulation, exact ties and special values."""

# SPDX-License-Identifier: Apache-2.0
import dataclasses
import hashlib
import math

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from routing_cases import (
    BIASED,
    GROUPED,
    RAW,
    SIGMOID,
    VARIANTS,
    M,
    assert_scalar,
    bias_of,
    each_dtype,
    each_method,
    ids_of,
    logits_of,
    same,
    to_bf16,
    variants,
)
from torch._subclasses.fake_tensor import FakeTensorMode

from nvfp4_moe.kernels.moe.routing import is_biased, is_raw
from nvfp4_moe.reference.moe.routing import (
    METHODS,
    Routing,
    RoutingResult,
    append_shared_experts,
    pack_topk,
    route,
    unpack_topk,
)
from nvfp4_moe.reference.numerics import functions


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


def test_subnormal_scores_of_a_softmax_tie_at_zero():
    """e^-88 and e^-90 are below 2^-126, e^-87 is not."""
    logits = torch.tensor([[-90.0, -88.0, 0.0, -87.0, -91.0]])
    result = route(logits, Routing(M.Default, 4))
    assert result.ids.tolist() == [[2, 3, 0, 1]]
    assert result.weights[0, 2:].tolist() == [0.0, 0.0]
    assert route(logits, Routing(M.Renormalize, 4)).weights[0, 2:].tolist() == [0.0, 0.0]


def test_subnormal_biases_are_zero():
    logits, bias = torch.full((1, 4), -40.0), torch.tensor([-1e-39, 1e-39, 2e-38, 1e-45])
    assert route(logits, Routing(M.DeepSeekV3, 3), bias).ids.tolist() == [[2, 0, 1]]


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


dyadic = st.integers(-256, 256).map(lambda n: n / 64)  # few enough values for many ties
rows = st.integers(1, 6).flatmap(
    lambda t: st.lists(st.lists(dyadic, min_size=16, max_size=16), min_size=t, max_size=t)
)
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


def test_the_methods_are_those_of_the_contract():
    """The table against lists of these tests; the reference, bounds and kernel read the table."""
    assert list(METHODS) == [m for m in M if m != M.Unspecified]
    assert {m for m in METHODS if m.raw} == set(RAW)
    assert {m for m in METHODS if m.biased} == set(BIASED)
    for method in M:
        implemented = method != M.Unspecified
        assert is_raw(int(method)) == (implemented and method.raw)
        assert is_biased(int(method)) == (implemented and method.biased)


def test_functions_of_a_gpu():
    """Hopper's tanh is 1 from 8 on, where the exact one is not yet: a sigmoid of 16.5 ties with 40."""
    logits = torch.tensor([[16.5, 40.0, -1.0]])
    exact, hopper = (
        route(logits, Routing(M.Sigmoid, 2, functions=name)) for name in ("exact", "hopper")
    )
    assert exact.ids.tolist() == [[1, 0]] and exact.weights[0, 1] < 1
    assert hopper.ids.tolist() == [[0, 1]] and (hopper.weights == 1).all()
    with pytest.raises(ValueError, match="functions is 'hoper'; it must be one of exact, hopper"):
        Routing(M.Sigmoid, 2, functions="hoper")
    assert "hopper" in str(Routing(M.Sigmoid, 2, functions="hopper"))  # what ranks compare


def test_the_tables_of_a_gpu_are_those_that_were_measured():
    """Against the platform's exp2 and tanh, which they are added to."""
    digest = hashlib.sha256()
    cpu = torch.device("cpu")
    for table in (
        functions.ex2_table(cpu),
        *(functions.tanh_table(e, cpu) for e in range(119, 130)),
    ):
        digest.update(table.numpy().tobytes())
    assert digest.hexdigest() == "7ac6f41e8f2214163209cc8b2239407e1acb463f6b425a550f17c31b0808c3a1"


@pytest.mark.gpu
@pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0),
    reason="no NVIDIA GPU of compute capability 9.0 here, whose functions the table has",
)
def test_the_functions_are_hoppers():
    from nvfp4_moe.kernels.instruction_probe import apply_instruction, functions_that_differ

    assert functions_that_differ("cuda") == 0
    x = torch.arange(-(2**31), 2**31, 4099, dtype=torch.int64, device="cuda")
    x = x[: len(x) // 1024 * 1024].to(torch.int32).view(torch.float32)
    for name, ours in (
        ("ex2.approx.ftz.f32", functions.ex2_approx_ftz),
        ("tanh.approx.f32", functions.tanh_approx),
    ):
        got, want = apply_instruction(name, x), ours(x)
        same = (got.view(torch.int32) == want.view(torch.int32)) | (got.isnan() & want.isnan())
        assert same.all(), f"{name} at {x[~same][0].item()}"
