"""A failing fused call is made small, and what is kept of it is what it was, to the bit."""

# SPDX-License-Identifier: Apache-2.0
import time
from dataclasses import replace

import assertions
import moe_cases
import pytest
import torch
from moe_cases import Shape

import nvfp4_moe
from nvfp4_moe.cases.moe_case import MoECase
from nvfp4_moe.failures import minimize_moe
from nvfp4_moe.failures.minimize_moe import minimize_call
from nvfp4_moe.failures.slice_call import (
    PER_EXPERT,
    keep_experts,
    keep_hidden,
    keep_intermediate,
    keep_slots,
    keep_tokens,
    with_given_routing,
)
from nvfp4_moe.reference.activation import ActivationType
from nvfp4_moe.reference.moe.routing import Routing, RoutingMethodType
from nvfp4_moe.reference.numerics import e4m3
from nvfp4_moe.reference.weights.layout import (
    gemm1_values,
    gemm2_values,
    row_order,
    unshuffled_bias,
)

SHAPE = Shape(6, 368, 208, 8, 3, 2, 4)  # H and I padded to 384 and 256, experts 2 to 5 local
GATED, PLAIN = ActivationType.Swiglu, ActivationType.Relu2


def same(actual, expected):
    assert actual.shape == expected.shape
    assertions.assert_bitwise(actual.reshape(-1), expected.reshape(-1), "what was kept")


def call(shape=SHAPE, activation=GATED, mode="per-token", **options):
    made = moe_cases.make(shape, activation, mode, **options)
    return MoECase(
        "made",
        made.activations,
        made.experts,
        Routing(RoutingMethodType.Renormalize, shape.top_k),
        shape.experts,
        ids=made.ids,
        weights=made.weights,
        local_expert_offset=shape.offset,
    )


def everything(activation, shape=SHAPE):
    """A call with biases and, of SwiGLU, the activation's parameters."""
    g = torch.Generator().manual_seed(5)
    rows = shape.intermediate * (2 if activation.gated else 1)
    given = {
        "w13_bias": torch.randn(shape.num_local, rows, generator=g),
        "w2_bias": torch.randn(shape.num_local, shape.hidden, generator=g),
    }
    if activation == GATED:
        each = torch.rand(shape.num_local, generator=g) + 1
        given |= {"alpha": each, "beta": each / 2, "clamp_limit": each * 4}
    return call(shape, activation, **given)


def columns(size, tile, tiles):
    return torch.cat([torch.arange(tile * i, min(tile * (i + 1), size)) for i in tiles])


@pytest.mark.parametrize("activation", [GATED, PLAIN])
def test_kept_columns_are_those_of_the_original(activation):
    case = everything(activation)
    old, tile = case.experts, 64 if activation.gated else 128
    assert (old.padded_hidden_size, old.padded_intermediate_size) == (384, 256)
    h_tiles = [0, 2]
    i_tiles = [1, 3] if activation.gated else [1]
    kept = keep_intermediate(keep_hidden(case, h_tiles), i_tiles)
    new = kept.experts
    assert (new.hidden_size, new.intermediate_size) == (
        128 + 112,
        64 + 16 if activation.gated else 80,
    )
    kept.request()  # every shape is one that the call takes
    h, i = columns(384, 128, h_tiles), columns(256, tile, i_tiles)
    rows = torch.cat([i, 256 + i]) if activation.gated else i
    for e in range(4):
        same(gemm1_values(new, e), gemm1_values(old, e)[rows][:, h])
        same(gemm2_values(new, e), gemm2_values(old, e)[h][:, i])
    for name, want in (("gemm1_bias", rows), ("gemm2_bias", h)):
        gated = activation.gated and name == "gemm1_bias"
        before, after = (unshuffled_bias(getattr(x, name), gated) for x in (old, new))
        same(after, before[:, want])
    for name in PER_EXPERT[4:7]:
        same(getattr(new, name), getattr(old, name))
    states = case.activations.hidden_states.reshape(6, 3, 64)[:, h_tiles].reshape(6, 128)
    same(kept.activations.hidden_states, states)
    same(kept.activations.per_token_scale, case.activations.per_token_scale)


