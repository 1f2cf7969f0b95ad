"""The reference's fused mixture of experts, against sums in fp64 and exact fractions."""

# SPDX-License-Identifier: Apache-2.0
from dataclasses import replace
from fractions import Fraction

import moe_cases
import numpy as np
import pytest
import torch
from moe_cases import GATED, PLAIN, Shape

from nvfp4_moe.reference.activation import ActivationType, activate
from nvfp4_moe.reference.moe import layer as moe
from nvfp4_moe.reference.moe.finalize import finalize, split_k_groups
from nvfp4_moe.reference.moe.permute import permutation
from nvfp4_moe.reference.numerics.accumulate import fma, matmul
from nvfp4_moe.reference.quantize import dequantize, quantize_global_scale, quantize_per_token
from nvfp4_moe.reference.recipe import NVFP44Over6Config, Recipe
from nvfp4_moe.reference.weights.layout import gemm1_values, gemm2_values, padded_sizes
from nvfp4_moe.reference.weights.prepare import assemble_experts, prepare_experts

SHAPE = Shape(5, 128, 64, 4, 2)


def relative(a, b):
    return ((a.double() - b.double()).norm() / b.double().norm()).item()


def dense(case, x, activation, w13, w2):
    """The layer in fp64, token by token, of any real tensors."""
    out = torch.zeros(x.shape[0], w2.shape[1], dtype=torch.float64)
    for t, (ids, weights) in enumerate(zip(case.ids, case.weights, strict=True)):
        for e, weight in zip(ids.tolist(), weights.tolist(), strict=True):
            raw = w13[e].double() @ x[t].double()
            out[t] += weight * (w2[e].double() @ activate(raw[None], activation)[0])
    return out


@pytest.mark.parametrize("activation", GATED + PLAIN, ids=lambda a: a.name)
def test_without_any_rounding_it_is_the_layer_of_the_dequantized_weights(activation):
    case = moe_cases.make(SHAPE, activation, "bf16")
    e = case.experts
    w13 = torch.stack([gemm1_values(e, i) * e.output1_scale_gate_scalar[i] for i in range(4)])
    w2 = torch.stack([gemm2_values(e, i) * e.output2_scale_scalar[i] for i in range(4)])
    w13 = torch.cat(
        [w[:, : SHAPE.intermediate] for w in w13.chunk(2 if activation.gated else 1, 1)], 1
    )
    want = dense(case, case.x, activation, w13, w2[..., : SHAPE.intermediate])
    got = moe.fused_moe(case.activations, e, case.ids, case.weights, round_to_bf16=False)
    assert relative(got.output, want) < 2**-8


def test_quantization_costs_what_four_bits_cost():
    """A tenth for weights, as much again for each quantized activation; static is no better."""
    errors = {}
    for mode in ("bf16", "per-token", "static"):
        case = moe_cases.make(Shape(64, 256, 128, 4, 2), mode=mode)
        want = dense(case, case.x, ActivationType.Swiglu, case.w13, case.w2)
        got = moe.fused_moe(case.activations, case.experts, case.ids, case.weights)
        errors[mode] = relative(got.output, want)
    assert 0.1 < errors["bf16"] < 0.2 < errors["per-token"] < 0.3
    assert errors["per-token"] < errors["static"] < 1


@pytest.mark.parametrize(
    "recipe", [Recipe(), Recipe("exact"), Recipe("fast", NVFP44Over6Config(256))], ids=str
)
def test_each_step_follows_from_the_one_before(recipe):
    case = moe_cases.make(SHAPE)
    r = moe.fused_moe(
        case.activations, case.experts, case.ids, case.weights, recipe=recipe, keep_steps=True
    )
    s, k = r.steps, SHAPE.top_k
    assert torch.equal(s["intermediate"], s["activated"].bfloat16())
    q = quantize_per_token(s["intermediate"].flatten(0, 1), recipe.base_scale_inv, recipe)
    assert torch.equal(q.codes, s["fc2_input_codes"].flatten(0, 1))
    assert torch.equal(q.block_scales, s["fc2_input_block_scales"].flatten(0, 1))
    assert torch.equal(q.per_token_scale, s["fc2_input_token_scales"].flatten())
    for t in range(SHAPE.tokens):
        for j in range(k):
            e = case.ids[t, j]
            acc = s["accumulator2"][t, j]
            row = acc * s["fc2_input_token_scales"][t, j] * case.experts.output2_scale_scalar[e]
            assert torch.equal(row[: SHAPE.hidden].bfloat16(), r.rows[t, j])
            values = dequantize(q.codes, q.block_scales, 1.0)[t * k + j]
            exact = gemm2_values(case.experts, e).double() @ values.double()
            assert torch.equal(exact.float(), acc)