@pytest.mark.parametrize("mode", ["per-token", "static", "bf16"])
@pytest.mark.parametrize("activation", [GATED, PLAIN])
def test_zero_columns_do_not_matter(activation, mode):
    """Dropping what is zero leaves the output as it was."""
    case = call(activation=activation, mode=mode)
    states = case.activations.hidden_states.clone()
    states.unflatten(1, (3, -1))[:, 1] = 0
    case = replace(case, activations=replace(case.activations, hidden_states=states))
    want = case.reference()
    same(keep_hidden(case, [0, 2]).reference(), want[:, columns(368, 128, [0, 2])])
    tile = 64 if activation.gated else 128
    others = [0, 2, 3] if activation.gated else [0]
    natural = row_order(case.experts.gemm1_weights.shape[1], activation.gated) % 256
    weights = case.experts.gemm1_weights.clone()
    weights[:, (natural >= tile) & (natural < 2 * tile)] = 0
    zeroed = replace(case, experts=replace(case.experts, gemm1_weights=weights))
    kept = keep_intermediate(zeroed, others)
    assert kept.experts.intermediate_size == (144 if activation.gated else 128)
    want = zeroed.reference()
    if not activation.gated:  # the last columns are in the dropped tile, too
        assert not torch.equal(want, case.reference())
    same(kept.reference(), want)


def test_kept_experts_slots_and_tokens():
    case = everything(GATED)
    rows = case.reference()
    some = keep_tokens(case, [1, 4])
    same(some.reference(), rows[[1, 4]])
    compact = keep_experts(case, range(4))
    same(compact.reference(), rows)
    used = set(case.ids.unique().tolist())
    assert compact.num_experts == 4 + len(used - {2, 3, 4, 5})
    assert compact.local_expert_offset == len(used & {0, 1})
    first = keep_slots(case, [2])
    kept = sorted(set((first.ids - 2).unique().tolist()) & set(range(4)))
    fewer = keep_experts(first, kept)
    assert fewer.experts.num_local == len(kept) < 5
    same(fewer.reference(), first.reference())
    for new, old in enumerate(kept):
        same(gemm1_values(fewer.experts, new), gemm1_values(case.experts, old))
        for name in PER_EXPERT:
            same(getattr(fewer.experts, name)[new], getattr(case.experts, name)[old])
    there = keep_experts(first, kept, offset=2)
    assert there.local_expert_offset == 2
    same(there.reference(), first.reference())
    with pytest.raises(ValueError, match="ids name others"):
        keep_experts(case, [0])


def test_other_layouts_follow():
    shape = Shape(3, 256, 192, 4, 2)
    plain = call(shape)
    both = replace(plain, experts=nvfp4_moe.with_cute_dsl(plain.experts), build="cute-dsl")
    static = call(shape, mode="static")
    cutlass = replace(static, experts=nvfp4_moe.with_cutlass(static.experts), build="cutlass")
    for case, name, make in (
        (both, "cute_dsl", nvfp4_moe.with_cute_dsl),
        (cutlass, "cutlass", nvfp4_moe.with_cutlass),
    ):
        kept = keep_experts(keep_intermediate(keep_hidden(case, [1]), [0, 2]), range(4))
        want = make(replace(kept.experts, **{name: None}))
        for key, value in vars(getattr(want, name)).items():
            same(getattr(getattr(kept.experts, name), key), value)
        kept.request()


def test_routing_from_logits_can_be_given():
    case = call()
    logits = torch.randn(6, 8, generator=torch.Generator().manual_seed(3))
    case = replace(case, logits=logits, ids=None, weights=None)
    given = with_given_routing(case)
    assert given.logits is None
    same(given.reference(), case.reference())