def test_left_to_right_sums():
    x, w = torch.tensor([[1.0, 2.0**-24, 2.0**-24]]), torch.ones(1, 3)
    assert matmul(x, w, "fp32").item() == 1
    assert matmul(x, w, "fp64").item() == 1 + 2**-23
    case = moe_cases.make(SHAPE)
    a, b = (
        moe.fused_moe(case.activations, case.experts, case.ids, case.weights, accumulate=how).output
        for how in ("fp32", "fp64")
    )
    assert relative(a, b) < 2e-3


def round_to_fp32(value: Fraction) -> float:
    """One rounding to nearest, ties to even, of an exact number."""
    near = np.float32(float(value))
    candidates = {float(np.nextafter(near, np.float32(s * np.inf))) for s in (1, -1)} | {
        float(near)
    }
    return min(
        candidates,
        key=lambda c: (abs(Fraction(c) - value), int(np.float32(c).view(np.uint32)) & 1),
    )


@pytest.mark.parametrize("top_k,groups", [(1, 1), (4, 1), (5, 2), (8, 2), (9, 4), (22, 8)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_finalize_is_a_chain_of_fused_multiply_adds(top_k, groups, dtype):
    g = torch.Generator().manual_seed(top_k)
    rows = (torch.randn(2, top_k, 8, generator=g) * 3).bfloat16().float()
    weights = torch.rand(2, top_k, generator=g).to(dtype)
    assert split_k_groups(2, top_k, 8) == groups
    got = finalize(rows, weights, "flashinfer")
    for t in range(2):
        for h in range(8):
            total = None
            for j in range(groups):
                part = 0.0
                for k in range(j, top_k, groups):
                    w, r = Fraction(weights[t, k].item()), Fraction(rows[t, k, h].item())
                    part = round_to_fp32(w * r + Fraction(part))
                total = part if total is None else round_to_fp32(Fraction(total) + Fraction(part))
            assert got[t, h].item() == total


def test_fma_where_two_roundings_would_show():
    a = torch.tensor([1 + 2.0**-12], dtype=torch.float32)
    b = torch.tensor([1 + 2.0**-7])
    for exponent in range(-60, 10):
        for sign in (1, -1):
            c = torch.tensor([sign * 2.0**exponent * (1 + 2**-23)])
            want = round_to_fp32(Fraction(a.item()) * Fraction(b.item()) + Fraction(c.item()))
            assert fma(a, b, c).item() == want


def test_the_order_depends_on_the_number_of_tokens():
    """H = 7168: split up to T = 42; H = 2048: up to T = 147."""
    assert [split_k_groups(t, 8, 7168) for t in (42, 43)] == [2, 1]
    assert [split_k_groups(t, 8, 2048) for t in (147, 148)] == [2, 1]
    assert split_k_groups(1, 4, 7168) == split_k_groups(1, 65, 7168) == 1


def test_ranks_add_up():
    """With fp32 weights of 1 and K = 1 every row appears on exactly one rank."""
    whole = Shape(9, 128, 64, 6, 1)
    case = moe_cases.make(whole)
    full = moe.fused_moe(case.activations, case.experts, case.ids, case.weights).output
    parts = []
    for offset, count in ((0, 2), (2, 3), (5, 1)):
        local = slice(offset, offset + count)
        fields = {
            name: getattr(case.experts, name)[local]
            for name in (
                "gemm1_weights",
                "gemm1_weights_scale",
                "gemm2_weights",
                "gemm2_weights_scale",
                "output1_scale_scalar",
                "output1_scale_gate_scalar",
                "output2_scale_scalar",
            )
        }
        mine = replace(case.experts, **fields)
        parts.append(
            moe.fused_moe(
                case.activations, mine, case.ids, case.weights, local_expert_offset=offset
            ).output
        )
    assert torch.equal(torch.stack(parts).float().sum(0).bfloat16(), full)


def test_permutation():
    ids = torch.tensor([[3, 1], [0, 3], [7, 2]], dtype=torch.int32)
    assert permutation(ids, 4).tolist() == [3, 1, 0, 4, -1, 2]
    assert permutation(ids, 2, 2).tolist() == [1, -1, -1, 2, -1, 0]


def test_no_tokens():
    case = moe_cases.make(Shape(0, 128, 64, 4, 2))
    out = moe.fused_moe(case.activations, case.experts, case.ids, case.weights)
    assert out.output.shape == (0, 128)


@pytest.mark.parametrize("activation", [ActivationType.Swiglu, ActivationType.Relu2])
@pytest.mark.parametrize("hidden,intermediate", [(128, 128), (2880, 720), (464, 704), (16, 16)])
def test_preparation_pads_with_zeros_and_loses_nothing(hidden, intermediate, activation):
    shape = Shape(3, hidden, intermediate, 2, 1)
    w13, w2 = moe_cases.weights_of(shape, activation)
    w13[1] = 0  # an expert of zeros has scale 1
    e = prepare_experts(w13, w2, activation)
    h, i = padded_sizes(hidden, intermediate, activation.gated)
    assert (e.padded_hidden_size, e.padded_intermediate_size) == (h, i)
    assert (e.hidden_size, e.intermediate_size) == (hidden, intermediate)
    assert e.output1_scale_gate_scalar[1] == 1
    for expert in range(2):
        encode = 1.0 if expert else 2688 / w13[expert].abs().max().float()
        q = quantize_global_scale(w13[expert], encode, Recipe("exact"))
        want = dequantize(q.codes, q.block_scales, 1.0)
        halves = gemm1_values(e, expert).chunk(2 if activation.gated else 1)
        got = torch.cat([half[:intermediate] for half in halves])
        assert torch.equal(got[:, :hidden], want)
        assert not got[:, hidden:].any() and not any(half[intermediate:].any() for half in halves)
        assert not gemm2_values(e, expert)[hidden:].any()
    assert (
        relative(gemm2_values(e, 0)[:hidden, :intermediate] * e.output2_scale_scalar[0], w2[0])
        < 0.13
    )


def test_gate_and_up_may_have_scales_of_their_own():
    case = moe_cases.make(SHAPE, ActivationType.SwigluStep)
    w13, w2 = case.w13, case.w2
    q13 = [quantize_global_scale(w, 1.0, Recipe()) for w in w13]
    q2 = [quantize_global_scale(w, 1.0, Recipe()) for w in w2]
    decode = torch.tensor([[2.0, 0.5]]).expand(4, 2)
    weights = (
        torch.stack([q.codes for q in q13]),
        torch.stack([q.block_scales for q in q13]),
        decode,
        torch.stack([q.codes for q in q2]),
        torch.stack([q.block_scales for q in q2]),
        torch.ones(4),
    )
    e = assemble_experts(*weights)
    assert e.output1_scale_scalar.tolist() == [2.0] * 4
    assert e.output1_scale_gate_scalar.tolist() == [0.5] * 4
    # One limit clamps both halves of the accumulator: of the up half it would be another.
    with pytest.raises(ValueError, match=r"w13_decode differs .* clamp_limit is one limit"):
        assemble_experts(*weights, clamp_limit=2.0)


@pytest.mark.parametrize(
    "w13,w2,message",
    [
        (torch.zeros(2, 64, 128), torch.zeros(2, 128, 32), "w13 is float32"),
        (
            torch.zeros(2, 64, 128).half(),
            torch.zeros(2, 128, 48).half(),
            "w13 is .*w2 .*it must have 96 rows",
        ),
        (
            torch.zeros(2, 64, 120).half(),
            torch.zeros(2, 120, 32).half(),
            "H must be a positive multiple of 16",
        ),
    ],
)
def test_weights_that_do_not_fit(w13, w2, message):
    with pytest.raises(ValueError, match=message):
        prepare_experts(w13, w2)