def wrong_expert(value):
    """Fails where a local expert with this output scalar adds something: an injected fault."""
    calls = []

    def fails(case):
        calls.append(case)
        case.request()
        e = case.experts
        wrong = replace(
            e,
            output2_scale_scalar=torch.where(
                e.output2_scale_scalar == value, -e.output2_scale_scalar, e.output2_scale_scalar
            ),
        )
        got = replace(case, experts=wrong).reference()
        return not bool(case.allowed().contains(got).all())

    return fails, calls


@pytest.mark.parametrize("from_logits", [False, True])
def test_a_fault_in_one_expert(from_logits):
    case = everything(GATED)
    if from_logits:
        logits = torch.randn(6, 8, generator=torch.Generator().manual_seed(3))
        case = replace(case, logits=logits, ids=None, weights=None)
    value = case.experts.output2_scale_scalar[2].item()
    fails, calls = wrong_expert(value)
    start = time.monotonic()
    small = minimize_call(case, fails)
    assert time.monotonic() - start < 20
    assert fails(small) and len(calls) < 250
    e = small.experts
    assert small.ids.tolist() == [[0]] and (small.num_experts, small.local_expert_offset) == (1, 0)
    assert (e.num_local, e.padded_hidden_size, e.padded_intermediate_size) == (1, 128, 64)
    assert e.output2_scale_scalar.item() == value
    assert e.gemm1_alpha is None and e.gemm1_beta is None and e.gemm1_clamp_limit is None
    assert e.output1_scale_scalar.item() == e.output1_scale_gate_scalar.item() == 1
    assert small.activations.per_token_scale.item() == 1 and small.weights.item() == 1
    one = int(e4m3.encode(torch.ones(())))
    assert set(e.gemm1_weights_scale.view(torch.uint8).unique().tolist()) <= {0, one}
    # A bias alone makes the row, or a single product does.
    assert (e.gemm2_weights != 0).any(-1).sum() <= 1 and (e.gemm1_weights != 0).any(-1).sum() <= 2


def test_what_needs_two_slots_and_a_place():
    """Two slots of one token, and columns of H beyond the first tile."""

    def fails(case):
        two = ((case.ids >= case.local_expert_offset).sum(1) >= 2).any()
        return bool(two) and case.experts.padded_hidden_size > 128

    case = call()
    small = minimize_call(case, fails)
    assert small.ids.shape == (1, 2) and small.experts.padded_hidden_size == 256
    assert small.experts.padded_intermediate_size == 64
    assert not small.experts.gemm1_weights.any() and not small.activations.hidden_states.any()
    small.request()
    small.reference()


@pytest.mark.parametrize("exact", [False, True])
def test_an_exact_call_stays_exact(exact, monkeypatch):
    """Calls with several right outputs are not tried; here calls of fewer columns would have them."""
    asked = []

    def fails(case):
        asked.append(case)
        return True

    monkeypatch.setattr(minimize_moe, "_single", lambda c: c.experts.padded_hidden_size > 128)
    small = minimize_call(replace(call(), exact=exact), fails)
    narrow = [case for case in asked if case.experts.padded_hidden_size == 128]
    assert small.experts.padded_hidden_size == (256 if exact else 128)
    assert exact != bool(narrow)


def test_without_a_proof_that_one_output_is_right_tokens_alone_go(monkeypatch):
    case = replace(call(), exact=True)
    assert minimize_moe._single(case)
    weights = case.weights.clone()
    weights[2, 1] = torch.nan  # of which the intervals know nothing
    assert not minimize_moe._single(replace(case, weights=weights))
    monkeypatch.setattr(minimize_moe, "_single", lambda c: False)
    small = minimize_call(case, lambda c: True)
    assert small.ids.shape == (1, 3) and small.experts is case.experts


def test_the_budget_is_kept():
    def slow(case):
        time.sleep(0.1)
        return True

    start = time.monotonic()
    small = minimize_call(call(), slow, seconds=0.75)
    assert time.monotonic() - start < 1.2
    assert small.ids.shape[0] < 6


def test_what_does_not_fail():
    with pytest.raises(ValueError, match="does not fail"):
        minimize_call(call(), lambda case: False)
